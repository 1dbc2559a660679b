"""The file of a sweep, and its cells: what is meant, and what is refused in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_coreml.errors import ConfigError, UnsupportedError
from llm_coreml.eval.sweep.grid import MOST, cells_of
from llm_coreml.eval.sweep.sweep_file import read_sweep


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def labels(folder: Path, text: str) -> list[str]:
    return [cell.label for cell in cells_of(read_sweep(written(folder, text)))]


def test_cells_are_the_product_of_models_formats_axes_and_targets(tmp_path: Path) -> None:
    sweep = read_sweep(
        written(
            tmp_path,
            """
description: all of it
models: [llama, ./a/b]
formats: [{bits: 4}, {scheme: "lut3-group", codebook_rows: 8}]
axes: {calibrate: [null, bundled]}
targets: [gpu, ane]
settings: {context: 512, seq_lengths: "1,8"}
exclude: [{target: ane, calibrate: bundled}, {model: llama, scheme: lut3-group, target: ane}]
evaluate: {tokens: 100, mode: fp32}
limits: {memory: 2GB, minutes: 1.5, cores: 2}
""",
        )
    )
    cells = cells_of(sweep)
    assert [cell.label for cell in cells][:4] == [
        "llama bits 4 calibrate none target gpu",
        "llama bits 4 calibrate none target ane",
        "llama bits 4 calibrate bundled target gpu",
        "llama scheme lut3-group codebook_rows 8 calibrate none target gpu",
    ]
    assert len(cells) == 16 - 4 - 1
    last = cells[-1]
    assert last.slug == "b-scheme-lut3-group-codebook-rows-8-calibrate-bundled-target-gpu"
    assert (last.config.codebook_rows, last.config.context) == (8, 512)
    assert last.config.seq_lengths == (1, 8) and last.config.calibrate == "bundled"
    assert (sweep.measured.tokens, sweep.measured.mode) == (100, "fp32")
    assert (sweep.limits.memory, sweep.limits.minutes, sweep.limits.cores) == (2 * 10**9, 1.5, 2)


def test_a_recipe_brings_its_settings_and_gives_way(tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text("model: a/b\nweights: {bits: 3}\nprogram: {context: 96}\n")
    (cell,) = cells_of(read_sweep(written(tmp_path, f"models: ['{recipe}']\naxes: {{bits: [8]}}")))
    assert (cell.config.bits, cell.config.context, cell.label) == (8, 96, "own.yaml")


def test_an_exclusion_may_take_contradictions_out(tmp_path: Path) -> None:
    text = "models: [llama]\naxes: {bits: [null, 4], size: [null, 1GB]}\n"
    with pytest.raises(ConfigError, match="cell 'llama bits 4 size 1GB'"):
        labels(tmp_path, text)
    assert len(labels(tmp_path, text + "exclude: [{bits: 4, size: 1GB}]")) == 3


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", "The file is a list; it must be a section of keys and values."),
        ("axes: {bits: [4]}", "The file lacks the key 'models'."),
        ("models: []", "models is empty; give at least one value, or leave it out."),
        ("models: llama", "models is 'llama'; it must be a list."),
        ("models: [llama]\naxis: {}", "There is no key 'axis'. Did you mean 'axes'?"),
        ("models: [a]\naxes: {bit: [4]}", "axes has no key 'bit'. Did you mean 'bits'?"),
        ("models: [a]\naxes: {bits: []}", "axes.bits is empty;"),
        ("models: [a]\naxes: {bits: 4}", "axes.bits is 4; it must be a list."),
        ("models: [a]\naxes: {bits: [x]}", "axes.bits.0 is 'x'; it must be a number or null."),
        ("models: [a]\naxes: {bits: [4, 4]}", "axes.bits names 4 twice; name each once."),
        ("models: [a, a]", "models names a twice"),
        (
            "models: [a]\naxes: {bits: [4]}\nsettings: {bits: 3}",
            "bits is in axes and in settings; give it in one of them.",
        ),
        (
            "models: [a]\nformats: [{bits: 4}]\naxes: {bits: [4]}",
            "bits is in axes and in formats; give it in one of them.",
        ),
        (
            "models: [a]\ntargets: [gpu]\nsettings: {target: ane}",
            "target is in targets and in settings; give it in one of them.",
        ),
        ("models: [a]\nformats: [{bitz: 4}]", "formats.0 has no key 'bitz'."),
        ("models: [a]\nexclude: [{bitz: 4}]", "exclude.0 has no key 'bitz'."),
        ("models: [a]\nevaluate: {token: 4}", "evaluate has no key 'token'."),
        ("models: [a]\nevaluate: {tokens: 0}", "--tokens is 0; it must be at least 1."),
        ("models: [a]\nlimits: {memory: much}", "limits.memory: 'much' is no number of bytes"),
        ("models: [a]\nlimits: {minutes: 0}", "minutes is 0; it must be more than 0"),
        ("models: [a]\nlimits: {minutes: .nan}", "minutes is nan; it must be more than 0"),
        ("models: [a]\nmodels: [b]", "line 2 gives the key 'models' a second time"),
        ("models: [&a x, *a]", "line 1 holds an alias (*name), which is not read."),
        ("models: [a\n", "cannot be read: while parsing"),
    ],
)
def test_a_wrong_file_is_told_in_one_sentence(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_sweep(written(tmp_path, text))
    assert told in str(caught.value) and "mine.yaml'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("models: [llamma]", "'llamma' is no recipe, folder or hub id"),
        ("models: [llama]\naxes: {bits: [4, 2.5]}\nsettings: {scheme: int4-group}", "cell 'llama"),
        ("models: [llama]\ntargets: [gpu, npu]", "cell 'llama target npu'"),
        (
            "models: [llama]\naxes: {bits: [4]}\nexclude: [{bits: 3}]",
            "entry 1 of exclude fits no cell; correct it, or take it out.",
        ),
        ("models: [llama]\nexclude: [{model: llama}]", "exclude leaves no cell"),
        (
            "models: [llama]\naxes: {"
            + ", ".join(
                f"{name}: [{', '.join(map(str, range(1, 30)))}]"
                for name in ("context", "group_size", "codebook_rows")
            )
            + "}",
            f"has 24,389 cells, and {MOST:,} is the most; make it smaller.",
        ),
    ],
)
def test_wrong_cells_are_told_in_one_sentence(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises((ConfigError, UnsupportedError)) as caught:
        labels(tmp_path, text)
    assert told in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Sweep '.*none.yaml' cannot be read: .*No such file"):
        read_sweep(tmp_path / "none.yaml")


def test_the_documents_examples_are_such_files(tmp_path: Path) -> None:
    docs = Path(__file__).parents[3] / "docs"
    page = (docs / "sweeps.md").read_text(encoding="utf-8")
    example = page.split("```yaml\n")[1].split("```")[0]
    assert len(labels(tmp_path, example)) == 2 * (2 * 2 * 2 - 2)
    assert len(cells_of(read_sweep(docs / "examples/sweep.yaml"))) == 2 * 2 * 5
