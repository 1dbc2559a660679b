"""Recipes: a model and all settings of its export, under a short name or in a file of one's own.

    recipe = load_recipe("llama-3.2-1b")            # or load_recipe("my-recipe.yaml")
    recipe.source, recipe.config

A recipe is YAML: `model`, `description`, and any setting in its section.

    description: Our fine-tune, for phones
    model: org/name
    weights: {bits: 3, embedding: int4-channel}
    program: {context: 1024}
    target: {target: ane}

Adding one: a file in this folder; a test loads every file.
"""

from __future__ import annotations

import importlib.resources
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llm_coreml.config import SECTIONS, ExportConfig
from llm_coreml.config.schema import complaint, sections_schema
from llm_coreml.errors import ConfigError, LlmCoreMLError, nearest

BUNDLED = "bundled"
# The recipe of the bundled model, by which manifests name it.
BUNDLED_RECIPE = "llama"
_ENDINGS = (".yaml", ".yml")
# All settings with their defaults take two kilobytes.
_LARGEST_FILE = 1 << 20


@dataclass(frozen=True)
class Recipe:
    """A model and how to export it.

    Attributes:
        name: File name without its ending.
        description: One line; empty where the file has none.
        model: Hub id, folder, or `bundled` for the small Llama that ships in the package.
        config: Its settings; the defaults of those that it does not name.
    """

    name: str
    description: str
    model: str
    config: ExportConfig

    @property
    def source(self) -> str:
        """Hub id, or the folder of the model."""
        return str(bundled_model()) if self.model == BUNDLED else self.model


class _PlainLoader(yaml.SafeLoader):
    """Reads YAML without aliases, a few of which, nested, make a tree that fits no memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            at = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
            raise ValueError(f"line {at} holds an alias (*name), which recipes do without")
        return super().compose_node(parent, index)


def bundled_model() -> Path:
    """Return the folder of the small Llama that ships in the package."""
    return Path(str(importlib.resources.files("llm_coreml.demo")))


def recipe_names() -> list[str]:
    """Return the names of all recipes that ship in the package."""
    folder = importlib.resources.files(__name__)
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, made from the fields of the settings."""
    schema = sections_schema(SECTIONS)
    own = {"description": {"type": "string"}, "model": {"type": "string", "minLength": 1}}
    return {**schema, "required": ["model"], "properties": {**own, **schema["properties"]}}


def find_recipe(source: str | Path) -> Recipe | None:
    """Return the recipe that `source` names, None where it is a folder or a hub id.

    A folder of a recipe's name wins only if it holds a model: exports are often named so.

    Raises:
        ConfigError: a bare word that is no recipe and no folder, or a recipe that is wrong.
    """
    path = Path(source)
    # Of names that no file can have, pathlib raises; os says that there is none.
    if path.suffix in _ENDINGS and not os.path.isdir(path):
        return load_recipe(source)
    if not isinstance(source, str):
        return None
    is_recipe = source in recipe_names() and not os.path.isfile(path / "config.json")
    if not is_recipe and (os.path.exists(path) or "/" in source):
        return None
    return load_recipe(source)


def load_recipe(name: str | Path) -> Recipe:
    """Read one recipe: a shipped one by its name, any other by the path of its YAML file.

    Raises:
        ConfigError: no such recipe, or a file with an unknown key or a wrong value.
        UnsupportedError: its `minimum_os` is too old.
    """
    path = Path(name)
    if path.suffix not in _ENDINGS:
        if str(name) not in recipe_names():
            raise ConfigError(
                f"'{name}' is no recipe, folder or hub id (org/name); recipes are "
                f"{', '.join(recipe_names())}.{nearest(str(name), recipe_names())}"
            )
        path = Path(str(importlib.resources.files(__name__).joinpath(f"{name}.yaml")))
    values = _read(path)
    wrong = complaint(values, recipe_schema())
    if wrong is not None:
        raise ConfigError(f"Recipe '{name}': {wrong}")
    sections = {title: values[title] for title in SECTIONS if title in values}
    try:
        config = ExportConfig.from_json(sections)
    except LlmCoreMLError as error:
        raise type(error)(f"Recipe '{name}': {error}") from None
    return Recipe(path.stem, values.get("description", ""), values["model"], config)


def _read(path: Path) -> Any:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ValueError(f"it is larger than {_LARGEST_FILE >> 20} MiB")
        return yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        told = " ".join(str(error).split())
        raise ConfigError(f"Recipe '{path}' cannot be read: {told}.") from None
