"""Every format in one program: the values are those of plain numpy, the bytes those foretold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from artifacts import UNQUANTIZED, constant_operations, matrices, matrix_names
from llm_coreml.cli.main import export_command
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.decoder import Decoder
from llm_coreml.errors import UnsupportedError
from llm_coreml.model import open_model
from llm_coreml.quantize import SCHEMES, make_plan
from llm_coreml.quantize.formats.round import dense_rows
from llm_coreml.quantize.formats.schemes import (
    Codebook,
    IntChannel,
    IntGroup,
    Mxfp4,
    Scheme,
    ZeroPoint,
)
from llm_coreml.quantize.formats.tensors import (
    codebook_tensor,
    integer_tensor,
    lookup_tensor,
    mxfp4_tensor,
)
from llm_coreml.quantize.plan.flags import linear_scheme
from llm_coreml.quantize.quantized import build_decoder
from llm_coreml.reference.program import constants as packing
from llm_coreml.reference.program.constants import PackedWeight
from llm_coreml.reference.program.execution import Execution
from llm_coreml.rules import RULES, TOO_OLD, Use, refused
from llm_coreml.runtime.reference import ReferenceRunner
from llm_coreml.targets import TARGETS
from llm_coreml.verify.weights import Digests, check_weights
from tiny import llama, small_spec

Shape = tuple[int, int]


@dataclass(frozen=True)
class Made:
    """A weight, its values by plain numpy, and the scheme that foretells its bytes."""

    weight: torch.Tensor
    expected: np.ndarray
    scheme: Scheme


Maker = Callable[[np.random.Generator, Shape], Made]


def halves(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float32)


def spread(values: np.ndarray, shape: Shape) -> np.ndarray:
    """Repeat each of `values` over its block of a matrix."""
    rows, columns = shape[0] // values.shape[0], shape[1] // values.shape[1]
    return values.repeat(rows, 0).repeat(columns, 1)


def integers(scheme: IntGroup | IntChannel, limit: int | None = None) -> Maker:
    """Random codes, below `limit` if given, with zero points that reach the ends."""

    def make(random: np.random.Generator, shape: Shape) -> Made:
        low, high = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
        groups = shape[1] // scheme.group_size if isinstance(scheme, IntGroup) else 1
        codes = random.integers(low, high, shape, np.int8, endpoint=True)
        if limit is not None:
            codes = random.integers(-limit, limit, shape, np.int8)
        scale = halves(random.normal(size=(shape[0], groups)) * 0.01)
        zero = np.zeros_like(scale)
        zero_point = None
        if scheme.zero_point == "int":
            zero = random.integers(low, high, scale.shape, np.int8, endpoint=True)
            zero[:2, 0] = low, high
            zero_point = torch.from_numpy(zero)
        elif scheme.zero_point == "float":
            zero = halves(random.normal(size=scale.shape) * 2 * high)
            zero_point = torch.from_numpy(zero)
        weight = integer_tensor(
            torch.from_numpy(codes), torch.from_numpy(scale), zero_point, scheme.bits
        )
        shifted = codes.astype(np.float32) - spread(zero.astype(np.float32), shape)
        return Made(weight, shifted * spread(scale, shape), scheme)

    return make


def codebook(scheme: Codebook) -> Maker:
    def make(random: np.random.Generator, shape: Shape) -> Made:
        rows, columns = shape
        codes = random.integers(0, 2**scheme.bits, (rows // scheme.vector, columns), np.uint8)
        row_groups, column_groups = scheme.tables(shape)
        sizes = (row_groups, column_groups, 2**scheme.bits, scheme.vector)
        tables = halves(random.normal(size=sizes))
        row, column = np.arange(rows)[:, None], np.arange(columns)[None]
        expected = tables[
            row * row_groups // rows,
            column * column_groups // columns,
            codes[row // scheme.vector, column],
            row % scheme.vector,
        ]
        scale = None
        if scheme.row_scale:
            scale = halves(random.normal(size=(rows, 1)))
            expected = expected * scale
        parts = torch.from_numpy(codes), torch.from_numpy(tables)
        if scale is None and scheme.vector == 1:
            weight = codebook_tensor(parts[0], parts[1][..., 0], scheme.bits)
        else:
            factors = None if scale is None else torch.from_numpy(scale)
            weight = lookup_tensor(*parts, scheme.bits, factors, None)
        return Made(weight, expected, scheme)

    return make


def microscaled(random: np.random.Generator, shape: Shape) -> Made:
    """Return MXFP4 as its specification reads: a sign, two bits of exponent, one of mantissa."""
    codes = random.integers(0, 16, shape, np.uint8)
    exponents = random.integers(-9, 2, (shape[0], shape[1] // 32))
    sign, exponent, mantissa = codes >> 3, codes >> 1 & 3, codes & 1
    normal = 2.0 ** (exponent - 1.0) * (1 + mantissa / 2)
    magnitude = np.where(exponent > 0, normal, mantissa / 2)
    values = np.where(sign, -magnitude, magnitude) * spread(2.0**exponents, shape)
    weight = mxfp4_tensor(torch.from_numpy(codes), torch.from_numpy(exponents))
    return Made(weight, values.astype(np.float32), Mxfp4())


def group(bits: int, size: int, zero_point: ZeroPoint = "none") -> Maker:
    return integers(IntGroup(bits, size, zero_point=zero_point))


def channel(bits: int, zero_point: ZeroPoint = "none") -> Maker:
    return integers(IntChannel(bits, zero_point=zero_point))


MAKERS: dict[str, Maker] = {
    "layers.0.self_attn.q_proj": group(4, 16, "int"),
    "layers.0.self_attn.k_proj": group(4, 16, "float"),
    "layers.0.self_attn.v_proj": group(8, 32),
    "layers.0.self_attn.o_proj": group(8, 8, "int"),
    "layers.0.mlp.gate_proj": group(8, 32, "float"),
    "layers.0.mlp.up_proj": channel(4, "float"),
    "layers.0.mlp.down_proj": group(4, 32),
    "layers.1.self_attn.q_proj": channel(8, "int"),
    "layers.1.self_attn.k_proj": codebook(Codebook(4, 16)),
    # Narrow codes are a trap: coremltools makes int4 of them, in which no such zero point fits.
    "layers.1.self_attn.v_proj": integers(IntGroup(8, 16, zero_point="int"), limit=8),
    "layers.1.self_attn.o_proj": integers(IntChannel(8), limit=8),
    "layers.1.mlp.gate_proj": codebook(Codebook(3, None, columns=8)),
    "layers.1.mlp.up_proj": codebook(Codebook(1, None, columns=64)),
    "layers.1.mlp.down_proj": codebook(Codebook(6, None, columns=48)),
    "layers.2.self_attn.q_proj": codebook(Codebook(4, 16, columns=32)),
    "layers.2.self_attn.k_proj": codebook(Codebook(3, 8, columns=16, vector=2)),
    "layers.2.self_attn.v_proj": group(2, 32),
    "layers.2.self_attn.o_proj": codebook(Codebook(4, 16, row_scale=True)),
    "layers.2.mlp.gate_proj": codebook(Codebook(2, None, vector=4)),
    "layers.2.mlp.up_proj": group(3, 32, "int"),
    "layers.2.mlp.down_proj": group(6, 16, "float"),
    "embed_tokens": microscaled,
    "lm_head": codebook(Codebook(4, None, columns=16)),
}


@dataclass(frozen=True)
class Lowered:
    """A decoder with a format in every place, and its program."""

    path: Path
    decoder: Decoder
    made: dict[str, Made]


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    from llm_coreml.lower.forms import form_for

    model = open_model(llama(num_hidden_layers=3, vocab_size=96, intermediate_size=96))
    config = ExportConfig(context=32, seq_lengths=(1,), **UNQUANTIZED)
    job = resolve(config, model.spec)
    decoder = build_decoder(model, job, make_plan(job, model.spec))
    random, made = np.random.default_rng(0), {}
    for name, maker in MAKERS.items():
        module = decoder.get_submodule(name)
        rows, columns = module.get_parameter("weight").shape
        made[name] = maker(random, (rows, columns))
        module.weight = nn.Parameter(made[name].weight, requires_grad=False)
    path = tmp_path_factory.mktemp("formats") / "model.pte"
    form_for(job, model.spec, None, ()).write(decoder, path)
    return Lowered(path, decoder, made)


def test_every_matrix_of_the_decoder_has_a_format_here(lowered: Lowered) -> None:
    modules = lowered.decoder.named_modules()
    held = {name for name, module in modules if isinstance(module, (nn.Linear, nn.Embedding))}
    assert held == set(MAKERS)


def test_the_program_holds_what_plain_numpy_computes(lowered: Lowered) -> None:
    runner = ReferenceRunner(lowered.path, Execution(mode="fp32"))
    constants = dict(runner.constants())
    for module, name in matrix_names(lowered.path, lowered.decoder.spec).items():
        held = constants[name]
        assert isinstance(held, torch.Tensor)
        expected = torch.from_numpy(lowered.made[module].expected)
        assert held.dtype == torch.float32 and torch.equal(held, expected), module


def test_matrices_take_the_bytes_foretold(lowered: Lowered) -> None:
    for module, matrix in matrices(lowered.path, lowered.decoder.spec).items():
        scheme = lowered.made[module].scheme
        rows, columns = matrix.dense.shape
        foretold = scheme.bits_per_weight((rows, columns)) * rows * columns / 8
        assert matrix.bytes == foretold, (module, scheme.label)


def test_eager_weights_are_those_of_the_program(lowered: Lowered) -> None:
    for name, made in lowered.made.items():
        expected = torch.from_numpy(made.expected)
        assert torch.equal(made.weight.dequantize(), expected), name
        for elements in (1, 700, 1 << 20):
            assert torch.equal(torch.cat(list(dense_rows(made.weight, elements))), expected), name
    constants = ReferenceRunner(lowered.path, Execution(mode="fp32")).constants()
    assert check_weights(constants, Digests().contents(lowered.decoder)) > len(lowered.made)


def overflowing() -> Iterator[tuple[Callable[[], torch.Tensor], str]]:
    codes, ones = torch.zeros(2, 8, dtype=torch.int8), torch.ones(2, 2)
    yield (
        lambda: integer_tensor(codes, ones, torch.tensor([[0, 8], [0, 0]], dtype=torch.int8), 4),
        "a zero point is 8; those of int4 are integers from -8 to 7, so use --zero-point float.",
    )
    yield (
        lambda: integer_tensor(codes, ones * 1e5, None, 4),
        "a scale is 100000; Core ML keeps scales and tables as fp16, which ends at 65504.",
    )
    yield (
        lambda: integer_tensor(codes, ones, ones * -1e5, 8),
        "a zero point is -100000; Core ML keeps scales and tables as fp16",
    )
    yield (
        lambda: codebook_tensor(codes.to(torch.uint8), torch.full((1, 1, 2), 7e4), 1),
        "a value is 70000; Core ML keeps scales and tables as fp16",
    )


@pytest.mark.parametrize(("make", "message"), list(overflowing()))
def test_what_a_format_cannot_hold_is_refused(
    make: Callable[[], torch.Tensor], message: str
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        make()
    assert str(caught.value).startswith(message)


def test_weights_that_stay_packed_are_expanded_row_by_row(
    lowered: Lowered, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ReferenceRunner(lowered.path, Execution(mode="fp32"))
    monkeypatch.setattr(packing, "_SMALL", 0)
    monkeypatch.setattr(packing, "_SLICE", 1000)
    packed = ReferenceRunner(lowered.path, Execution(mode="fp32", memory_budget=0))
    kept = [value for _, value in packed.constants() if isinstance(value, PackedWeight)]
    assert sum(len(value.shape) == 2 for value in kept) >= len(lowered.made)
    assert sum(len(list(value.slices())) > 1 for value in kept) >= len(lowered.made)
    contents = Digests().contents(lowered.decoder)
    assert check_weights(packed.constants(), contents) > len(lowered.made)
    for token in (0, 95, 33):
        torch.testing.assert_close(packed.step([token]), whole.step([token]), rtol=1e-5, atol=1e-5)


# Flags -> a module whose weight is of that kind, if any is quantized.
DOCUMENTED = {
    "--scheme int4-group": "layers.0.mlp.down_proj",
    "--scheme int4-group --zero-point int": "layers.0.self_attn.q_proj",
    "--scheme int4-group --zero-point float": "layers.0.self_attn.k_proj",
    "--scheme int8-group": "layers.0.self_attn.v_proj",
    "--scheme int8-group --zero-point int": "layers.0.self_attn.o_proj",
    "--scheme int4-channel --zero-point float": "layers.0.mlp.up_proj",
    "--scheme int8-channel": "layers.1.self_attn.o_proj",
    "--scheme int8-channel --zero-point int": "layers.1.self_attn.q_proj",
    "--scheme codebook": "layers.1.self_attn.k_proj",
    "--scheme codebook --bits 3 --codebook-columns 64": "layers.1.mlp.gate_proj",
    "--scheme codebook --codebook-rows 16 --codebook-columns 64": "layers.2.self_attn.q_proj",
    "--scheme codebook --bits 3 --codebook-vector 2": "layers.2.self_attn.k_proj",
    "--scheme codebook --codebook-scale": "layers.2.self_attn.o_proj",
    "--scheme int2-group": "layers.2.self_attn.v_proj",
    "--scheme int3-group --zero-point int": "layers.2.mlp.up_proj",
    "--scheme int6-group --group-size 16 --zero-point float": "layers.2.mlp.down_proj",
    "--scheme mxfp4": "embed_tokens",
    "--scheme none": None,
}
DOCUMENT = Path(__file__).parents[3] / "docs" / "formats.md"


def scheme_of(flags: str) -> Scheme:
    """Return what the command line makes of `flags`."""
    context = export_command.make_context("export", ["model", *flags.split()])
    names = {field.name for field in fields(ExportConfig)}
    config = ExportConfig(**{k: v for k, v in context.params.items() if k in names})
    return linear_scheme(resolve(config, small_spec()))


def kind(scheme: Scheme) -> tuple[object, ...]:
    """Return what decides into which operations a weight is lowered."""
    zero_point, vector = getattr(scheme, "zero_point", None), getattr(scheme, "vector", None)
    return type(scheme), scheme.bits, zero_point, vector, scheme.traits


def described(flags: str, module: str | None, chains: dict[str, str]) -> str:
    scheme = scheme_of(flags)
    refusing = [
        name
        for name, target in TARGETS.items()
        if refused(Use(target, "iOS26", scheme.traits, scheme.minimum_os))
    ]
    cells = [
        f"`{flags}`",
        *(f"{scheme.bits_per_weight((2048, columns)):.3f}" for columns in (2048, 8192)),
        scheme.minimum_os,
        ", ".join(refusing) or "none",
        "`const`" if module is None else chains[module],
    ]
    return f"| {' | '.join(cells)} |"


def test_the_document_says_what_the_code_does(lowered: Lowered) -> None:
    for flags, module in DOCUMENTED.items():
        assert module is None or kind(lowered.made[module].scheme) == kind(scheme_of(flags))
    assert {scheme_of(flags).name for flags in DOCUMENTED} == set(SCHEMES)
    text = DOCUMENT.read_text()
    chains = constant_operations(lowered.path, lowered.decoder.spec)
    table = [described(flags, module, chains) for flags, module in DOCUMENTED.items()]
    held = [line for line in text.splitlines() if line.startswith("| `--scheme")]
    assert held == table, "\n" + "\n".join(table)
    words = " ".join(text.split())
    assert all(rule.sentence in words for rule in RULES if rule is not TOO_OLD)
    assert TOO_OLD.source.split()[-1] in words
