"""Caches as inputs and outputs, and methods that share weights, give the model's logits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts import Artifact, files, lower
from cases import cases
from llm_coreml import export
from llm_coreml.artifact import pte
from llm_coreml.artifact.inmemoryfs import unpack
from llm_coreml.bundle.bundle_runner import open_runner
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.decoder.states import state_specs
from llm_coreml.errors import ArtifactError, ConfigError
from llm_coreml.lower.forms import form_for
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.eager import EagerRunner
from llm_coreml.runtime.program_runner import program_runner
from llm_coreml.runtime.reference import ReferenceRunner
from llm_coreml.runtime.runner import Runner
from tiny import llama, mistral, small_spec, tokens_for

# Without rounding only the order of fp32 sums differs; fp16 keeps 11 bits of each value.
BOUNDS = {"fp32": 2e-5, "declared": 2e-2}
FUNCTIONS = "prefill:8,decode:1"
CASES: dict[str, dict[str, Any]] = {
    "inputs": {"kv_cache": "inputs", "seq_lengths": (1, 8), "logits": "all"},
    "functions, windows": {"functions": FUNCTIONS, "window": 7},
    "inputs of a range, windows": {"kv_cache": "inputs", "seq_lengths": "1..8", "window": 7},
    "inputs of one length, windows": {"kv_cache": "inputs", "seq_lengths": (1,), "window": 7},
    "inputs, ane": {"kv_cache": "inputs", "seq_lengths": (1, 8), "target": "ane"},
    "inputs in fp32": {"kv_cache": "inputs", "seq_lengths": (1, 8), "compute_precision": "fp32"},
    "twin, windows": {
        "kv_cache": "inputs",
        "seq_lengths": (1, 8),
        "backend": "xnnpack",
        "window": 7,
    },
    "functions": {"functions": FUNCTIONS, "logits": "all"},
    "inputs from iOS16, windows": {
        "kv_cache": "inputs",
        "seq_lengths": (1, 8),
        "window": 7,
        "minimum_os": "iOS16",
        "scheme": "int8-channel",
    },
}
FURTHER = tuple(CASES)[2:]
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
}


def made(name: str, path: Path) -> Artifact:
    settings = {"context": 64, **CASES[name]}
    window = settings.pop("window", None)
    if window is None:
        return lower(llama(**SIZES), ExportConfig(**settings), path)
    kinds = ["sliding_attention", "full_attention"]
    model = mistral(**SIZES, sliding_window=window, layer_types=kinds)
    return lower(model, ExportConfig(**settings), path)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Artifact]:
    """Each case, lowered once."""
    folder = tmp_path_factory.mktemp("carried")
    return functools.cache(lambda name: made(name, folder / f"{name}.pte"))


def opened(artifact: Artifact, mode: str) -> Runner:
    job = artifact.job
    description = form_for(job, artifact.decoder.spec, bos_id=1, eos_ids=(2, 5)).description
    assert not description.states and description.caches
    return program_runner(artifact.path, description, Execution(mode=mode))


@pytest.mark.parametrize("name", cases(CASES, FURTHER))
def test_the_logits_are_the_model_s_to_the_end_of_the_context(
    name: str, artifacts: Callable[[str], Artifact]
) -> None:
    artifact = artifacts(name)
    tokens = tokens_for(96, 64)
    expected = EagerRunner(artifact.decoder, "eager").logits(tokens)
    for mode, bound in BOUNDS.items():
        runner, at = opened(artifact, mode), 0
        # Past the window, padded where 5 and 3 are no lengths, and the last position by itself.
        for count in (8, 5, 1, 1, *[8] * 5, 3, 5, 1) if runner.seq_lengths[-1] > 1 else [1] * 64:
            rows = runner.step(tokens[at : at + count])
            at += count
            wanted = expected[at - len(rows) : at]
            assert float((rows - wanted).abs().max() / wanted.abs().max()) < bound
        assert at == 64
        runner.reset()
        first = runner.feed(tokens[:3])
        assert float((first - expected[2]).abs().max() / expected[2].abs().max()) < bound


def test_a_bare_file_tells_its_caches_and_takes_those_of_others(
    artifacts: Callable[[str], Artifact],
) -> None:
    artifact = artifacts("inputs")
    runner = ReferenceRunner(artifact.path, Execution(mode="fp32"))
    told = form_for(artifact.job, artifact.decoder.spec, 1, (2, 5)).description
    assert runner.description.methods == told.methods
    assert told.caches["cache_keys"] == "float16 [2, 2, 96, 8]"
    tokens = tokens_for(96, 20)
    expected = EagerRunner(artifact.decoder, "eager").logits(tokens)
    states = {
        name: buffer.clone()
        for name, buffer in (
            (f"{name}_{part}", buffer)
            for name, state in artifact.decoder.states.items()
            for part, buffer in state.named_buffers()
        )
    }
    runner.resume(12, states)
    rows = runner.step(tokens[12:20])
    torch.testing.assert_close(rows, expected[12:20], rtol=1e-4, atol=1e-4)
    with pytest.raises(ArtifactError, match="The caches are"):
        runner.resume(12, {**states, "cache_keys": torch.zeros(1)})


def test_functions_share_the_weights_and_are_the_same_bytes_twice(
    artifacts: Callable[[str], Artifact], tmp_path: Path
) -> None:
    artifact = artifacts("functions, windows")
    again = made("functions, windows", tmp_path / "again.pte")
    assert artifact.path.read_bytes() == again.path.read_bytes()
    container = pte.read(artifact.path)
    assert {"prefill", "decode"} < container.methods.keys()
    (model,) = container.named_data.values()
    assert weights_of(unpack(model)) < 1.2 * weights_of(files(artifacts("inputs").path))
    runner = opened(artifact, "declared")
    assert isinstance(runner, ReferenceRunner)
    assert {item.function_name for item in runner.programs} == {"prefill", "decode"}
    assert runner.description.method_for(1) == "decode"
    assert runner.description.method_for(5) == "prefill"


def weights_of(found: Mapping[str, memoryview]) -> int:
    return sum(len(data) for path, data in found.items() if path.endswith("weight.bin"))


def test_a_decoder_that_is_lent_its_caches_keeps_nothing(
    artifacts: Callable[[str], Artifact],
) -> None:
    decoder = artifacts("inputs").decoder
    decoder.reset()
    caches = [torch.zeros(state.shape) for state in state_specs(decoder.spec, decoder.extent)]
    tokens, given = torch.arange(32)[None], []
    with torch.no_grad():
        for at in range(0, 32, 8):
            part, start = tokens[:, at : at + 8], torch.tensor([at])
            logits, *after = decoder.carrying(part, start, None, caches)
            assert not any(torch.equal(*pair) for pair in zip(after, caches, strict=True))
            given, caches = [*given, logits], after
        assert not any(buffer.any() for buffer in decoder.states["cache"].buffers())
        for at, logits in zip(range(0, 32, 8), given, strict=True):
            torch.testing.assert_close(logits, decoder(tokens[:, at : at + 8], torch.tensor([at])))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"functions": FUNCTIONS, "kv_cache": "state"}, "a state is its method's own"),
        ({"functions": FUNCTIONS, "seq_lengths": (1, 8)}, "drop one of them"),
        ({"functions": FUNCTIONS, "seq_lengths": "1..8"}, "drop one of them"),
        ({"functions": FUNCTIONS, "backend": "xnnpack"}, "drop one of them"),
        ({"functions": "prefill:65,decode:1"}, "--functions holds 65, which is longer than the"),
    ],
)
def test_what_cannot_be_together(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        resolve(ExportConfig(context=64, **settings), small_spec())


@pytest.mark.parametrize(
    ("functions", "told"),
    [
        ("prefill", "is no list of names and lengths"),
        ("prefill:8,decode", "is no list of names and lengths"),
        ("Prefill:8,decode:1", "is no list of names and lengths"),
        ("prefill:8,decode:8", "different names and different lengths"),
        ("decode:8,decode:1", "different names and different lengths"),
        ("decode:1", "must be several"),
        ("use_kv_cache:512,decode:1", "constants that runners read"),
        ("prefill:512,decode:8", "one of them of length 1"),
    ],
)
def test_functions_that_cannot_be(functions: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ExportConfig(functions=functions)


EXPORTED: dict[str, dict[str, Any]] = {
    "multifunction": {"functions": FUNCTIONS},
    "range": {"seq_lengths": "1..8", "kv_cache": "inputs"},
    "static": {"seq_lengths": (8,)},
    "enumerated": {
        "seq_lengths": (1, 8),
        "kv_cache": "inputs",
        "minimum_os": "iOS16",
        "scheme": "int8-channel",
    },
    "twin": {"seq_lengths": "1..8", "kv_cache": "inputs", "backend": "xnnpack"},
}


@pytest.mark.parametrize("form", cases(EXPORTED, tuple(EXPORTED)[1:]))
def test_an_export_verifies_it_and_says_what_it_is(form: str, tmp_path: Path) -> None:
    model = llama(**SIZES)
    config = ExportConfig(context=64, **EXPORTED[form])
    bundle = export(model, output=tmp_path / "out", config=config, cache=False)
    told = bundle.manifest.program
    # A twin of a range takes every length, as a range does.
    assert told.form == ("range" if form == "twin" else form) and told.why is not None
    carried = form != "static"
    assert told.why.endswith("handed from call to call" if carried else "the program's state")
    assert bool(bundle.manifest.description.caches) == carried != bool(told.states)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert ("caches that each call takes" in card) == carried
    verification = bundle.manifest.verification
    assert verification.passed and verification.last_position == 63
    runner = open_runner(bundle)
    assert len(list(runner.generate(tokens_for(96, 11), max_new_tokens=3))) == 3
