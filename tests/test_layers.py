"""The package's layers: who may import whom, what is installed, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]

ROOT = Path(__file__).parent.parent
FOLDERS = {"llm_coreml": ROOT / "llm_coreml", "eval": ROOT / "eval", "recipes": ROOT / "recipes"}

# Lowest first; a module imports from its own line and the lines above it.
LAYERS = (
    ("errors", "output"),
    ("targets", "progress", "machine", "fidelity", "tokenizer", "demo"),
    ("rules",),
    ("artifact",),
    ("checkpoint",),
    ("decoder",),
    ("families",),
    ("config",),
    ("recipes",),
    ("model",),
    ("quantize",),
    ("reference",),
    ("runtime",),
    ("lower",),
    ("verify",),
    ("bundle",),
    ("inspect",),
    ("pipeline",),
    ("eval",),
    ("cli",),
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules() -> list[tuple[str, Path]]:
    """Return the layer and path of every module; `__init__` of the package itself is on top."""
    found = []
    for top, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            first = path.relative_to(folder).parts[0].removesuffix(".py")
            layer = first if top == "llm_coreml" else top
            if layer != "__init__":
                found.append((layer, path))
    return found


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and layer of every import of ours in `path`, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports by a relative name"
            names = [node.module or ""]
            if node.module == "llm_coreml":
                names = [f"llm_coreml.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == "llm_coreml" and rest:
                yield node.lineno, rest.split(".")[0]


def test_every_module_has_a_layer() -> None:
    assert {layer for layer, _ in modules()} <= set(LEVELS)


@pytest.mark.parametrize(
    ("layer", "path"),
    [pytest.param(*found, id=str(found[1].relative_to(ROOT))) for found in modules()],
)
def test_lower_layers_never_import_higher_ones(layer: str, path: Path) -> None:
    for line, imported in imports(path):
        assert LEVELS[imported] <= LEVELS[layer], (
            f"{path.relative_to(ROOT)}:{line}: {layer} lies below {imported}"
        )


def test_every_package_is_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = settings["package-dir"]
    found = set()
    for name, folder in FOLDERS.items():
        for path in folder.rglob("__init__.py"):
            inner = path.parent.relative_to(folder).parts
            found.add(".".join([*(("llm_coreml",) if name != "llm_coreml" else ()), name, *inner]))
    assert set(settings["packages"]) == found
    assert settings["packages"] == sorted(settings["packages"])
    assert {ROOT / folder for folder in folders.values()} == set(FOLDERS.values())


@pytest.mark.parametrize(
    "module",
    [
        "llm_coreml",
        "llm_coreml.errors",
        "llm_coreml.config",
        "llm_coreml.recipes",
        "llm_coreml.bundle.manifest",
    ],
)
def test_light_modules_load_no_torch(module: str) -> None:
    heavy = "{'torch', 'coremltools', 'executorch', 'transformers', 'torchao'}"
    code = f"import sys, {module}; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"
