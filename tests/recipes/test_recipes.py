"""Recipes: the shipped ones, one's own, and what is wrong with a file."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from llm_coreml.config import ExportConfig
from llm_coreml.errors import ConfigError, UnsupportedError
from llm_coreml.recipes import (
    bundled_model,
    find_recipe,
    load_recipe,
    recipe_names,
    recipe_schema,
)

FULL = ExportConfig(
    bits=3,
    group_size=64,
    zero_point="int",
    codebook_columns=16,
    embedding="int4-channel",
    lm_head="codebook:6",
    rotate="heads",
    calibrate="bundled",
    tune=20,
    logits="all",
    context=96,
    seq_lengths=(1, 4),
    target="ane",
    minimum_os="macOS26",
    compute_precision="fp32",
    force=True,
)


def written(folder: Path, values: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description and recipe.model
    assert recipe.model == "bundled" or recipe.source.count("/") == 1
    assert find_recipe(name) == recipe
    # A name alone means the flags' defaults.
    assert recipe.config == ExportConfig()


def test_the_bundled_recipe_is_a_folder() -> None:
    assert load_recipe("llama").source == str(bundled_model())


def test_any_setting_can_stand_in_a_recipe(tmp_path: Path) -> None:
    sections = yaml.safe_load(yaml.safe_dump({k: dict(v) for k, v in lists(FULL).items()}))
    path = written(tmp_path, {"model": "org/name", **sections})
    assert load_recipe(path).config == load_recipe(str(path)).config == FULL
    named = {name for section in sections.values() for name in section}
    assert named == {field.name for field in fields(ExportConfig)}
    jsonschema.validate({"model": "org/name", **sections}, recipe_schema())


def lists(config: ExportConfig) -> dict[str, dict[str, Any]]:
    """Return settings as YAML can say them, which has no tuples."""
    return {
        title: {k: list(v) if isinstance(v, tuple) else v for k, v in section.items()}
        for title, section in config.to_json().items()
    }


def test_what_a_recipe_leaves_out_is_the_default(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, {"model": "org/name", "target": {"target": "ane"}}))
    assert (recipe.name, recipe.description, recipe.source) == ("mine", "", "org/name")
    assert recipe.config == ExportConfig(target="ane")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "a/b", "wieghts": {}}, "There is no key 'wieghts'. Did you mean 'weights'?"),
        ({"model": "a/b", "bits": 3}, "There is no key 'bits'; it belongs to weights."),
        ({"model": "a/b", "weights": {"bit": 3}}, "weights has no key 'bit'. Did you mean 'bits'?"),
        ({"model": "a/b", "weights": {"bits": "3"}}, "weights.bits is '3'; it must be a number or"),
        ({"model": "a/b", "weights": 3}, "weights is 3; it must be a section of keys and values."),
        ({"model": "a/b", "weights": None}, "weights is None; it must be a section of keys and"),
        (
            {"model": "a/b", "weights": {"rotate": "all"}},
            "weights.rotate is 'all'; it must be none",
        ),
        ({"model": "a/b", "program": {"context": 33}}, "--context is 33; it must be a multiple of"),
        ({"model": "a/b", "target": {"target": "anee"}}, "There is no target 'anee'; the targets"),
        ({"description": "x"}, "The file lacks the key 'model'."),
        ({"model": 3}, "model is 3; it must be a text."),
        ({"model": ""}, "model is ''; it must be of minLength 1."),
        ("- a", "The file is a list; it must be a section of keys and values."),
        ("", "The file is None; it must be a section of keys and values."),
        ({1: 2, "model": "a/b"}, "There is no key '1'."),
    ],
    ids=str,
)
def test_a_recipe_that_is_wrong_is_refused_in_a_sentence(
    tmp_path: Path, values: Any, message: str
) -> None:
    path = written(tmp_path, values)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"Recipe '{path}': {message}")


def test_a_system_that_is_too_old_is_unsupported_in_a_recipe_too(tmp_path: Path) -> None:
    path = written(tmp_path, {"model": "a/b", "target": {"minimum_os": "iOS15"}})
    with pytest.raises(UnsupportedError, match=r"Recipe '.*mine\.yaml': iOS15 is too old"):
        load_recipe(path)


@pytest.mark.parametrize("content", [b"model: [", b"\xff\xfe\x00", b"a: &a [*a]", b"? {}\n: 1"])
def test_files_that_are_no_recipes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"^Recipe '.*bad\.yaml'"):
        load_recipe(path)


def test_aliases_are_refused_before_they_multiply(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    path = written(tmp_path, "\n".join(["model: a/b", *lines]))
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert str(caught.value) == (
        f"Recipe '{path}' cannot be read: line 3 holds an alias (*name), which is not read."
    )


def test_files_that_are_absent_or_endless(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read: .*No such file"):
        load_recipe("absent.yaml")
    path = tmp_path / "long.yaml"
    path.write_bytes(b"#")
    os.truncate(path, 1 << 30)
    with pytest.raises(ConfigError, match="cannot be read: it is larger than 1 MiB"):
        load_recipe(path)


def test_what_is_no_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("org/name") is None and find_recipe(tmp_path) is None
    (tmp_path / "llama").mkdir()
    assert find_recipe("llama") == load_recipe("llama"), "exports are often named so"
    (tmp_path / "llama/config.json").write_text("{}")
    assert find_recipe("llama") is None
    with pytest.raises(ConfigError, match=r"'lama' is no recipe, .* Did you mean 'llama'"):
        find_recipe("lama")
