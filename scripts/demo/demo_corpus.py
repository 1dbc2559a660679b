"""Collect the text the demo model learns from: the documentation inside Python itself.

The corpus is the language reference (`pydoc_data.topics`) and the docstrings of the
standard library, both under the PSF licence and present in every CPython installation,
so the demo model can be rebuilt without a network. One document is one reference topic
or one module. Whole documents are held out by a fixed seed.

Example:
    python scripts/demo/demo_corpus.py
"""

import ast
import importlib
import importlib.machinery
import importlib.util
import inspect
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

SKIPPED_PARTS = frozenset(
    {
        "__pycache__",
        "_bundled",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
# Importing these opens a window or a browser, or they are missing on many systems.
SKIPPED_MODULES = frozenset({"_curses", "_curses_panel", "_tkinter", "antigravity", "this"})
SKIPPED_PREFIXES = ("_test", "_xx", "xx", "_ctypes_test")
HELDOUT_BYTES = 140_000
VALIDATION_BYTES = 70_000
SHORT_PARAGRAPH = 16


@dataclass(frozen=True)
class Section:
    """One docstring below the line that introduces it; a module's own has no header."""

    header: str
    body: str

    @property
    def text(self) -> str:
        """The section as it stands in the corpus."""
        return f"{self.header}\n{self.body}" if self.header else self.body


@dataclass(frozen=True)
class Document:
    """One topic of the reference or one module of the standard library."""

    name: str
    sections: tuple[Section, ...]

    @property
    def text(self) -> str:
        """All sections, separated by an empty line."""
        return "\n\n".join(section.text for section in self.sections)


@dataclass(frozen=True)
class Corpus:
    """Disjoint documents: to train on, to choose the checkpoint with, to report on."""

    train: list[Document]
    validation: list[Document]
    heldout: list[Document]


def tidy(text: str) -> str:
    """Strip trailing blanks, expand tabs and collapse runs of empty lines."""
    lines = "\n".join(line.rstrip() for line in text.expandtabs(8).splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).strip()


def reference_documents() -> list[Document]:
    """Return the language reference, one document per topic."""
    return [
        Document(f"topic:{name}", (Section("", tidy(text)),))
        for name, text in sorted(topics.items())
    ]


def definition_header(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    """Return the header line of a definition, as it would be written in source."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    return f"def {node.name}({ast.unparse(node.args)}):"


def docstring_sections(body: ast.AST) -> Iterator[Section]:
    """Yield each docstring below a node in source order."""
    for node in ast.iter_child_nodes(body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            doc = tidy(ast.get_docstring(node, clean=True) or "")
            if doc:
                yield Section(definition_header(node), doc)
        yield from docstring_sections(node)


def source_sections(path: Path) -> list[Section]:
    """Return a module's own docstring and those of everything defined in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(path.read_bytes())
    own = tidy(ast.get_docstring(tree, clean=True) or "")
    return ([Section("", own)] if own else []) + list(docstring_sections(tree))


def source_documents() -> list[Document]:
    """Return one document per standard library module written in Python."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_PARTS.isdisjoint(relative.parts) and relative.stem not in SKIPPED_MODULES:
            name = relative.with_suffix("").as_posix().replace("/", ".")
            documents.append(Document(f"module:{name}", tuple(source_sections(path))))
    return documents


def extension_module_names() -> list[str]:
    """Return the standard library modules that are written in C and safe to import."""
    names = []
    for name in sorted(sys.stdlib_module_names - SKIPPED_MODULES):
        if name.startswith(SKIPPED_PREFIXES):
            continue
        spec = importlib.util.find_spec(name)
        if spec and (
            spec.origin == "built-in"
            or isinstance(spec.loader, importlib.machinery.ExtensionFileLoader)
        ):
            names.append(name)
    return names


def extension_sections(name: str) -> Iterator[Section]:
    """Yield the docstrings of a C module, its public callables and their methods."""
    module = importlib.import_module(name)
    yield Section("", tidy(inspect.getdoc(module) or ""))
    for attribute, value in sorted(vars(module).items()):
        if attribute.startswith("_") or not callable(value):
            continue
        yield Section(attribute, tidy(inspect.getdoc(value) or ""))
        if inspect.isclass(value):
            for member, entry in sorted(vars(value).items()):
                doc = getattr(entry, "__doc__", None)
                if callable(entry) and isinstance(doc, str):
                    yield Section(f"{attribute}.{member}", tidy(inspect.cleandoc(doc)))


def extension_documents() -> list[Document]:
    """Return one document per standard library module written in C."""
    return [
        Document(f"module:{name}", tuple(s for s in extension_sections(name) if s.body))
        for name in extension_module_names()
    ]


def without_repeats(documents: list[Document]) -> list[Document]:
    """Keep the first of identical docstrings and drop documents left without any."""
    seen: set[str] = set()
    kept = []
    for document in documents:
        sections = []
        for section in document.sections:
            key = " ".join(section.body.split())
            if key not in seen:
                seen.add(key)
                sections.append(section)
        if sections:
            kept.append(Document(document.name, tuple(sections)))
    return kept


def family(document: Document) -> str:
    """Name the group that must not be split: `_pydecimal` belongs with `decimal`."""
    kind, _, name = document.name.partition(":")
    if kind == "topic":
        return document.name
    top = name.split(".")[0].strip("_")
    return top.removeprefix("py") if top in {"pydecimal", "pyio", "pydatetime"} else top


def paragraphs(text: str) -> list[str]:
    """Split text at empty lines."""
    return [part for part in re.split(r"\n\n+", text) if part.strip()]


def without_seen_paragraphs(documents: list[Document], seen: set[str]) -> list[Document]:
    """Drop from documents the paragraphs whose words already stand in `seen`."""
    kept = []
    for document in documents:
        sections = []
        for section in document.sections:
            fresh = [p for p in paragraphs(section.body) if " ".join(p.split()) not in seen]
            if sum(map(len, fresh)) >= SHORT_PARAGRAPH:
                sections.append(Section(section.header, "\n\n".join(fresh)))
        if sections:
            kept.append(Document(document.name, tuple(sections)))
    return kept


def size(documents: list[Document]) -> int:
    """Return the number of UTF-8 bytes in documents."""
    return sum(len(document.text.encode()) for document in documents)


def take(families: list[list[Document]], wanted: int) -> list[Document]:
    """Move families into a new part until it has the wanted size.

    A family that would make up a sixth of the part or more stays behind, so that the part
    is a mixture and not one large package.
    """
    taken: list[Document] = []
    for group in list(families):
        if size(taken) >= wanted:
            break
        if size(group) < wanted // 6:
            families.remove(group)
            taken.extend(group)
    return taken


def build_corpus(seed: int) -> Corpus:
    """Collect all documents and split them by family."""
    documents = without_repeats(reference_documents() + source_documents() + extension_documents())
    groups: dict[str, list[Document]] = {}
    for document in documents:
        groups.setdefault(family(document), []).append(document)
    families = [groups[name] for name in sorted(groups)]
    random.Random(seed).shuffle(families)
    heldout = take(families, HELDOUT_BYTES)
    validation = take(families, VALIDATION_BYTES)
    train = [document for group in families for document in group]
    seen = {
        " ".join(paragraph.split())
        for document in train + validation
        for section in document.sections
        for paragraph in paragraphs(section.body)
    }
    return Corpus(train, validation, without_seen_paragraphs(heldout, seen))


def main() -> None:
    """Print the size and the first names of each part."""
    corpus = build_corpus(seed=0)
    for label, part in vars(corpus).items():
        names = ", ".join(document.name for document in part[:60])
        print(f"{label}: {len(part)} documents, {size(part)} bytes: {names}")


if __name__ == "__main__":
    main()
