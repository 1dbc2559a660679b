"""The Python API: names, live models, loading, measuring."""

from __future__ import annotations

import json
import math
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_coreml
from exported import TEXT, make_model, make_tokenizer, manifest_of, write_manifest
from llm_coreml import Evaluation, ExportConfig, LanguageModel, LlmCoreMLError, Sampling, pipeline
from llm_coreml.errors import ArtifactError, CheckpointError, ConfigError
from llm_coreml.eval.heldout import cut
from llm_coreml.tokenizer import Tokenizer
from tiny import expected_logits

SETTINGS = ExportConfig(context=64, seq_lengths=(1, 8))


# Names


def test_public_names() -> None:
    assert llm_coreml.__all__ == sorted(llm_coreml.__all__) == dir(llm_coreml)
    for name in llm_coreml.__all__:
        found = getattr(llm_coreml, name)
        # What `from llm_coreml import name` gives is the one of its home.
        assert found.__name__ == name and found.__doc__
    with pytest.raises(AttributeError, match="'llm_coreml' has no attribute 'exprt'"):
        _ = llm_coreml.exprt


def test_import_loads_nothing_heavy() -> None:
    script = (
        "import llm_coreml, sys; dir(llm_coreml); llm_coreml.LlmCoreMLError;"
        "llm_coreml.ExportConfig(bits=4);"
        "print(*{'torch', 'coremltools', 'transformers', 'executorch'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


def test_no_module_has_the_name_of_a_function() -> None:
    """Importing such a module would put it in the function's place."""
    modules = {module.name for module in pkgutil.iter_modules(llm_coreml.__path__)}
    assert not modules & set(llm_coreml.__all__)
    # Twice: the first use imports the homes.
    for _ in range(2):
        for name in ("evaluate", "export", "load"):
            assert callable(getattr(llm_coreml, name))


def test_an_argument_wins_over_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: org/name\nweights: {size: 600MB}\nprogram: {context: 64}\n")

    def refuse(*_: object, accept: Any, **__: Any) -> None:
        raise CheckpointError(f"asked for {accept.__self__.config.flags()}")

    monkeypatch.setattr(pipeline, "open_model", refuse)
    with pytest.raises(CheckpointError, match=r"asked for .'--bits', '3', '--context', '64'.$"):
        llm_coreml.export(str(recipe), output=tmp_path / "out", bits=3)


# A live model


@pytest.fixture(scope="module")
def live_bundle(tmp_path_factory: pytest.TempPathFactory, live_model: Any) -> Path:
    """The tiny model exported from memory, in training mode as a fine-tuning script holds it."""
    folder = tmp_path_factory.mktemp("live") / "out"
    before = {name: value.clone() for name, value in live_model.state_dict().items()}
    config = json.loads(json.dumps(live_model.config.to_dict()))
    live_model.train()
    try:
        made = llm_coreml.export(
            live_model, make_tokenizer(), bits=4, output=folder, config=SETTINGS
        )
        assert live_model.training and all(part.training for part in live_model.modules())
    finally:
        live_model.eval()
    after = live_model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert all(value.requires_grad for value in live_model.parameters())
    assert json.loads(json.dumps(live_model.config.to_dict())) == config
    assert made.folder == folder and made.manifest.to_json() == manifest_of(folder)
    return folder


def test_live_model_gives_the_bytes_of_the_folder(live_bundle: Path, bundle: Path) -> None:
    assert (live_bundle / "model.pte").read_bytes() == (bundle / "model.pte").read_bytes()
    live, folder = manifest_of(live_bundle), manifest_of(bundle)
    assert live["source"]["kind"] == "live"
    assert live["source"]["sha256"] == folder["source"]["sha256"]
    for part in ("program", "quantization", "target", "verification", "spec"):
        assert live[part] == folder[part]
    text = "The quick brown fox"
    first, second = (Tokenizer(path / "tokenizer.json") for path in (live_bundle, bundle))
    assert first.prompt(text) == second.prompt(text)


# load


@pytest.fixture
def model(bundle: Path) -> LanguageModel:
    return llm_coreml.load(bundle)


def test_load_takes_strings_and_the_program_alone(bundle: Path, model: LanguageModel) -> None:
    assert llm_coreml.load(str(bundle)).manifest == model.manifest
    assert model.manifest.to_json() == manifest_of(bundle)


def test_logits_are_near_the_model_that_was_exported(model: LanguageModel, live_model: Any) -> None:
    tokens = model.encode(TEXT)[:64]
    found, expected = model.logits(tokens), expected_logits(live_model, tokens)
    assert found.shape == expected.shape == (64, 300) and found.dtype == torch.float32
    # Against the quantized model the bound is the verification's; 4 bits themselves cost more.
    error = float((found - expected).norm() / expected.norm())
    assert 1e-3 < error < 0.4


def test_unquantized_logits_are_within_the_bound_of_the_verification(
    tmp_path: Path, live_model: Any
) -> None:
    settings = ExportConfig(
        context=64, seq_lengths=(1, 8), scheme="none", embedding="none", logits="all"
    )
    made = llm_coreml.export(live_model, make_tokenizer(), output=tmp_path / "out", config=settings)
    model = llm_coreml.load(made.folder)
    tokens = model.encode(TEXT)[:64]
    found, expected = model.logits(tokens), expected_logits(live_model, tokens)
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error <= made.manifest.verification.max_relative_error_bound


def test_encode_begins_with_the_beginning_token(model: LanguageModel) -> None:
    tokens = model.encode("The")
    assert tokens[0] == 0 and model.tokenizer.decode(tokens) == "The"


def test_generate_streams_what_it_returns(model: LanguageModel) -> None:
    whole = model.generate("The quick", 16)
    assert model.generate("The quick", 16) == whole
    assert "".join(model.stream("The quick", 16)) == whole
    assert whole.startswith(model.generate("The quick", 4))


def test_sampling_draws_by_its_seed(model: LanguageModel) -> None:
    first, again, other = (
        model.generate("The quick", 16, sampling=Sampling(temperature=1.5, seed=seed))
        for seed in (1, 1, 2)
    )
    assert first == again != other
    streamed = model.stream("The quick", 16, sampling=Sampling(temperature=1.5, seed=1))
    assert "".join(streamed) == first


def test_generate_is_the_argmax_of_the_logits(model: LanguageModel) -> None:
    tokens = model.encode("The quick")
    made = list(model.runner.generate(tokens, 6))
    for token in made:
        assert token == int(model.logits(tokens)[-1].argmax())
        tokens.append(token)


def test_reset_empties_the_cache(model: LanguageModel) -> None:
    first = model.runner.step([5])
    model.runner.step([6])
    model.reset()
    assert model.runner.position == 0 and torch.equal(model.runner.step([5]), first)


def test_prompt_longer_than_the_context(model: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="64 positions"):
        model.generate(TEXT * 2)


@pytest.mark.parametrize("token", [-1, 300])
def test_token_outside_the_vocabulary(model: LanguageModel, token: int) -> None:
    with pytest.raises(ConfigError, match=rf"Token {token} is outside the vocabulary of 300"):
        model.logits([1, token])


@pytest.fixture
def own_bundle(bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(bundle, tmp_path / "own"))


def test_without_a_tokenizer_tokens_still_work(own_bundle: Path) -> None:
    manifest = manifest_of(own_bundle)
    for name in list(manifest["files"]):
        if name != "README.md":
            (own_bundle / name).unlink()
            manifest["files"].pop(name)
    write_manifest(own_bundle, manifest)
    model = llm_coreml.load(own_bundle)
    assert model.logits([1, 2]).shape == (2, 300)
    for call in (model.generate, model.encode):
        with pytest.raises(ArtifactError, match="exported without a tokenizer"):
            call("The")
    with pytest.raises(ArtifactError, match="exported without a tokenizer"):
        llm_coreml.evaluate(own_bundle)


def test_errors_have_one_base(tmp_path: Path) -> None:
    with pytest.raises(LlmCoreMLError):
        llm_coreml.load(tmp_path / "gone")
    with pytest.raises(LlmCoreMLError):
        llm_coreml.export("gone", output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# evaluate

TOKENS = 90


@pytest.fixture(scope="module")
def evaluation(
    bundle: Path, checkpoint: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Evaluation:
    own = shutil.copytree(bundle, tmp_path_factory.mktemp("evaluated") / "own")
    result = llm_coreml.evaluate(own, model=checkpoint, text=text_file, tokens=TOKENS)
    assert json.loads(json.dumps(result.to_json())) == json.loads(
        (own / "results.json").read_text()
    )
    return result


def test_original_has_the_perplexity_that_transformers_computes(
    evaluation: Evaluation, bundle: Path, live_model: Any
) -> None:
    tokenizer = Tokenizer(bundle / "tokenizer.json")
    windows = cut(tokenizer.encode(TEXT), 64, tokenizer.beginning, TOKENS)
    costs: list[torch.Tensor] = []
    for window in windows:
        logs = expected_logits(live_model, window[:-1]).double().log_softmax(-1)
        costs += [-logs[row, target] for row, target in enumerate(window[1:])]
    assert len(costs) == evaluation.tokens == TOKENS
    perplexity = math.exp(float(torch.stack(costs).mean()))
    assert evaluation.quality("original").perplexity == pytest.approx(perplexity, rel=1e-4)


def test_artifact_is_as_good_as_its_quantized_model(evaluation: Evaluation) -> None:
    original, quantized, artifact = evaluation.qualities
    assert artifact is evaluation.artifact is evaluation.quality("artifact")
    assert artifact.perplexity == pytest.approx(quantized.perplexity, rel=5e-3)
    assert original.mean_kl is original.p99_kl is original.top1_agreement is None
    assert quantized.mean_kl is not None and quantized.mean_kl > 0
    assert artifact.mean_kl == pytest.approx(quantized.mean_kl, rel=0.05)
    assert (original.runtime, artifact.runtime) == ("PyTorch eager fp32", "reference runtime")
    with pytest.raises(KeyError):
        evaluation.quality("other")


def test_evaluation_of_a_live_export(
    live_bundle: Path, live_model: Any, text_file: Path, evaluation: Evaluation
) -> None:
    with pytest.raises(CheckpointError, match=r"a model in memory; give the same model.*model="):
        llm_coreml.evaluate(live_bundle, text=text_file)
    assert not (live_bundle / "results.json").exists()
    result = llm_coreml.evaluate(live_bundle, model=live_model, text=text_file, tokens=TOKENS)
    assert result.qualities == evaluation.qualities


def test_another_model_is_refused(live_bundle: Path, text_file: Path) -> None:
    with pytest.raises(CheckpointError, match="holds other weights than were exported"):
        llm_coreml.evaluate(live_bundle, model=make_model().half(), text=text_file)


def test_artifact_only(live_bundle: Path, text_file: Path, evaluation: Evaluation) -> None:
    result = llm_coreml.evaluate(live_bundle, text=text_file, tokens=TOKENS, artifact_only=True)
    (artifact,) = result.qualities
    assert artifact.perplexity == evaluation.artifact.perplexity and artifact.mean_kl is None
