"""The bundled model through the whole product: a real language model, real text, real figures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import llm_coreml
from cases import cases
from cpp_runner import built_once, made
from llm_coreml import ExportConfig
from llm_coreml.config import resolve
from llm_coreml.eval.heldout import cut, read_text
from llm_coreml.eval.quality import measure_quality
from llm_coreml.model import open_model
from llm_coreml.quantize import make_plan
from llm_coreml.quantize.quantized import build_decoder, build_original
from llm_coreml.recipes import bundled_model
from llm_coreml.runtime.eager import EagerRunner
from llm_coreml.runtime.runner import Runner
from llm_coreml.tokenizer import Tokenizer
from shared import Shared

TOKENS = 2048
PROMPT = "The with statement is used to"
NEW_TOKENS = 24


# The bundled model for the GPU, for the Neural Engine, and the GPU's twin for XNNPACK.
CONFIGS = {
    "int4-group": ExportConfig(bits=4, logits="all"),
    "codebook": ExportConfig(bits=4, target="ane", logits="all"),
    "twin": ExportConfig(bits=4, backend="xnnpack"),
}


@pytest.fixture(scope="module")
def bundles(shared: Shared) -> Callable[[str], Path]:
    """Return a function from a label in `CONFIGS` to its bundle."""

    def made(name: str) -> Path:
        config = CONFIGS[name]

        def export(folder: Path) -> None:
            llm_coreml.export("llama", output=folder, config=config)

        return shared.file("bundle", ["llama", config], export)

    return made


def windows() -> list[list[int]]:
    tokenizer = Tokenizer(bundled_model() / "tokenizer.json")
    return cut(tokenizer.encode(read_text(None)[1]), 1024, tokenizer.beginning, TOKENS)


# What is particular to the Neural Engine, programs of random models show as well.
@pytest.mark.parametrize("scheme", cases(["int4-group", "codebook"], {"codebook"}))
def test_artifact_keeps_the_perplexity_of_its_quantized_model(
    bundles: Callable[[str], Path], scheme: str, tmp_path: Path
) -> None:
    own = shutil.copytree(bundles(scheme), tmp_path / "own")
    result = llm_coreml.evaluate(own, tokens=TOKENS)
    quantized, artifact = result.quality("quantized"), result.quality("artifact")
    assert result.tokens == TOKENS
    assert artifact.runtime == "reference runtime"
    assert artifact.perplexity == pytest.approx(quantized.perplexity, rel=0.005)
    assert artifact.mean_kl == pytest.approx(quantized.mean_kl, rel=0.05)
    assert artifact.top1_agreement is not None and artifact.top1_agreement > 0.8


def test_bundled_model_beats_a_trigram_model_and_loses_by_bits() -> None:
    facts = json.loads((bundled_model() / "training.json").read_text())
    model = open_model("llama")
    runners: dict[str, Runner] = {"original": EagerRunner(build_original(model, 1024), "eager")}
    for bits in (4, 3, 2):
        config = ExportConfig(bits=bits, scheme="codebook", context=1024)
        job = resolve(config, model.spec)
        decoder = build_decoder(model, job, make_plan(job, model.spec))
        runners[f"{bits} bits"] = EagerRunner(decoder, "eager")
    rows = {row.name: row for row in measure_quality(runners, windows())}
    assert rows["original"].perplexity < 0.75 * facts["trigram_heldout_perplexity"]
    divergences = [rows[f"{bits} bits"].mean_kl or 0.0 for bits in (4, 3, 2)]
    assert divergences[0] > 1e-3
    assert divergences[1] > 2 * divergences[0]
    assert divergences[2] > 2 * divergences[1]
    assert rows["2 bits"].perplexity > 1.05 * rows["original"].perplexity


def test_stock_runner_of_executorch_generates_the_same_text(
    bundles: Callable[[str], Path],
) -> None:
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    pieces: list[str] = []
    twin = bundles("twin")
    runner = TextLLMRunner(str(twin / "model.pte"), str(twin / "tokenizer.json"))
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, temperature=0.0, echo=False, num_bos=1)
    runner.generate(PROMPT, config, token_callback=pieces.append)
    text = "".join(pieces)
    assert text.strip()
    assert text == llm_coreml.load(twin).generate(PROMPT, NEW_TOKENS)
    assert text == llm_coreml.load(bundles("int4-group")).generate(PROMPT, NEW_TOKENS)


def test_the_runner_in_cpp_generates_the_same_tokens(
    bundles: Callable[[str], Path], shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = built_once(shared, monkeypatch)
    loaded = [llm_coreml.load(bundles(name)) for name in ("twin", "int4-group")]
    # Chunks of every length of the program, and of single tokens.
    prompt = loaded[0].encode(read_text(None)[1])[:600]
    for tokens in (prompt, loaded[0].encode(PROMPT)):
        ids = made(runner, bundles("twin"), tokens, "--max-new-tokens", NEW_TOKENS)["ids"]
        assert len(ids) == NEW_TOKENS
        for model in loaded:
            assert ids == list(model.runner.generate(tokens, NEW_TOKENS)), model.runner.label
