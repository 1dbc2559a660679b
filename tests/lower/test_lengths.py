"""Programs of several lengths, of one, and of a range of them give the same logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifacts import Artifact, lower
from cases import cases
from llm_coreml.artifact.mil import Feature
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.config.job import resolve_shapes
from llm_coreml.errors import ConfigError, UnsupportedError
from llm_coreml.lower.forms import form_for
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.eager import EagerRunner
from llm_coreml.runtime.reference import ReferenceRunner
from llm_coreml.runtime.runner import split_lengths
from llm_coreml.targets import TARGETS
from tiny import llama, mistral, small_spec, tokens_for

# Only the order of fp32 sums differs without rounding.
BOUND = 2e-5
CASES: dict[str, dict[str, Any]] = {
    "range": {"seq_lengths": "1..11", "logits": "all"},
    "one": {"seq_lengths": (5,), "logits": "all"},
    "range, windows": {"seq_lengths": "1..9", "window": 7},
    "one, windows": {"seq_lengths": (6,), "window": 7, "target": "ane"},
    "twin of a range": {"seq_lengths": "1..11", "backend": "xnnpack"},
}
FURTHER = ("range, windows", "one, windows", "twin of a range")
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": 2048,
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
    folder = tmp_path_factory.mktemp("lengths")
    return functools.cache(lambda name: made(name, folder / f"{name}.pte"))


@pytest.mark.parametrize("name", cases(CASES, FURTHER))
def test_every_number_of_tokens_gives_the_model_s_logits(
    name: str, artifacts: Callable[[str], Artifact]
) -> None:
    artifact = artifacts(name)
    runner = opened(artifact)
    longest, every_row = artifact.shapes.longest, runner.every_row
    tokens = tokens_for(96, 64)
    expected = EagerRunner(artifact.decoder, "eager").logits(tokens)
    for count in sorted({1, 2, longest // 2 + 1, longest}):
        # From the first position, and with the last one of the context behind it.
        for start in (0, 64 - 2 * count):
            runner.reset()
            runner.feed(tokens[:start] or tokens[:1])
            runner.rewind(start)
            for first in range(start, 64 if start else count, count):
                rows = runner.step(tokens[first : first + count])
                wanted = expected[first : first + count][-len(rows) :]
                assert len(rows) == (count if every_row else 1)
                assert float((rows - wanted).abs().max() / wanted.abs().max()) < BOUND


def test_a_range_and_one_length_say_so(artifacts: Callable[[str], Artifact]) -> None:
    """In the Core ML program, in the file's constant methods, and to who reads the file alone."""
    ranged = ReferenceRunner(artifacts("range").path)
    assert (ranged.description.form, ranged.seq_lengths) == ("range", (1, 11))
    assert ranged.description.lengths == "1 to 11" and ranged.description.method_for(7) == "forward"
    assert shapes_of(ranged)["tokens"].ranges == ((1, 1), (1, 11))
    one = ReferenceRunner(artifacts("one").path)
    assert (one.description.form, one.seq_lengths) == ("static", (5,))
    assert shapes_of(one)["tokens"].shape == (1, 5) and not shapes_of(one)["tokens"].ranges
    for runner in (ranged, one):
        assert runner.description.constant_methods["enable_dynamic_shape"] is True
    # Pads of a call at the end of the context need room, and here nothing is padded.
    assert one.description.states["cache_keys"] == "float16 [2, 2, 96, 8]"
    assert ranged.description.states["cache_keys"] == "float16 [2, 2, 64, 8]"


def shapes_of(runner: ReferenceRunner) -> dict[str, Feature]:
    return {feature.name: feature for feature in runner.program.inputs}


def test_what_is_left_of_a_prompt_is_one_call_where_it_can_be() -> None:
    assert split_lengths(77, (1, 8, 64)) == [64, 8, 1, 1, 1, 1, 1]
    assert split_lengths(77, (1, 64), ranged=True) == [64, 13]
    assert split_lengths(77, (64,)) == [64, 13]
    assert split_lengths(64, (64,)) == [64]


@pytest.mark.parametrize(
    ("lengths", "told"),
    [
        ("2..8", "--seq-lengths 2..8 must be a range from 1"),
        ("1..1", "must be a range from 1, for single tokens, to more"),
        ("8..1", "must be a range"),
        ("1..9999999999", "must be a range"),
        ("1..", "is no list of numbers such as 1,8,64, and no range such as 1..512"),
        ("1,2..8", "is no list of numbers"),
        ((8, 64), "lacks 1"),
        ((0,), "must be different numbers of at least 1"),
    ],
)
def test_lengths_that_cannot_be(lengths: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ExportConfig(seq_lengths=lengths)


def test_a_range_is_kept_as_it_was_given() -> None:
    config = ExportConfig(context=64, seq_lengths=" 1..011 ".strip())
    assert config.seq_lengths == "1..11" and config.flags() == [
        *("--context", "64", "--seq-lengths", "1..11")
    ]
    assert ExportConfig.from_json(config.to_json()) == config
    assert ExportConfig(seq_lengths="1,8").seq_lengths == (1, 8)
    shapes = resolve(config, small_spec()).shapes
    assert (shapes.seq_lengths, shapes.ranged, shapes.spare) == ((1, 11), True, 0)


def test_a_runner_may_pad_to_the_longest_of_methods_that_stand_apart() -> None:
    def spare(**lengths: Any) -> int:
        return resolve_shapes(ExportConfig(context=512, **lengths), 512).spare

    assert spare(seq_lengths=(1, 64, 512)) == 448, "a method pads to the next length itself"
    assert spare(functions="a:512,b:64,c:1") == 512
    assert spare(functions="a:512,c:1") == spare(seq_lengths=(1, 512)) == 512


def test_lengths_over_the_context_are_refused() -> None:
    for lengths in ("1..65", (65,)):
        config = ExportConfig(context=64, seq_lengths=lengths)
        with pytest.raises(ConfigError, match="holds 65, which is longer than the context of 64"):
            resolve(config, small_spec())


@pytest.mark.parametrize("target", TARGETS)
def test_a_range_never_goes_to_the_neural_engine(target: str) -> None:
    config = ExportConfig(context=64, seq_lengths="1..8", target=target)
    if target != "ane":
        assert resolve(config, small_spec()).shapes.ranged
        return
    with pytest.raises(UnsupportedError, match=r"1\.\.8 is a range.* --force"):
        resolve(config, small_spec())
    assert resolve(config.under({"force": True}), small_spec()).shapes.ranged


def opened(artifact: Artifact) -> Any:
    from llm_coreml.lower.forms import form_for
    from llm_coreml.runtime.program_runner import program_runner

    job = artifact.job
    description = form_for(job, artifact.decoder.spec, bos_id=1, eos_ids=(2, 5)).description
    return program_runner(artifact.path, description, Execution(mode="fp32"))


def test_a_twin_of_a_range_is_one_too() -> None:
    config = ExportConfig(context=32, seq_lengths="1..8", backend="xnnpack")
    spec = small_spec()
    described = form_for(resolve(config, spec), spec, None, ()).description
    assert described.ranged and described.lengths == "1 to 8"
