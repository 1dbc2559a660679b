"""Every command, as a user and as a script sees it: streams, tables, JSON, exit codes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import pytest

from exported import (
    CHATTER,
    SHAPES,
    Run,
    command,
    files_of,
    in_process,
    make_model,
    manifest_of,
    run,
    save_model,
    write_manifest,
)
from llm_coreml import pipeline
from llm_coreml.cli import eval as eval_flags
from llm_coreml.cli.main import cli
from llm_coreml.config import ExportConfig
from llm_coreml.eval import runtimes
from llm_coreml.quantize.formats.schemes import SCHEMES
from llm_coreml.recipes import recipe_names
from llm_coreml.targets import TARGETS

COMMANDS = (
    *("apply", "compare", "dashboard", "delta", "diff", "eval", "export", "extract", "generate"),
    *("inspect", "lm-eval", "ls", "push", "report", "run", "show", "sweep", "track"),
)
STAGES = (
    "opening the checkpoint ...",
    "reading and quantizing weights ...",
    "reading a text with the quantized model ...",
    "lowering to an ExecuTorch program ...",
    "verifying the artifact ...",
)
HEAVY = ("torch", "coremltools", "transformers", "executorch", "rich", "tokenizers", "yaml")


# Help


def test_the_commands_are_these() -> None:
    assert tuple(sorted(cli.commands)) == COMMANDS
    assert eval_flags.RUNTIMES == runtimes.RUNTIMES  # two lists, since one brings torch


@pytest.mark.parametrize("words", [(), *((name,) for name in COMMANDS)], ids=" ".join)
def test_help_imports_nothing_heavy(words: tuple[str, ...]) -> None:
    script = f"""
