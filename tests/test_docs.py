"""Documents and docstrings name what there is; and the front door stays short."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import pytest

from llm_coreml.cli.main import cli
from llm_coreml.families import known_model_types
from llm_coreml.recipes import recipe_names

ROOT = Path(__file__).parent.parent
ARCHITECTURE = ROOT / "docs" / "architecture.md"
README_BYTES = 6_000
# What a user meets; each folder's README, and what benchmarks printed, belong to them.
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
    # History names what was there then.
    if path.name != "CHANGELOG.md"
)
PAGES = [pytest.param(path, id=str(path.relative_to(ROOT))) for path in DOCUMENTS]
# Roots that a path in a document may begin from.
ROOTS = (ROOT, ROOT / "llm_coreml", *sorted((ROOT / "llm_coreml").iterdir()))


def tree() -> Iterator[tuple[str, str]]:
    """Yield the path and the description of every line of the tree, folders with a slash."""
    block = ARCHITECTURE.read_text().partition("\n## The tree\n")[2].partition("\n## ")[0]
    folders: list[str] = []
    for line in block.splitlines():
        found = re.fullmatch(r"    ( *)(\S+) {2,}(\S.*)", line)
        if found is None:
            # Nothing indented is passed over.
            assert not line.startswith("    "), line
            continue
        depth = len(found[1]) // 2
        name = "".join(folders[:depth]) + found[2]
        folders[depth:] = [found[2]]
        yield name, found[3]


def modules() -> set[str]:
    """Return every module and folder of the package; a folder's line stands for `__init__`."""
    found = set()
    for top in ("llm_coreml", "cpp", "eval", "recipes"):
        for path in (ROOT / top).rglob("*.py"):
            name = str(path.relative_to(ROOT))
            found.add(name.removesuffix("__init__.py"))
    return found


def test_the_tree_has_a_line_for_every_module_and_none_for_others() -> None:
    lines = list(tree())
    names = [name for name, _ in lines]
    assert len(set(names)) == len(names)
    assert modules() - set(names) == set(), "not in the tree"
    assert [name for name in names if not (ROOT / name).exists()] == [], "not in the repository"
    assert all(about and about[0] != "?" and "TODO" not in about for _, about in lines)


def test_the_tree_is_in_order() -> None:
    """Files come before folders, each by name."""
    held: dict[str, list[tuple[bool, str]]] = {}
    for name, _ in tree():
        folder, _, own = name.rstrip("/").rpartition("/")
        held.setdefault(folder, []).append((name.endswith("/"), own))
    for folder, inner in held.items():
        assert not folder or inner == sorted(inner), folder


def test_the_order_of_layers_is_the_tests_own() -> None:
    order = ARCHITECTURE.read_text().partition("    printable <")[2].partition("\n\n")[0]
    told = [names.split() for names in f"printable <{order}".split("<")]
    parsed = ast.parse((ROOT / "tests" / "test_layers.py").read_text())
    (layers,) = (
        ast.literal_eval(node.value)
        for node in parsed.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS"
    )
    assert [sorted(names) for names in told] == [sorted(names) for names in layers]


def test_the_front_door_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= README_BYTES


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        if heading:
            titles = re.findall(r"^#+ (.+)$", linked.read_text(), re.M)
            assert heading in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_are_there(page: Path) -> None:
    """A path with a folder is found from one of the roots, a bare name anywhere."""
    names = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    for path in re.findall(r"(?<![\w/<>.{}*])([\w.-]+(?:/[\w.-]+)*\.py)\b", page.read_text()):
        if "/" in path:
            assert any((root / path).is_file() for root in ROOTS), f"{page.name} names {path}"
        else:
            assert path in names, f"{page.name} names {path}"


def test_cases_that_wait_for_test_all_are_told_with_a_reason() -> None:
    told = (ROOT / "docs" / "testing.md").read_text()
    marks = re.compile(r"^from cases import|mark\.exhaustive", re.M)
    tests = [path for path in (ROOT / "tests").rglob("test_*.py") if marks.search(path.read_text())]
    # Two that speak of the marks only.
    waiting = {path.name for path in tests} - {"test_harness.py", "test_docs.py"}
    assert len(waiting) > 5
    assert set(re.findall(r"^\| `(test_\w+\.py)`", told, re.M)) == waiting


