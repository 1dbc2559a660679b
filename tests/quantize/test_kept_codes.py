"""The codes that a program holds, found for each matrix of a model that was tuned a little."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from artifacts import SCHEMES, Artifact
from cases import cases
from llm_coreml.errors import ConfigError, UnsupportedError
from llm_coreml.quantize.formats.round import dense_rows
from llm_coreml.quantize.formats.schemes import IntChannel, Scheme, Unquantized
from llm_coreml.quantize.formats.serialize import to_parts
from llm_coreml.quantize.kept_codes import KeptCodes


def quantized_in(artifact: Artifact) -> dict[str, tuple[torch.Tensor, Scheme]]:
    """Return the quantized matrices of the decoder, each with its format."""
    found = {}
    for name, module in artifact.decoder.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            scheme = artifact.plan.scheme_of(name)
            if not isinstance(scheme, Unquantized):
                found[name] = (module.weight.detach(), scheme)
    return found


@pytest.mark.parametrize("label", cases(SCHEMES, set(SCHEMES) - {"int4-group-32", "int3-group"}))
def test_a_program_gives_back_what_was_lowered(
    label: str, quantized: Callable[[str], Artifact]
) -> None:
    artifact = quantized(label)
    kept = KeptCodes(artifact.path)
    matrices = quantized_in(artifact)
    assert len(matrices) > 7
    for name, (weight, scheme) in matrices.items():
        dense = torch.cat(list(dense_rows(weight)))
        noise = torch.randn(dense.shape, generator=torch.Generator().manual_seed(1))
        tuned = dense + 0.2 * dense.std() * noise
        found = kept.like(tuned, scheme)
        assert torch.equal(torch.cat(list(dense_rows(found))), dense), name
        fitted = kept.fitted(tuned, scheme)
        (kind, parts), (same, before) = to_parts(fitted), to_parts(found)
        codes = "qdata" if kind["type"] == "integers" else "codes"
        assert kind == same and torch.equal(parts[codes], before[codes]), name
        errors = [
            (torch.cat(list(dense_rows(each))) - tuned).square().sum() for each in (fitted, found)
        ]
        assert errors[0] < errors[1], name


def test_what_is_not_there_is_refused(quantized: Callable[[str], Artifact], tmp_path: Path) -> None:
    artifact = quantized("int4-group-32")
    kept = KeptCodes(artifact.path)
    weight, scheme = quantized_in(artifact)["layers.0.mlp.up_proj"]
    with pytest.raises(UnsupportedError, match="none of that shape; export with"):
        kept.like(torch.ones(7, 64), scheme)
    with pytest.raises(UnsupportedError, match="has none as int4 per channel; export with"):
        kept.like(torch.ones(weight.shape), IntChannel(4))
    other = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    with pytest.raises(UnsupportedError, match=r"nothing like it .* give an export of the model"):
        kept.like(other, scheme)
    with pytest.raises(ConfigError, match=r"--codes-of .* cannot be read: No such file"):
        KeptCodes(tmp_path / "nowhere")