import sys
sys.argv = ["llm-coreml", *{words!r}, "--help"]
from llm_coreml.cli.main import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
print("LOADED", *sorted(set({HEAVY!r}) & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("Usage: llm-coreml")
    assert done.stdout.splitlines()[-1] == "LOADED"


@pytest.mark.parametrize("command", ["ls", "show"])
def test_a_look_runs_no_model_library(command: str, bundle: Path) -> None:
    words = [command] if command == "ls" else [command, str(bundle)]
    script = f"""
import sys, time
sys.argv = ["llm-coreml", *{words!r}]
from llm_coreml.cli.main import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
heavy = {{"torch", "coremltools", "transformers", "executorch", "torchao", "tokenizers"}}
print("LOADED", *sorted(heavy & sys.modules.keys()))
print("SECONDS", time.process_time())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    *_, loaded, seconds = done.stdout.splitlines()
    assert loaded == "LOADED"
    # It takes a fifth of that.
    assert float(seconds.removeprefix("SECONDS ")) < 1.5


def options_of(name: str) -> list[click.Option]:
    return [option for option in cli.commands[name].params if isinstance(option, click.Option)]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    assert cli.commands[name].help
    for option in options_of(name):
        assert option.help or isinstance(option.type, click.Choice), option.name
        assert all(flag == flag.lower() and "_" not in flag for flag in option.opts)


def test_export_has_an_option_for_every_setting_with_the_same_default() -> None:
    options = {str(option.name): option for option in options_of("export")}
    # Nothing required, so that what a bare command is given are the defaults.
    context = cli.commands["export"].make_context("export", [])
    defaults = asdict(ExportConfig())
    assert len(defaults) > 20
    for name, value in defaults.items():
        assert name in options and context.params[name] == value, name


def test_exit_codes_of_the_help_page_are_those_of_the_errors() -> None:
    import llm_coreml.errors as errors

    text = " ".join(str(cli.help).split("Exit codes:")[1].split())
    told = {int(code) for code in re.findall(r"\b\d+\b", text)}
    kinds = [kind for kind in vars(errors).values() if hasattr(kind, "exit_code")]
    assert told == {0, 129, 130, 143} | {kind.exit_code for kind in kinds}


def test_version(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    done = in_process(capfd, monkeypatch, "--version")
    assert done.code == 0 and re.search(r"version \d+\.\d+", done.out) and done.err == ""


# ls


def test_ls(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    as_json = in_process(capfd, monkeypatch, "ls", "--format", "json")
    lists = json.loads(as_json.out)
    assert as_json.code == 0 and as_json.err == ""
    assert list(lists) == ["recipes", "schemes", "targets"]
    assert list(lists["recipes"]) == recipe_names()
    assert lists["targets"].keys() == TARGETS.keys() and lists["schemes"].keys() == SCHEMES.keys()
    for_people = in_process(capfd, monkeypatch, "ls")
    assert for_people.code == 0 and for_people.err == ""
    for title, rows in lists.items():
        assert re.search(rf"^{title}\s*$", for_people.out, re.M)
        for name, meaning in rows.items():
            assert re.search(rf"^{re.escape(name)}  +{re.escape(meaning)}", for_people.out, re.M)


# export


def test_export_tells_json_on_stdout_and_stages_on_stderr(export_run: tuple[Run, Path]) -> None:
    done, bundle = export_run
    told = json.loads(done.out)
    peak = told.pop("peak_memory_bytes")
    assert told == manifest_of(bundle)
    assert 2e8 < peak < 2e9, "torch and coremltools, and hardly a model"
    lines = [line for line in done.err.splitlines() if line]
    assert len(lines) == len(STAGES)
    for stage, line in zip(STAGES, lines, strict=True):
        assert re.fullmatch(re.escape(stage) + r" \d+\.\d s", line)
    assert files_of(bundle.parent) == {"bundle"} | {
        f"bundle/{name}"
        for name in (
            "README.md",
            "generation_config.json",
            "manifest.json",
            "model.pte",
            "tokenizer.json",
            "tokenizer_config.json",
        )
    }


def test_export_hides_the_libraries_unless_asked(
    export_run: tuple[Run, Path], checkpoint: Path, tmp_path: Path
) -> None:
    quiet, bundle = export_run
    words = (checkpoint, "-o", tmp_path / "out", *SHAPES, "--bits", "4", "--format", "json")
    loud = run("export", *words, "--verbose")
    assert loud.code == 0, loud.err
    # One and the same manifest, and nothing else, on stdout; the program is the same bytes.
    assert [json.loads(done.out) | {"peak_memory_bytes": 0} for done in (loud, quiet)] == [
        manifest_of(bundle) | {"peak_memory_bytes": 0}
    ] * 2
    assert (tmp_path / "out/model.pte").read_bytes() == (bundle / "model.pte").read_bytes()
    for known in CHATTER:
        assert known not in quiet.err + quiet.out, known
        assert known in loud.err and known not in loud.out, known
    for stage in STAGES:
        assert stage in loud.err


class FakeExport:
    """Stands in for the slow call, and remembers what it was given."""

    def __init__(self, bundle: Path) -> None:
        self.bundle = bundle
        self.given: dict[str, Any] = {}

    def __call__(self, model: str, **given: Any) -> Any:
        from llm_coreml.bundle.folder import open_bundle

        given["progress"].stage("open")
        self.given = {"model": model, **given}
        return open_bundle(self.bundle)


@pytest.fixture
def fake_export(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> FakeExport:
    fake = FakeExport(bundle)
    monkeypatch.setattr(pipeline, "export", fake)
    return fake


def test_export_table(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    bundle: Path,
    fake_export: FakeExport,
) -> None:
    done = in_process(capfd, monkeypatch, "export", "org/model", "-o", "there")
    assert done.code == 0 and done.err.startswith("opening the checkpoint ... ")
    manifest = manifest_of(bundle)
    checked = manifest["verification"]
    rows: dict[str, str] = dict(re.findall(r"^(.+?)  +(.+)$", done.out, re.M))
    assert rows["program"].strip() == f"there/model.pte, {manifest['program']['bytes']:,} bytes"
    assert rows["lengths, context"].strip() == "1, 8; 64"
    assert re.fullmatch(r"[\d,]+ MB resident, mapped files included", rows["peak memory"].strip())
    assert rows["verified by"].startswith(f"reference runtime: {checked['rows']} rows, largest")
    for figure, bound in (("max_relative_error", "max_relative_error_bound"),
                          ("mean_kl", "mean_kl_bound")):  # fmt: skip
        assert f"{checked[figure]:.1e} (bound {checked[bound]:.0e})" in rows["verified by"]
    conversion = checked["conversion"]
    assert rows["the same model"].startswith(f"{conversion['weights']} weights and tables bit by")
    assert f"largest error {conversion['max_relative_error']:.1e} (bound" in rows["the same model"]


@pytest.mark.parametrize(
    ("words", "model", "output"),
    [
        (("llama",), "llama", "llama-coreml"),
        (("org/name",), "org/name", "name-coreml"),
        (("some/folder/",), "some/folder/", "folder-coreml"),
        (("llama", "--model", "org/mine"), "org/mine", "mine-coreml"),
        (("-m", "org/mine", "-o", "x/y"), "org/mine", "x/y"),
    ],
)
def test_export_model_and_output(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fake_export: FakeExport,
    words: tuple[str, ...],
    model: str,
    output: str,
) -> None:
    done = in_process(capfd, monkeypatch, "export", *words)
    assert done.code == 0, done.err
    assert fake_export.given["model"] == model and fake_export.given["output"] == Path(output)
    assert fake_export.given["config"] == ExportConfig()
    # Whoever asks for a Llama must not take the small one in the package for another.
    first = done.err.splitlines()[0]
    assert ("ships in the package" in first) == (model == "llama")
    assert "--model" in first or model != "llama"


def test_a_folder_named_as_the_bundled_recipe_is_not_called_bundled(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fake_export: FakeExport,
    tmp_path: Path,
) -> None:
    (tmp_path / "llama").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "ships" not in in_process(capfd, monkeypatch, "export", "llama").err


@pytest.mark.parametrize("separator", ["-", "_"])
def test_export_flags_reach_the_config(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fake_export: FakeExport,
    separator: str,
) -> None:
    settings: dict[str, Any] = {
        "bits": 3,
        "family": "mistral",
        "scheme": "codebook",
        "group_size": 64,
        "zero_point": "float",
        "codebook_rows": 8,
        "codebook_columns": 16,
        "codebook_vector": 2,
        "codebook_scale": True,
        "embedding": "int4-channel",
        "lm_head": "codebook:6",
        "rotate": "both",
        "residual_shift": 3,
        "adapters": "beside",
        "codes_of": "base",
        "calibrate": "text.txt",
        "calibration_tokens": 512,
        "tune": 20,
        "recover": "lora:8",
        "target": "ane",
        "minimum_os": "macOS26",
        "compute_precision": "fp32",
        "logits": "all",
        "head": "topk:4",
        "context": 96,
        "seq_lengths": (1, 4, 16),
        "kv_cache": "inputs",
        "partition_size": 950_000_000,
        "split": ("embedding", "head"),
        "model_type": "compiled_model",
        "passes": ("common::fuse_gelu_exact", "common::noop_elimination"),
        "compile_specs": ("key=value",),
        "profile": "ane-ios26",
        "layout": "conv",
        "norm": "l2",
        "operations": "fewest",
        "linear_split": 1024,
        "head_split": 8192,
        "gather_split": 65_535,
        "pad_heads": True,
        "allow_inexact": True,
        "force": True,
    }
    others = {"size", "plan", "pt2e", "functions", "backend", "constants", "skip_ops"}
    assert settings.keys() | others == asdict(ExportConfig()).keys()
    words: list[str] = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", separator)
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words += [flag] if value is True else [flag, text]
    words += [f"--local{separator}files{separator}only", "--overwrite", "--revision", "v1"]
    done = in_process(capfd, monkeypatch, "export", "org/model", *words)
    assert done.code == 0, done.err
    assert fake_export.given["config"] == ExportConfig(**settings)
    assert fake_export.given["overwrite"] is True
    assert fake_export.given["local_files_only"] is True
    assert fake_export.given["revision"] == "v1"


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (("--bits", "3.5"), {"bits": 3.5}),
        (("--size", "1.5MB"), {"size": 1_500_000}),
        (("--size", "512MiB"), {"size": 512 << 20}),
        (("--size", "70000"), {"size": 70_000}),
        (("--plan", "out/manifest.json"), {"plan": "out/manifest.json"}),
        (("--pt2e", "weights"), {"pt2e": "weights"}),
        (("--functions", "prefill:8,decode:1"), {"functions": "prefill:8,decode:1"}),
        (("--backend", "xnnpack"), {"backend": "xnnpack"}),
        (("--constants", "inputs", "--bits", "16"), {"constants": "inputs", "bits": 16}),
        (("--skip-ops", "aten.embedding.default"), {"skip_ops": ("aten.embedding.default",)}),
    ],
)
def test_flags_that_decide_others_reach_the_config(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fake_export: FakeExport,
    words: tuple[str, ...],
    settings: dict[str, Any],
) -> None:
    done = in_process(capfd, monkeypatch, "export", "org/model", *words)
    assert done.code == 0, done.err
    assert fake_export.given["config"] == ExportConfig(**settings)


def test_a_recipe_is_exported_with_its_settings(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fake_export: FakeExport,
    tmp_path: Path,
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "model: org/name\n"
        "weights: {size: 600MB, embedding: int4-channel}\n"
        "program: {context: 1024}\n"
        "target: {target: ane}\n"
    )
    settings: dict[str, Any] = {"embedding": "int4-channel", "context": 1024, "target": "ane"}
    done = in_process(capfd, monkeypatch, "export", recipe)
    assert done.code == 0, done.err
    assert fake_export.given["model"] == str(recipe)
    assert fake_export.given["output"] == Path("mine-coreml")
    assert fake_export.given["config"] == ExportConfig(size=600_000_000, **settings)
    # What is on the command line wins, a default too; another model keeps the settings.
    words = ("--model", "org/other", "--size", "1GB", "--embedding", "int8-channel")
    done = in_process(capfd, monkeypatch, "export", recipe, *words, "--context", "64")
    assert done.code == 0, done.err
    assert fake_export.given["model"] == "org/other"
    given = ExportConfig(size=10**9, embedding="int8-channel", context=64, target="ane")
    assert fake_export.given["config"] == given
    done = in_process(capfd, monkeypatch, "export", recipe, "--bits", "3")
    assert done.code == 0, done.err
    assert fake_export.given["config"] == ExportConfig(bits=3, **settings)
    refused = in_process(capfd, monkeypatch, "export", recipe, "--bits", "3", "--size", "1GB")
    assert refused.code == 2
    assert "--size decides what --bits 3 would; drop one of them." in refused.err


def test_flags_switch_off_what_a_recipe_switches_on(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fake_export: FakeExport,
    tmp_path: Path,
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "model: org/name\n"
        "weights: {codebook_scale: true, allow_inexact: true}\n"
        "target: {force: true}\n"
    )
    words = ("--no-codebook-scale", "--no-allow-inexact", "--no-force")
    done = in_process(capfd, monkeypatch, "export", recipe, *words)
    assert done.code == 0, done.err
    assert fake_export.given["config"] == ExportConfig()
    done = in_process(capfd, monkeypatch, "export", recipe, "--no-force")
    expected = ExportConfig(codebook_scale=True, allow_inexact=True)
    assert fake_export.given["config"] == expected


@pytest.mark.parametrize("flag", ["-m", "--model"])
def test_a_recipe_named_by_model_brings_its_settings(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fake_export: FakeExport,
    tmp_path: Path,
    flag: str,
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: org/name\nweights: {bits: 3}\n")
    done = in_process(capfd, monkeypatch, "export", flag, recipe, "--context", "64")
    assert done.code == 0, done.err
    assert fake_export.given["model"] == str(recipe)
    assert fake_export.given["config"] == ExportConfig(bits=3, context=64)
    refused = in_process(capfd, monkeypatch, "export", "llama", flag, recipe)
    assert refused.code == 2
    assert f"llama and --model {recipe} are two recipes; give one of them, or a" in refused.err


# eval


@pytest.fixture
def own_bundle(bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may write to."""
    return Path(shutil.copytree(bundle, tmp_path / "own"))


def test_eval_json_is_results_json(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    own_bundle: Path,
    checkpoint: Path,
    text_file: Path,
) -> None:
    words = ("--model", checkpoint, "--text", text_file, "--tokens", "70", "--format", "json")
    before = files_of(own_bundle)
    done = in_process(capfd, monkeypatch, "eval", own_bundle, *words)
    assert done.code == 0, done.err
    results = json.loads(done.out)
    assert results == json.loads((own_bundle / "results.json").read_text())
    assert files_of(own_bundle) == before | {"results.json"}
    assert results["text"] == "tëxt.txt" and results["tokens"] == 70 and results["window"] == 64
    names = [quality["name"] for quality in results["qualities"]]
    assert names == ["original", "quantized", "artifact"]
    assert [latency["tokens"] for latency in results["latencies"]] == [1, 8]
    manifest = manifest_of(own_bundle)
    assert results["program_sha256"] == manifest["program"]["sha256"]
    assert results["source"] == manifest["source"]
    assert results["bytes"]["model.pte"] == manifest["program"]["bytes"]
    inside = [count for name, count in results["bytes"].items() if name.startswith("model.pte/")]
    assert sum(inside) == manifest["program"]["bytes"]
    for stage in ("opening the checkpoint", "scoring text", "timing calls"):
        assert re.search(rf"{stage} \.\.\. \d+\.\d s", done.err)


def test_eval_table(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    own_bundle: Path,
    checkpoint: Path,
    text_file: Path,
) -> None:
    words = (own_bundle, "--model", checkpoint, "--text", text_file, "--tokens", "9")
    done = in_process(capfd, monkeypatch, "eval", *words)
    assert done.code == 0, done.err
    results = json.loads((own_bundle / "results.json").read_text())
    assert done.out.startswith("9 tokens of tëxt.txt, windows of up to 10; KL and agreement")
    for quality in results["qualities"]:
        row = next(line for line in done.out.splitlines() if line.startswith(quality["name"]))
        # Every figure stands beside what produced it.
        assert quality["runtime"] in row and f"{quality['perplexity']:.4f}" in row
        if quality["name"] != "original":
            assert f"{quality['mean_kl']:.5f}" in row and f"{quality['top1_agreement']:.2%}" in row
    assert re.search(r"^decode, 1 token +reference runtime +\d+\.\d ms +\d+$", done.out, re.M)
    assert re.search(r"^prefill, 8 tokens +reference runtime ", done.out, re.M)
    assert re.search(rf"^model\.pte +{results['bytes']['model.pte']:,}$", done.out, re.M)
    assert re.search(rf"^bits per weight +{results['bits_per_weight']:.2f}$", done.out, re.M)


def test_eval_artifact_only_needs_no_original(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    own_bundle: Path,
    text_file: Path,
) -> None:
    manifest = manifest_of(own_bundle)
    manifest["source"]["name"] = "/gone"
    write_manifest(own_bundle, manifest)
    words = (own_bundle, "--text", text_file, "--tokens", "9")
    refused = in_process(capfd, monkeypatch, "eval", *words)
    assert refused.code == 4 and "'/gone'" in refused.err and refused.out == ""
    done = in_process(capfd, monkeypatch, "eval", *words, "--artifact-only", "--format", "json")
    assert done.code == 0, done.err
    (quality,) = json.loads(done.out)["qualities"]
    assert quality["name"] == "artifact" and quality["mean_kl"] is None


def test_eval_of_a_moved_original(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    own_bundle: Path,
    checkpoint: Path,
    text_file: Path,
) -> None:
    manifest = manifest_of(own_bundle)
    manifest["source"]["name"] = "/gone"
    write_manifest(own_bundle, manifest)
    words = (own_bundle, "--text", text_file, "--tokens", "9", "--model", checkpoint)
    done = in_process(capfd, monkeypatch, "eval", *words)
    assert done.code == 0, done.err


def test_eval_finds_an_original_that_was_given_by_a_relative_path(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    own_bundle: Path,
    checkpoint: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    manifest = manifest_of(own_bundle)
    manifest["source"]["name"] = "models/llama"
    write_manifest(own_bundle, manifest)
    words = ("eval", own_bundle, "--text", text_file, "--tokens", "9")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    refused = in_process(capfd, monkeypatch, *words)
    assert refused.code == 4 and "--model" in refused.err and "--artifact-only" in refused.err
    assert (
        "'models/llama', of which a manifest tells the name alone, and there is none" in refused.err
    )
    # Another model of that name is passed over for the one that was exported.
    save_model(elsewhere / "models" / "llama", make_model(hidden_size=64))
    refused = in_process(capfd, monkeypatch, *words)
    assert refused.code == 4 and "'models/llama' holds other weights" in refused.err
    shutil.copytree(checkpoint, tmp_path / "llama")
    done = in_process(capfd, monkeypatch, *words)
    assert done.code == 0, done.err


def test_eval_takes_the_bundled_text(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, own_bundle: Path
) -> None:
    words = (own_bundle, "--artifact-only", "--tokens", "5", "--format", "json")
    done = in_process(capfd, monkeypatch, "eval", *words)
    assert done.code == 0 and json.loads(done.out)["text"] == "bundled held-out text"


def test_eval_and_generate_in_another_mode(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    own_bundle: Path,
    text_file: Path,
) -> None:
    words = ("eval", own_bundle, "--artifact-only", "--text", text_file, "--tokens", "9")
    usual = in_process(capfd, monkeypatch, *words, "--format", "json")
    assert usual.code == 0 and json.loads(usual.out)["mode"] == "declared"
    done = in_process(capfd, monkeypatch, *words, "--mode", "fp32", "--format", "json")
    assert done.code == 0, done.err
    results = json.loads(done.out)
    assert results["mode"] == "fp32" and results["device"] == "cpu"
    (quality,) = results["qualities"]
    assert quality["runtime"] == "reference runtime (fp32)"
    # Without rounding the figure moves, and not by much.
    change = quality["perplexity"] / json.loads(usual.out)["qualities"][0]["perplexity"] - 1
    assert 0 < abs(change) < 1e-2
    words = ("generate", own_bundle, "-p", "The", "--max-new-tokens", "3")
    assert in_process(capfd, monkeypatch, *words, "--mode", "fp32").code == 0
    refused = in_process(capfd, monkeypatch, *words, "--device", "toaster")
    assert refused.code == 2 and "The device 'toaster' cannot be used here" in refused.err


# generate


def test_generate_is_greedy_and_the_one_of_the_library(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bundle: Path
) -> None:
    from llm_coreml import load

    words = ("generate", bundle, "--prompt", "The quick", "--max-new-tokens", "12")
    first, second = (in_process(capfd, monkeypatch, *words) for _ in range(2))
    assert first.code == 0 and first.err == "" and first == second
    assert first.out == load(bundle).generate("The quick", 12) + "\n"


def test_generate_seed_makes_draws_repeatable(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bundle: Path
) -> None:
    def drawn(seed: int) -> str:
        words = ("--max-new-tokens", "12", "--temperature", "1.5", "--top-p", "0.9", "--seed")
        done = in_process(capfd, monkeypatch, "generate", bundle, "-p", "The", *words, str(seed))
        assert done.code == 0, done.err
        return done.out

    assert drawn(1) == drawn(1) and len({drawn(seed) for seed in range(4)}) > 1


# show


def test_show_json(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bundle: Path
) -> None:
    of_bundle = in_process(capfd, monkeypatch, "show", bundle, "--format", "json")
    of_program = in_process(capfd, monkeypatch, "show", bundle / "model.pte", "--format", "json")
    assert of_bundle.code == of_program.code == 0 and of_bundle.err == of_program.err == ""
    found = json.loads(of_bundle.out)
    manifest = found.pop("manifest")
    assert manifest == manifest_of(bundle)
    assert found.pop("path") == str(bundle)
    assert found == {key: json.loads(of_program.out)[key] for key in found}
    assert found["bytes"] == manifest["program"]["bytes"]
    constants = manifest["program"]["constant_methods"]
    assert found["constant_methods"] == {**constants, "get_eos_ids": 1}  # a list of one
    (delegate,) = found["methods"]["forward"]
    assert delegate["backend"] == "CoreMLBackend"
    assert delegate["states"] == dict.fromkeys(("cache_keys", "cache_values"), "fp16 [1, 2, 96, 8]")
    assert delegate["inputs"] == {
        "tokens": "int32 [1, 1] or [1, 8]",
        "start_pos": "int32 [1]",
        "last_pos": "int32 [1]",
    }
    assert list(delegate["outputs"].values()) == ["fp16 [1, 1, 300]"]
    assert delegate["ops"]["write_state"] == 2 and delegate["ops"]["linear"] == 8
    assert sum(delegate["files"].values()) < delegate["bytes"]


def test_show_tables(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bundle: Path
) -> None:
    size = manifest_of(bundle)["program"]["bytes"]
    of_bundle = in_process(capfd, monkeypatch, "show", bundle)
    of_program = in_process(capfd, monkeypatch, "show", bundle / "model.pte")
    assert of_bundle.code == of_program.code == 0 and of_bundle.err == of_program.err == ""
    head, rest = of_bundle.out.split("\n\n", 1)
    assert "tiny-llama (folder)" in head.splitlines()[0]
    for row in ("program", "weights", "target", "verified by", "rebuild  "):
        assert re.search(rf"^{row}", head, re.M), row
    assert rest.split() == of_program.out.split()
    assert rest.startswith(f"program, {size:,} bytes")
    for row in (
        r"get_vocab_size +300",
        r"forward: CoreMLBackend, [\d,]+ bytes",
        r"input \w+ +int32 \[1, 1\] or \[1, 8\]",
        r"output \w+ +fp16 \[1, 1, 300\]",
        r"state cache_keys +fp16 \[1, 2, 96, 8\]",
        r"weight\.bin +[\d,]+ bytes",
        r"\d+ ops +.*\d+ linear",
    ):
        assert re.search(rf"^{row}", rest, re.M), row


# Streams


def test_a_closed_pipe_ends_quietly(bundle: Path) -> None:
    writer = subprocess.Popen(
        command("show", bundle, "--format", "json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert writer.stdout is not None and writer.stderr is not None
    writer.stdout.close()
    err = writer.stderr.read().decode()
    writer.stderr.close()
    # 1 is what click and rich end with when nobody reads.
    assert writer.wait() == 1 and err == ""


@pytest.mark.parametrize("form", ["state", "inputs"])
def test_the_folder_of_weights_is_not_the_form_of_the_cache(
    form: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = in_process(capfd, monkeypatch, "export", "org/model", "--cache", form)
    assert done.code == 2
    assert f"--kv-cache {form}" in done.err and f"./{form}" in done.err
