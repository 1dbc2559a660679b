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
FOLDERS = {
    "llm_coreml": ROOT / "llm_coreml",
    "cpp": ROOT / "cpp",
    "eval": ROOT / "eval",
    "recipes": ROOT / "recipes",
}

# Lowest first; a module imports from its own line and the lines above it.
LAYERS = (
    ("printable",),
    ("errors",),
    ("shared_change",),
    (
        "drafts",
        "output",
        "systems",
        "targets",
        "progress",
        "progress_bar",
        "plain_table",
        "machine",
        "fidelity",
        "lfs",
        "heads",
        "cuts",
        "quiet",
        "own_process",
        "host",
        "tokenizer",
        "demo",
    ),
    ("rules",),
    ("artifact",),
    ("checkpoint",),
    ("decoder",),
    ("families",),
    ("config",),
    ("recipes",),
    ("model",),
    ("quantize",),
    ("codebook_qat", "qat"),
    ("reference",),
    ("runtime",),
    ("lower",),
    ("verify",),
    ("bundle",),
    ("cpp",),
    ("inspect",),
    ("pipeline",),
    ("pretrained",),
    ("eval",),
    ("training",),
    ("delta",),
    ("cli",),
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
# The same inside of rooms that have rooms.
INNER = {
    "quantize": (
        ("formats",),
        ("calibrate", "rotate"),
        ("plan",),
        ("cache", "low_rank", "pt2e", "residual"),
        ("kept_codes", "keys"),
        ("fill",),
        ("quantized",),
    ),
    "reference": (("ops",), ("program",), ("method", "observe"), ("load",)),
}


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


def inner_imports(room: str) -> Iterator[tuple[str, str, str]]:
    """Yield the part, the imported part and the place of every import inside of a room."""
    for path in sorted((ROOT / "llm_coreml" / room).rglob("*.py")):
        part = path.relative_to(ROOT / "llm_coreml" / room).parts[0].removesuffix(".py")
        if part == "__init__":  # shows what others define
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                words = [*node.module.split("."), *(alias.name for alias in node.names)]
                if words[:2] == ["llm_coreml", room] and words[2] != part:
                    yield part, words[2], f"{path.relative_to(ROOT)}:{node.lineno}"


@pytest.mark.parametrize("room", INNER)
def test_lower_parts_of_a_room_never_import_higher_ones(room: str) -> None:
    levels = {name: level for level, names in enumerate(INNER[room]) for name in names}
    found = list(inner_imports(room))
    assert found
    for part, imported, where in found:
        assert levels[imported] < levels[part], f"{where}: {part} lies below {imported}"


def dependencies() -> dict[str, set[str]]:
    """Return the modules of ours that each of our modules imports."""
    known = {}
    for top, folder in FOLDERS.items():
        base = () if top == "llm_coreml" else (top,)
        for path in folder.rglob("*.py"):
            parts = [*base, *path.relative_to(folder).with_suffix("").parts]
            known[".".join(part for part in parts if part != "__init__")] = path
    found: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llm_coreml"):
                module = (node.module or "").removeprefix("llm_coreml").lstrip(".")
                inner = (f"{module}.{alias.name}".lstrip(".") for alias in node.names)
                found[name] |= {each if each in known else module for each in inner} - {name}
    return found


def test_no_modules_import_each_other_in_a_circle() -> None:
    left = dependencies()
    while leaves := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in leaves:
            del left[name]
    assert not left, f"a circle, and what leads into it: {sorted(left)}"


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
        "llm_coreml.cli.tables",
        "llm_coreml.inspect.contents",
        "llm_coreml.quantize.formats.schemes",
    ],
)
def test_light_modules_load_no_torch(module: str) -> None:
    heavy = "{'torch', 'coremltools', 'executorch', 'transformers', 'torchao'}"
    code = f"import sys, {module}; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for _, path in modules()])
def test_a_file_is_one_idea_and_a_function_fits_a_screen(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400, f"{path.relative_to(ROOT)} is long; split it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= 60, f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}: {lines}"
