"""What keeps lowering quick."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from llm_coreml.config import ExportConfig, resolve
from llm_coreml.model import open_model
from llm_coreml.quantize.plan.choose import plan_for
from llm_coreml.quantize.quantized import build_decoder
from tiny import llama


@pytest.mark.parametrize("target", ["gpu", "ane"])
def test_the_traced_program_has_nothing_to_decompose(target: str) -> None:
    """Or else coremltools would meet operators that ExecuTorch takes apart before it."""
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner
    from executorch.exir.tracer import _default_decomposition_table

    from llm_coreml.lower.traced import trace_program

    scheme = "int4-channel" if target == "ane" else "int4-group"
    config = ExportConfig(target=target, scheme=scheme, context=64, seq_lengths=(1, 8))
    model = open_model(llama(vocab_size=96, intermediate_size=96))
    job = resolve(config, model.spec)
    decoder = build_decoder(model, job, plan_for(job, model))
    exported = trace_program(decoder, job.shapes.seq_lengths).run_decompositions({})
    table = _default_decomposition_table()
    kept, _ = CoreMLPartitioner().ops_to_not_decompose(exported)
    called = {node.target for node in exported.graph.nodes if node.op == "call_function"}
    assert "aten.linear.default" in map(str, called)
    assert not called & (table.keys() - set(kept))


def test_garbage_is_collected_again_after_a_lowering_that_failed(tmp_path: Path) -> None:
    from llm_coreml.lower.forms import form_for

    model = open_model(llama(vocab_size=96, intermediate_size=96))
    config = ExportConfig(context=64, seq_lengths=(1, 8))
    job = resolve(config, model.spec)
    decoder = build_decoder(model, job, plan_for(job, model))
    seen = []
    with pytest.raises(ZeroDivisionError):

        def fail(share: float) -> None:
            seen.append(gc.isenabled())
            raise ZeroDivisionError

        form_for(job, model.spec, None, ()).write(decoder, tmp_path / "model.pte", fail)
    assert seen == [False] and gc.isenabled()