def test_the_page_of_families_has_each_once() -> None:
    """Sorted within the table, and every recipe that it names is there."""
    page = (ROOT / "docs" / "families.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \|[^|]*\|([^|]*)\|", page.partition("|---|")[2], re.M)
    assert [name for name, _ in rows] == known_model_types()
    recipes = {name for _, told in rows for name in re.findall(r"`([^`]+)`", told)}
    assert recipes and recipes <= set(recipe_names())


def options() -> set[str]:
    """Return the flags of all commands."""
    context = click.Context(cli)
    commands = [cli.get_command(context, name) for name in cli.list_commands(context)]
    return {
        word
        for command in commands
        if command is not None
        for parameter in command.params
        for word in (*parameter.opts, *parameter.secondary_opts)
    }


@pytest.mark.parametrize("page", [p for p in PAGES if "benchmarks" not in str(p.id)])
def test_flags_that_are_named_are_there(page: Path) -> None:
    known = options()
    for line in page.read_text().splitlines():
        # Scripts and other programs have flags of their own.
        if not re.search(r"\bpython |\bpip |\bmypy |\bgit |\bruff |\bcmake ", line):
            for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", line):
                assert flag in known, f"{page.name} names {flag}"


PARTS = ("llm_coreml", "cpp", "eval", "recipes")
SCRIPTS = ("scripts", "benchmarks", "tests")
# `config.json` is a file of a model, `program.fbs` one of a library.
FILES = {"bin", "fbs", "json", "safetensors"}


def docstrings(*tops: str) -> Iterator[tuple[str, str]]:
    """Yield where it stands, and the text, of every docstring in these folders."""
    for path in sorted(path for top in tops for path in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                where = f"{path.relative_to(ROOT)}:{getattr(node, 'name', '')}"
                yield where, ast.get_docstring(node) or ""


def defined(path: Path) -> set[str]:
    """Return the names that a module or a room has: definitions, imports, and the files in it."""
    inner = path.glob("*") if path.is_dir() else ()
    found = {each.stem for each in inner if each.is_dir() or each.suffix == ".py"}
    source = path / "__init__.py" if path.is_dir() else path
    for node in ast.parse(source.read_text()).body if source.is_file() else ():
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id for name in targets if isinstance(name, ast.Name)}
    return found


def resolves(name: str, places: Sequence[Path]) -> bool:
    """Return whether a dotted name leads from one of `places` to a module or a definition."""
    first, _, rest = name.partition(".")
    inner = [each for place in places for each in (place / first, place / f"{first}.py")]
    inside = [path for path in inner if path.exists()]
    if not rest:
        return bool(inside) or any(first in defined(place) for place in places)
    # What a class has is its own affair.
    return resolves(rest, inside) or any(first in defined(p) for p in places if p.is_file())


def test_names_in_docstrings_are_there() -> None:
    files = [path for part in PARTS for path in [ROOT / part, *(ROOT / part).rglob("*")]]
    rooms = [path for path in files if path.is_dir() and path.name != "__pycache__"]
    known = {path.name for path in rooms} | {path.stem for path in files if path.suffix == ".py"}
    found = [
        (where, name)
        for where, text in docstrings(*PARTS)
        for name in re.findall(r"`([a-z_]+(?:\.\w+)+)`", text)
        if name.split(".")[0] in known and name.split(".")[-1] not in FILES | {"py"}
    ]
    assert len(found) > 5
    assert [each for each in found if not resolves(each[1], rooms)] == []


def test_files_in_docstrings_are_there() -> None:
    pattern = r"(?<![\w/<>.{}*])([\w-]+(?:/[\w.-]+)+\.py)\b"
    found = [
        (where, path)
        for where, text in docstrings(*PARTS, *SCRIPTS)
        for path in re.findall(pattern, text)
    ]
    assert len(found) > 5
    assert [each for each in found if not any((r / each[1]).is_file() for r in ROOTS)] == []
