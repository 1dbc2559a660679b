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

from llm_coreml.config import SECTIONS, ExportConfig
from llm_coreml.config.plain_yaml import read_yaml
from llm_coreml.config.schema import complaint, sections_schema
from llm_coreml.errors import ConfigError, LlmCoreMLError, nearest

BUNDLED = "bundled"
# The recipe of the bundled model, by which manifests name it.
BUNDLED_RECIPE = "llama"
_ENDINGS = (".yaml", ".yml")


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
    values = read_yaml(path, "Recipe")
    wrong = complaint(values, recipe_schema())
    if wrong is not None:
        raise ConfigError(f"Recipe '{name}': {wrong}")
    sections = {title: values[title] for title in SECTIONS if title in values}
    try:
        config = ExportConfig.from_json(sections)
    except LlmCoreMLError as error:
        raise type(error)(f"Recipe '{name}': {error}") from None
    return Recipe(path.stem, values.get("description", ""), values["model"], config)
