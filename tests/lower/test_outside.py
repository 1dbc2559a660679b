"""What ExecuTorch's kernels read in the place of Core ML, and what programs are given by methods.

The logits of such programs are compared in `test_partitions.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts import method
from llm_coreml import export
from llm_coreml.artifact.description import WEIGHTS
from llm_coreml.artifact.method_plan import TensorSpec
from llm_coreml.bundle.bundle_runner import open_runner
from llm_coreml.config import ExportConfig
from llm_coreml.config.values import SKIP_TABLE, SKIPPED
from llm_coreml.decoder import Decoder
from llm_coreml.decoder.ends import Products, Rows
from llm_coreml.inspect.contents import contents
from llm_coreml.runtime.reference import ReferenceRunner
from tiny import llama, small_spec

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
}


def test_an_export_finds_what_lies_outside_of_core_ml_bit_by_bit(tmp_path: Path) -> None:
    model = llama(**SIZES, tie_word_embeddings=True)
    settings: dict[str, Any] = {"skip_ops": SKIPPED, "constants": "inputs", "bits": 16}
    config = ExportConfig(context=64, seq_lengths=(1, 8), **settings)
    bundle = export(model, output=tmp_path / "out", config=config, cache=False)
    told = bundle.manifest.program
    assert told.why is not None
    assert told.why.endswith(
        "; its token table and the head's matrix left to ExecuTorch's kernels, as --skip-ops asks; "
        "its weights are inputs of what Core ML runs, as --constants inputs asks"
    )
    assert bundle.manifest.verification.passed
    runner = open_runner(bundle)
    assert isinstance(runner, ReferenceRunner)
    (program,) = runner.programs
    handed = [port.name for port in program.inputs if port.name.startswith(WEIGHTS)]
    assert len(handed) == 2 * 9 + 1, "matrices and norms"
    named = dict(runner.constants())
    outside = {name: at for name, at in named.items() if name.endswith("of method 'forward'")}
    held = [value for value in outside.values() if isinstance(value, torch.Tensor)]
    assert len(held) == len(handed) + 2
    table = model.get_input_embeddings().weight.half()
    same = [value for value in held if value.shape == table.shape and torch.equal(value, table)]
    assert {value.dtype for value in same} == {torch.float16, torch.float32}
    kernels = [step.target for step in method(bundle.program).instructions if step.kind == "kernel"]
    assert {"aten::embedding.out", "aten::mm.out"} <= set(kernels)
    # The file tells as much without its manifest.
    assert ReferenceRunner(bundle.program).seq_lengths == (1, 8)


@pytest.mark.exhaustive
@pytest.mark.parametrize("settings", [{}, {"compute_precision": "fp32", "seq_lengths": "1..8"}])
def test_an_export_scales_codes_of_a_table_outside(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    model = llama(**SIZES, tie_word_embeddings=True)
    config = ExportConfig(
        **{"context": 64, "seq_lengths": (1, 8), "skip_ops": (SKIP_TABLE,), **settings}
    )
    bundle = export(model, output=tmp_path / "out", config=config, cache=False)
    stored = bundle.manifest.quantization
    assert (stored.embedding.label, stored.lm_head.label) == 2 * ("int8 per channel",)
    assert bundle.manifest.verification.passed
    # Codes, and a scale for each row.
    assert contents(tmp_path / "out").weights_outside == 96 * 32 + 96 * 2
    values = [value for value in method(bundle.program).values if isinstance(value, TensorSpec)]
    assert [value.shape for value in values if value.constant and value.dtype == "int8"] == [
        (96, 32)
    ]


class Ends(torch.nn.Module):
    """Token table and head with nothing between."""

    def __init__(self, first: Rows, last: Products) -> None:
        super().__init__()
        self.first, self.last = first, last

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.last(self.first(tokens))
        return logits


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_ends_run_on_executorch_s_own_kernels(dtype: torch.dtype) -> None:
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    spec = small_spec(vocab_size=96, num_hidden_layers=1)
    decoder = Decoder(replace(spec, head_bias=True, logits_softcap=30.0), context=8)
    shape = (96, spec.hidden_size)
    decoder.lm_head.weight = torch.nn.Parameter(torch.randn(shape).to(dtype))
    decoder.lm_head.bias = torch.nn.Parameter(torch.randn(96).to(dtype))
    codes = torch.randint(-128, 128, shape, dtype=torch.int8)
    scales = torch.rand(96, 1, dtype=torch.float16) / 128
    ends = Ends(Rows(codes, scales, dtype), Products(decoder)).eval()
    tokens = torch.tensor([[5, 0, 95]], dtype=torch.int32)
    traced = torch.export.export(ends, (tokens,))
    program = to_edge_transform_and_lower(traced).to_executorch().buffer
    (given,) = Runtime.get().load_program(program).load_method("forward").execute([tokens])
    expected = decoder.leaving(
        (codes * scales.float())[tokens.long()].to(dtype).float() @ decoder.lm_head.weight.float().T
    )
    torch.testing.assert_close(given, expected.detach(), rtol=1e-5, atol=1e-5)
