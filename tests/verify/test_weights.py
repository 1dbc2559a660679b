"""The program's constants beside the model's weights: equal bit by bit, none missing, none new."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torchao.utils import TorchAOBaseTensor

from artifacts import UNQUANTIZED, Artifact, lower
from llm_coreml.artifact.mil import Constant, TensorType
from llm_coreml.config import ExportConfig
from llm_coreml.decoder import Decoder
from llm_coreml.errors import VerificationError
from llm_coreml.quantize.formats.round import dense_rows
from llm_coreml.reference.program.constants import PackedWeight
from llm_coreml.reference.program.execution import Execution
from llm_coreml.reference.program.numerics import numerics
from llm_coreml.runtime.reference import ReferenceRunner
from llm_coreml.verify.weights import Content, Digests, check_weights
from tiny import llama

Constants = list[tuple[str, torch.Tensor | PackedWeight]]


@pytest.fixture
def artifact(quantized: Callable[[str], Artifact]) -> Artifact:
    return quantized("codebook-4")


def constants(artifact: Artifact) -> Constants:
    return list(ReferenceRunner(artifact.path, Execution(mode="fp32")).constants())


def contents(decoder: Decoder) -> dict[str, Content]:
    """What is known of a decoder of which nothing has come by."""
    return Digests().contents(decoder)


def ulp(value: torch.Tensor) -> torch.Tensor:
    """Return a copy whose last element is the next number of its type."""
    changed = value.detach().clone()
    last = changed.view(-1)[-1:]
    last.copy_(torch.nextafter(last, torch.full_like(last, torch.inf)))
    return changed


def test_every_tensor_that_the_program_computes_with_is_compared(artifact: Artifact) -> None:
    found = constants(artifact)
    named = [*artifact.decoder.named_parameters(), *artifact.decoder.named_buffers()]
    assert (
        check_weights(found, contents(artifact.decoder)) == len(named) - 2
    )  # The cache is no weight.
    arrays = [value for _, value in found if isinstance(value, torch.Tensor) and value.ndim]
    assert len(arrays) >= len(named) - 2


def fractions(artifact: Artifact) -> Iterator[tuple[int, str]]:
    for number, (name, value) in enumerate(constants(artifact)):
        if isinstance(value, torch.Tensor) and value.ndim and value.is_floating_point():
            yield number, name


def test_one_bit_of_any_constant_is_noticed_and_named(artifact: Artifact) -> None:
    found = constants(artifact)
    tried = list(fractions(artifact))
    assert len(tried) > 20
    for number, name in tried:
        value = found[number][1]
        assert isinstance(value, torch.Tensor)
        changed = [*found[:number], (name, ulp(value)), *found[number + 1 :]]
        with pytest.raises(VerificationError) as caught:
            check_weights(changed, contents(artifact.decoder))
        message = str(caught.value)
        assert str(list(value.shape)) in message and f"'{name}'" in message


@pytest.mark.parametrize("part", ["norm.weight", "lm_head.weight", "cos", "positions"])
def test_a_weight_that_the_program_lacks_is_named(artifact: Artifact, part: str) -> None:
    decoder = deepcopy(artifact.decoder)
    owner, _, name = part.rpartition(".")
    module = decoder.get_submodule(owner)
    dense = torch.cat(list(dense_rows(getattr(module, name)))) + 1
    if isinstance(getattr(module, name), torch.nn.Parameter):
        dense = torch.nn.Parameter(dense, requires_grad=False)
    setattr(module, name, dense)
    with pytest.raises(VerificationError, match=f"The weight '{part}' .* is not in the program"):
        check_weights(constants(artifact), contents(decoder))


def test_ones_and_zeros_may_be_left_out(tmp_path: Path) -> None:
    model = llama(attention_bias=True)
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
        model.model.layers[0].self_attn.q_proj.bias.fill_(0.0)
        model.model.layers[0].self_attn.k_proj.bias.fill_(1.0)
    artifact = lower(model, ExportConfig(context=32, **UNQUANTIZED), tmp_path / "model.pte")
    found = constants(artifact)
    assert not any(name.startswith("p_norm_weight") for name, _ in found), "it is left out"
    check_weights(found, contents(artifact.decoder))


def test_axes_of_one_element_do_not_count(artifact: Artifact) -> None:
    expected = contents(artifact.decoder)
    found: Constants = [
        (
            name,
            value.view(1, -1, 1, 1)
            if isinstance(value, torch.Tensor) and value.ndim == 1
            else value,
        )
        for name, value in constants(artifact)
    ]
    changed = {
        value.numel() for _, value in found if isinstance(value, torch.Tensor) and value.ndim == 4
    }
    assert 1 in changed and max(changed) > 1, "a number, and a row of them"
    assert check_weights(found, expected) == len(expected)


def test_numbers_of_nobody_are_named(artifact: Artifact) -> None:
    found: Constants = [*constants(artifact), ("stray", torch.tensor([1.5]))]
    with pytest.raises(VerificationError, match=r"computes with 'stray' \[1\], which is none of"):
        check_weights(found, contents(artifact.decoder))
    # coremltools adds biases of zeros; a shape or a bound is no weight.
    found[-1:] = [
        ("bias", torch.zeros(7)),
        ("sizes", torch.tensor([1, 2])),
        ("limit", torch.ones(())),
    ]
    check_weights(found, contents(artifact.decoder))


@pytest.mark.parametrize("change", [0.0, 1.0])
def test_weights_that_stay_packed_are_compared_too(artifact: Artifact, change: float) -> None:
    found = constants(artifact)
    head = torch.cat(list(dense_rows(artifact.decoder.lm_head.weight)))
    (number,) = [
        number
        for number, (_, value) in enumerate(found)
        if isinstance(value, torch.Tensor) and value.shape == head.shape and value.equal(head)
    ]
    head[-1, -1] += change
    source = Constant(TensorType("fp32", tuple(head.shape)), content=head.numpy())
    found[number] = ("head", PackedWeight(source, numerics("fp32"), torch.device("cpu"), True))
    if not change:
        check_weights(found, contents(artifact.decoder))
        return
    with pytest.raises(VerificationError, match=r"'lm_head.weight' .*; 'head' of that shape holds"):
        check_weights(found, contents(artifact.decoder))


def test_rows_of_quantized_weights_are_those_of_the_whole(
    quantized: Callable[[str], Artifact], scheme_label: str
) -> None:
    for module in quantized(scheme_label).decoder.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            weight = module.weight
            (whole,) = dense_rows(weight)
            quantizes = isinstance(weight, TorchAOBaseTensor)
            dense = weight.dequantize() if quantizes else weight.to(torch.float32)
            parts = list(dense_rows(weight, 1))
            assert len(parts) > 1 and torch.cat(parts).equal(whole) and whole.equal(dense)
