"""Programs that ExecuTorch lowers by itself, run by the reference, against eager torch.

In fp32 what is computed in another order than torch's may differ in the last bits. In fp16 inputs
and weights are exact, so that each operation adds one rounding: half a unit in the last place.
"""

from __future__ import annotations

from pathlib import Path

import coremltools as ct
import pytest
import torch

from cases import cases
from llm_coreml.errors import ArtifactError
from llm_coreml.reference import load_method
from lowering import lower, specs
from samples import SAMPLES

# coremltools tries to make masks and sizes fp16, sees that they do not fit, and lets them be.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")

KINDS = {"fp32": ct.precision.FLOAT32, "fp16": ct.precision.FLOAT16}
ROUNDING = {ct.precision.FLOAT32: 1e-6, ct.precision.FLOAT16: 2.0**-11 * (1 + 1e-3)}


# All programs of the product are in fp16; of these samples one shows it as well.
FURTHER = {f"{name}-fp16" for name in SAMPLES} - {"arithmetic-fp16"}


@pytest.mark.parametrize(
    "case", cases([f"{name}-{kind}" for name in SAMPLES for kind in KINDS], FURTHER)
)
def test_functions(case: str, tmp_path: Path) -> None:
    name, _, kind = case.rpartition("-")
    sample, precision = SAMPLES[name], KINDS[kind]
    path = lower(sample.module(), sample.inputs, specs(precision), tmp_path / "sample.pte")
    results = load_method(path).run(*sample.inputs)
    for (part, lowered), actual in zip(sample.parts.items(), results, strict=True):
        expected = (lowered.meaning or lowered.function)(*sample.inputs).detach()
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), part
        if expected.is_floating_point():
            scale = float(expected.abs().max())
            error = float((actual - expected).abs().max())
            assert error <= lowered.roundings * ROUNDING[precision] * scale, part
        else:
            assert torch.equal(actual, expected), part


class Twice(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.relu(x) + 1, torch.relu(x) + 1


def test_one_result_for_two_outputs_is_refused(tmp_path: Path) -> None:
    """coremltools merges equal values, and ExecuTorch then names one of them for both."""
    path = lower(Twice(), (torch.ones(2),), specs(ct.precision.FLOAT16), tmp_path / "twice.pte")
    with pytest.raises(ArtifactError, match="more than once"):
        load_method(path)
