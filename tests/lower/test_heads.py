"""Programs that give the likeliest tokens with their logits, from the graph to who reads them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_coreml
from artifacts import Artifact, lower, program
from cases import cases
from exported import make_model, save_model
from llm_coreml.config import ExportConfig
from llm_coreml.errors import ArtifactError, ConfigError, VerificationError
from llm_coreml.heads import Head
from llm_coreml.lower.forms import form_for
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.chosen import spread
from llm_coreml.runtime.eager import EagerRunner
from llm_coreml.runtime.reference import ReferenceRunner
from llm_coreml.runtime.sampling import Sampler, Sampling
from llm_coreml.verify.logits import verify
from tiny import expected_logits, llama, tokens_for

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": 2048,
}
CASES: dict[str, dict[str, Any]] = {
    "topk": {"head": "topk:5", "seq_lengths": (1, 8)},
    "argmax, every row": {"head": "argmax", "seq_lengths": (1, 8), "logits": "all"},
    "topk, caches": {"head": "topk:5", "seq_lengths": (1, 8), "kv_cache": "inputs"},
    "topk, functions": {"head": "topk:5", "functions": "prefill:8,decode:1"},
    "topk, one length, every row": {"head": "topk:5", "seq_lengths": (8,), "logits": "all"},
}
FURTHER = ("topk, caches", "topk, functions", "topk, one length, every row")
# Only the order of fp32 sums differs without rounding.
BOUND = 2e-5
UNROUNDED = Execution(mode="fp32")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Artifact]:
    folder = tmp_path_factory.mktemp("heads")

    @functools.cache
    def make(name: str) -> Artifact:
        return lower(
            llama(**SIZES), ExportConfig(context=64, **CASES[name]), folder / f"{name}.pte"
        )

    return make


def opened(artifact: Artifact, execution: Execution = UNROUNDED) -> ReferenceRunner:
    form = form_for(artifact.job, artifact.decoder.spec, 1, (2, 5))
    return ReferenceRunner(artifact.path, execution, form.description)


@pytest.mark.parametrize("name", cases(CASES, FURTHER))
def test_the_likeliest_tokens_are_the_model_s(name: str, made: Callable[[str], Artifact]) -> None:
    artifact = made(name)
    runner, tokens = opened(artifact), tokens_for(96, 64)
    assert str(runner.head) == CASES[name]["head"] and runner.vocab_size == 96
    expected = EagerRunner(artifact.decoder, "eager").logits(tokens)
    runner.reset()
    rows = torch.cat([runner.step(tokens[at : at + 8]) for at in range(0, 64, 8)])
    wanted = expected if runner.every_row else expected[7::8]
    count = runner.head.count or 0
    assert rows.shape == wanted.shape and bool(((rows > -torch.inf).sum(-1) == count).all())
    given, best = rows.topk(count), wanted.topk(count)
    assert torch.equal(given.indices, best.indices)
    assert float((given.values - best.values).abs().max() / wanted.abs().max()) < BOUND


def test_a_quantized_program_gives_the_tokens_of_transformers(
    made: Callable[[str], Artifact], tmp_path: Path
) -> None:
    """Unquantized in fp32, so that `transformers` itself is the judge."""
    model, tokens = llama(**SIZES), tokens_for(96, 24)
    config = ExportConfig(
        context=32, seq_lengths=(1, 8), head="topk:3", scheme="none", compute_precision="fp32"
    )
    runner = lower(model, config, tmp_path / "model.pte").runner()
    wanted = expected_logits(model, tokens)
    for position, token in enumerate(tokens):
        (row,) = runner.step([token])
        assert torch.equal(row.topk(3).indices, wanted[position].topk(3).indices)


def test_a_file_alone_tells_its_head(made: Callable[[str], Artifact]) -> None:
    for name in ("topk", "argmax, every row"):
        assert str(ReferenceRunner(made(name).path).head) == CASES[name]["head"]
    kinds = [op.type for op in program(made("topk").path).operations]
    assert kinds.count("topk") == 1 and "reduce_argmax" not in kinds


def test_generation_draws_among_what_is_given(made: Callable[[str], Artifact]) -> None:
    artifact = made("topk")
    runner, eager = opened(artifact), EagerRunner(artifact.decoder, "eager")
    prompt = tokens_for(96, 5)
    assert list(runner.generate(prompt, 12)) == list(eager.generate(prompt, 12))
    sampler = Sampler(Sampling(temperature=5.0, seed=3))
    drawn = list(runner.generate(prompt, 20, sampler=sampler))
    expected = eager.logits([*prompt, *drawn])[len(prompt) - 1 : -1]
    assert all(token in row.topk(5).indices for token, row in zip(drawn, expected, strict=True))
    # Not the greedy ones all the time.
    assert any(token != int(row.argmax()) for token, row in zip(drawn, expected, strict=True))


def test_what_needs_every_logit_says_so(made: Callable[[str], Artifact]) -> None:
    runner = opened(made("topk"))
    with pytest.raises(ConfigError, match=r"--head topk:5 and gives 5 of 96 .* --head logits"):
        runner.logits([1, 2, 3])
    single = opened(made("argmax, every row"))
    with pytest.raises(ConfigError, match=r"none can be drawn; leave the temperature at 0"):
        list(single.generate([1], 2, sampler=Sampler(Sampling(temperature=1.0))))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"head": "top"}, "--head is 'top'; give logits, topk:K"),
        ({"head": "topk:0"}, "give logits, topk:K"),
        ({"head": "topk:5", "backend": "xnnpack"}, "drop one of them"),
    ],
)
def test_heads_that_cannot_be(settings: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        lower(llama(**SIZES), ExportConfig(context=64, **settings), tmp_path / "x.pte")
    with pytest.raises(ConfigError, match="asks for 96 tokens of a vocabulary of 96"):
        lower(llama(**SIZES), ExportConfig(context=64, head="topk:96"), tmp_path / "x.pte")


def test_rows_that_a_damaged_program_gives() -> None:
    values, ids = torch.tensor([[[3.0, 1.0]]]), torch.tensor([[[4, 0]]], dtype=torch.int32)
    inf = torch.inf
    assert spread(values, ids, 5).tolist() == [[[1.0, -inf, -inf, -inf, 3.0]]]
    for wrong in ([[[4, 5]]], [[[-1, 0]]], [[[2, 2]]]):
        with pytest.raises(ArtifactError, match="not different ones below 5"):
            spread(values, torch.tensor(wrong, dtype=torch.int32), 5)
    with pytest.raises(ConfigError, match="give logits"):
        Head.of("topk:")


def test_a_bundle_is_verified_generates_and_refuses_perplexity(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", make_model())
    config = ExportConfig(context=32, seq_lengths=(1, 8), head="topk:4")
    bundle = llm_coreml.export(source, output=tmp_path / "out", config=config, cache=False)
    told = json.loads((tmp_path / "out/manifest.json").read_text())["program"]
    assert told["head"] == "topk:4" and told["output"] == "float32 [1, 1, 4]"
    assert bundle.manifest.description.head == Head("topk", 4)
    assert bundle.manifest.verification.passed
    model = llm_coreml.load(tmp_path / "out")
    assert model.runner.head.count == 4
    model.generate("a", max_new_tokens=3)
    with pytest.raises(ConfigError, match="needs all of them"):
        llm_coreml.evaluate(tmp_path / "out", model=source)


def test_verification_notices_another_token_and_another_value(
    made: Callable[[str], Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm_coreml.runtime import reference
    from llm_coreml.verify.passes import plan_passes
    from llm_coreml.verify.reading import read_text

    artifact = made("topk")
    plan = plan_passes((1, 8), 64)
    tokens = tokens_for(96, plan.tokens)
    shape = {"every_row": False, "natural": True, "in_fp16": True}
    reading = read_text(artifact.decoder, tokens, "random tokens", plan, **shape)
    assert verify(opened(artifact, Execution()), reading).passed

    def broken(change: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        monkeypatch.setattr(reference, "spread", lambda v, i, n: spread(*change(v, i), n))
        with pytest.raises(VerificationError, match="after position"):
            verify(opened(artifact, Execution()), reading)

    broken(lambda values, ids: (values * 1.2, ids))
    broken(lambda values, ids: (values, ids.flip(-1)))
    # Four right ones and one that is not among the likeliest, with the value of its own row.
    broken(lambda values, ids: (values, torch.where(ids == ids[..., :1], (ids + 1) % 96, ids)))
