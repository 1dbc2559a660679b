"""Recipes: short names for models.

    recipe = load_recipe("llama-3.2-1b")
    recipe.source

Adding one: a YAML file in this folder; a test loads every file.
"""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path

import yaml

from llm_coreml.errors import ConfigError, nearest

BUNDLED = "bundled"
# The recipe of the bundled model, by which manifests name it.
BUNDLED_RECIPE = "llama"


@dataclass(frozen=True)
class Recipe:
    """A named model.

    Attributes:
        name: File name without its ending.
        description: One line.
        model: Hub id, or `bundled` for the small Llama that ships in the package.
    """

    name: str
    description: str
    model: str

    @property
    def source(self) -> str:
        """Hub id, or the folder of the bundled model."""
        return str(bundled_model()) if self.model == BUNDLED else self.model


def bundled_model() -> Path:
    """Return the folder of the small Llama that ships in the package."""
    return Path(str(importlib.resources.files("llm_coreml.demo")))


def recipe_names() -> list[str]:
    """Return the names of all recipes."""
    folder = importlib.resources.files(__name__)
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def load_recipe(name: str) -> Recipe:
    """Read one recipe.

    Raises:
        ConfigError: no such recipe, or a file with an unknown key.
    """
    if name not in recipe_names():
        raise ConfigError(
            f"'{name}' is no recipe, folder or hub id (org/name); recipes are "
            f"{', '.join(recipe_names())}.{nearest(name, recipe_names())}"
        )
    text = importlib.resources.files(__name__).joinpath(f"{name}.yaml").read_text()
    values: dict[str, str] = yaml.safe_load(text)
    unknown = set(values) - {"description", "model"}
    if unknown:
        raise ConfigError(f"Recipe {name} has the unknown key '{min(unknown)}'.")
    return Recipe(name, values["description"], values["model"])
