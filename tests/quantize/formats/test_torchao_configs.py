"""Torchao's configurations: which scheme each is, and whose codes come out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchao.prototype.quantization.codebook_coreml import CodebookWeightOnlyConfig
from torchao.quantization import (
    FqnToConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.quant_primitives import MappingType

from llm_coreml.config import ExportConfig, resolve
from llm_coreml.errors import ConfigError, LlmCoreMLError, UnsupportedError
from llm_coreml.quantize import make_plan
from llm_coreml.quantize.formats.round import dense_rows, quantized
from llm_coreml.quantize.formats.schemes import Codebook, IntChannel, IntGroup, Scheme, Unquantized
from tiny import small_spec

SPEC = small_spec(vocab_size=1024, hidden_size=64, intermediate_size=128)
ASYMMETRIC = MappingType.ASYMMETRIC


def integers(bits: int, group: int | None = None, **options: Any) -> IntxWeightOnlyConfig:
    granularity = PerAxis(0) if group is None else PerGroup(group)
    dtype = getattr(torch, f"int{bits}")
    return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity, **options)


def codebook(bits: int, rows: int, columns: int) -> CodebookWeightOnlyConfig:
    return CodebookWeightOnlyConfig(getattr(torch, f"uint{bits}"), [rows, columns])


TAKEN: list[tuple[Any, Scheme]] = [
    (IntxWeightOnlyConfig(), IntChannel(8)),
    (integers(4), IntChannel(4)),
    (integers(8, mapping_type=ASYMMETRIC), IntChannel(8, zero_point="int")),
    (integers(4, mapping_type=MappingType.SYMMETRIC_NO_CLIPPING_ERR), IntChannel(4)),
    *[(integers(4, size), IntGroup(4, size)) for size in (1, 2, 8, 16, 32)],
    (integers(8, 32, mapping_type=ASYMMETRIC), IntGroup(8, 32, zero_point="int")),
    (integers(3, 32, scale_dtype=torch.float16), IntGroup(3, 32)),
    (codebook(3, 16, -1), Codebook(3, 16)),
    (codebook(4, 1, -1), Codebook(4, 1)),
    (codebook(6, -1, 16), Codebook(6, None, columns=16)),
    (codebook(8, -1, 1), Codebook(8, None, columns=1)),
    (codebook(2, -1, -1), Codebook(2, None)),
    # ExecuTorch's lowering has tables for rows or for columns alone; ours has blocks of both.
    (codebook(4, 16, 32), Codebook(4, 16, columns=32)),
]


@pytest.mark.parametrize(("config", "expected"), TAKEN, ids=lambda each: getattr(each, "label", ""))
def test_a_configuration_is_a_scheme(config: Any, expected: Scheme) -> None:
    system = {"minimum_os": expected.minimum_os} if expected.minimum_os > "iOS18" else {}
    # What the flags say of formats is not what it says.
    others: dict[str, Any] = {"group_size": 4, "codebook_rows": 2, "zero_point": "float", **system}
    everywhere = ExportConfig(scheme={"*": config}, **others)
    plan = make_plan(resolve(everywhere, SPEC), SPEC)
    assert plan.linear == plan.embedding == plan.lm_head == expected and not plan.exceptions
    again = ExportConfig.from_json(everywhere.to_json())
    assert make_plan(resolve(again, SPEC), SPEC) == plan
    each = ExportConfig(scheme=config, embedding=config, lm_head=config, **others)
    assert make_plan(resolve(each, SPEC), SPEC) == plan


def test_patterns_of_configurations_keep_their_order() -> None:
    mapping = {"lm_head": codebook(3, 16, -1), "layers.1.*": None, "*": integers(8)}
    plan = make_plan(resolve(ExportConfig().under({"scheme": mapping}), SPEC), SPEC)
    assert (plan.lm_head, plan.embedding) == (Codebook(3, 16), IntChannel(8))
    assert plan.scheme_of("layers.0.mlp.up_proj") == IntChannel(8)
    assert plan.scheme_of("layers.1.mlp.up_proj") == Unquantized(16)


@pytest.mark.filterwarnings("ignore:Config Deprecation")
def test_torchao_s_own_mapping_has_its_own_order() -> None:
    """Exact names come first there, and the default last, wherever they stand."""
    names: dict[str, Any] = {"_default": integers(4), "model.layers.1.mlp.up_proj.weight": None}
    plan = make_plan(resolve(ExportConfig(scheme=FqnToConfig(names)), SPEC), SPEC)
    assert plan.scheme_of("layers.1.mlp.up_proj") == Unquantized(16)
    assert plan.linear == plan.embedding == plan.lm_head == IntChannel(4)
    with pytest.raises(UnsupportedError, match=r"the regular expression 're:lm.*'; give a mapping"):
        ExportConfig(scheme=FqnToConfig({"re:lm.*": integers(4)}))


REFUSED: list[tuple[Any, type[LlmCoreMLError], str]] = [
    *[
        (integers(bits, 32), UnsupportedError, f"asks for int{bits}; Core ML holds integers of 2, ")
        for bits in (1, 5, 7)
    ],
    *[
        (integers(bits), UnsupportedError, "4 and 8 bits with a scale for each row; use PerGroup")
        for bits in (2, 3, 6)
    ],
    (integers(5), UnsupportedError, "4 and 8 bits with a scale for each row; use int4 or int8"),
    (integers(8, scale_dtype=torch.bfloat16), UnsupportedError, "scales of torch.bfloat16, which"),
    *[
        (codebook(bits, 16, -1), UnsupportedError, f"asks for torch.uint{bits}; Core ML holds")
        for bits in (5, 7)
    ],
    (codebook(4, 0, -1), ConfigError, "has the block_size [0, -1]; give rows and columns"),
    (Int8WeightOnlyConfig(), UnsupportedError, "Int8WeightOnlyConfig has no form in Core ML; give"),
    (3, ConfigError, "A weight format is 3; give a text, or torchao's IntxWeightOnlyConfig or"),
]


@pytest.mark.parametrize(("config", "kind", "message"), REFUSED, ids=lambda each: str(each)[:40])
def test_what_core_ml_does_not_have_is_refused(
    config: Any, kind: type[LlmCoreMLError], message: str
) -> None:
    for settings in ({"scheme": config}, {"scheme": {"lm_head": config}}, {"embedding": config}):
        with pytest.raises(kind) as caught:
            ExportConfig(**settings)
        assert message in str(caught.value)


def test_a_table_has_one_format() -> None:
    with pytest.raises(ConfigError, match="A token table or a head has one format"):
        ExportConfig(lm_head=FqnToConfig({"a": integers(4)}))
    with pytest.raises(ConfigError, match="'a' has the format 'b=none'; give one format"):
        ExportConfig(scheme={"a": "b=none"})


def both(config: Any, scheme: Scheme) -> tuple[torch.Tensor, Any, Any]:
    """Return a matrix, what torchao makes of it, and what an export makes of it."""
    layer = nn.Linear(64, 96, bias=False)
    generator = torch.Generator().manual_seed(0)
    layer.weight = nn.Parameter(torch.randn(96, 64, generator=generator), requires_grad=False)
    weight = layer.weight.clone()
    plan = make_plan(resolve(ExportConfig(scheme=config), SPEC), SPEC)
    assert plan.linear == scheme
    quantize_(layer, config)
    return weight, layer.weight, quantized(plan.linear, weight)


@pytest.mark.parametrize("group", [None, 2, 8, 16, 32, 64])
def test_int8_has_the_codes_of_quantize_(group: int | None) -> None:
    scheme = IntChannel(8) if group is None else IntGroup(8, group)
    _, theirs, ours = both(integers(8, group), scheme)
    assert torch.equal(theirs.qdata, ours.qdata)
    assert torch.equal(theirs.scale.to(torch.float16).float(), ours.scale)
    assert theirs.block_size == tuple(ours.block_size) and not ours.zero_point.any()


def test_a_weight_may_be_a_group_of_its_own() -> None:
    """Torchao fails on that; here it is a scale for each weight."""
    weight = torch.tensor([[0.5, -3.0], [0.0, 1.0]])
    made: Any = quantized(IntGroup(8, 1), weight)
    assert made.scale.shape == (2, 2)
    torch.testing.assert_close(made.dequantize(), weight, rtol=1e-3, atol=0)


def error(weight: torch.Tensor, made: torch.Tensor) -> float:
    return float((torch.cat(list(dense_rows(made))) - weight).square().sum())


@pytest.mark.parametrize("mapping", [MappingType.SYMMETRIC, ASYMMETRIC])
@pytest.mark.parametrize("group", [None, 8, 32])
def test_int4_has_the_format_of_quantize_and_less_error(group: int | None, mapping: Any) -> None:
    """Scales are searched for here, so that codes differ."""
    kind = "int" if mapping is ASYMMETRIC else "none"
    scheme = IntChannel(4, zero_point=kind) if group is None else IntGroup(4, group, 16, kind)
    weight, theirs, ours = both(integers(4, group, mapping_type=mapping), scheme)
    assert theirs.qdata.shape == ours.qdata.shape and theirs.scale.shape == ours.scale.shape
    assert theirs.block_size == tuple(ours.block_size)
    assert theirs.target_dtype == ours.target_dtype
    assert bool(ours.zero_point.any()) == (mapping is ASYMMETRIC)
    assert error(weight, ours) < error(weight, theirs.dequantize())


@pytest.mark.parametrize("block", [(16, -1), (-1, 16), (-1, -1), (1, -1), (-1, 1)])
def test_codebooks_have_the_format_of_quantize_and_no_more_error(block: tuple[int, int]) -> None:
    """The best tables of one dimension are found here, and nearly the best there."""
    sizes = [None if size == -1 else size for size in block]
    weight, theirs, ours = both(codebook(3, *block), Codebook(3, sizes[0], columns=sizes[1]))
    assert theirs.codes.shape == ours.codes.shape and theirs.code_dtype == ours.code_dtype
    assert theirs.codebook.shape == ours.codebook.shape
    assert error(weight, ours) < 1.01 * error(weight, theirs.dequantize())
