"""Which form settings ask for, and that it says of itself what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from llm_coreml.bundle.manifest import Target
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.lower.forms import FORMS, Enumerated, Lowering, Ranged, Static, Twin, form_for
from llm_coreml.model import open_model
from llm_coreml.quantize import make_plan
from llm_coreml.quantize.quantized import build_decoder
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.program_runner import program_runner
from llm_coreml.targets import BACKENDS
from tiny import llama, small_spec

CASES: dict[str, tuple[dict[str, Any], type[Lowering]]] = {
    "several lengths": ({"seq_lengths": (1, 8)}, Enumerated),
    "one length": ({"seq_lengths": (1,)}, Static),
    "every row": ({"seq_lengths": (1, 8), "logits": "all"}, Enumerated),
    "one length that is padded to": ({"seq_lengths": (8,)}, Static),
    "a range": ({"seq_lengths": "1..8"}, Ranged),
    "every row of one": ({"seq_lengths": (1,), "logits": "all"}, Static),
    "twin": ({"seq_lengths": (1, 8), "backend": "xnnpack"}, Twin),
    "twin of one length": ({"seq_lengths": (1,), "backend": "xnnpack"}, Twin),
}


@pytest.mark.parametrize("name", CASES)
def test_a_form_is_what_it_says(name: str, tmp_path: Path) -> None:
    settings, kind = CASES[name]
    model = open_model(llama(vocab_size=96, hidden_size=32, intermediate_size=64))
    config = ExportConfig(context=32, **settings)
    job = resolve(config, model.spec)
    decoder = build_decoder(model, job, make_plan(job, model.spec))
    form = form_for(job, model.spec, bos_id=1, eos_ids=(2,))
    assert type(form) is kind
    described = form.description
    assert (described.form, described.backend) == (kind.name, config.backend)
    lengths = settings["seq_lengths"]
    assert described.lengths == ("1 to 8" if lengths == "1..8" else ", ".join(map(str, lengths)))
    assert described.context == 32
    assert described.every_row == (settings.get("logits") == "all")
    assert described.stop_tokens == (2,)
    form.write(decoder, tmp_path / "model.pte")
    # A Core ML program is held against the description when it is opened.
    runner = program_runner(tmp_path / "model.pte", described, Execution())
    longest = described.seq_lengths[-1]
    assert len(runner.step(list(range(longest)))) == (longest if described.every_row else 1)


def test_every_backend_is_one_of_the_settings_and_has_a_form() -> None:
    names = get_args(get_type_hints(ExportConfig)["backend"])
    assert tuple(BACKENDS) == names == get_args(get_type_hints(Target)["backend"])
    assert {form.backend for form in FORMS} == set(BACKENDS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(1,), (8,), (1, 8), "1..8"])
def test_settings_ask_for_one_form(backend: Any, lengths: tuple[int, ...] | str) -> None:
    config = ExportConfig(context=32, seq_lengths=lengths, backend=backend)
    job = resolve(config, small_spec())
    assert sum(form.fits(job) for form in FORMS) == 1
