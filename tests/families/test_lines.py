"""A family that shares the block of the others is a small file: lines of code are counted."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import pytest

import llm_coreml.families
from llm_coreml.families import known_model_types

FOLDER = Path(llm_coreml.families.__file__).parent
MOST = 60
# What is no file of one family.
SHARED = {
    *("__init__", "family", "fields", "dense", "names", "windows", "rotary", "arrangements"),
    *("gpt", "layered", "gemma_parts", "shape", "unknown", "likeness", "known_types"),
}
FILES = sorted(path for path in FOLDER.glob("*.py") if path.stem not in SHARED)
# Whose blocks are their own.
LARGER: dict[str, int] = {"falcon": 70, "gemma4_text": 170, "gpt_neo": 70, "opt": 85}
_NOT_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    tokenize.ENDMARKER,
}


def lines_of_code(source: str) -> int:
    """Count lines that are neither empty nor a comment nor a docstring."""
    told: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        kinds = (ast.Module, ast.FunctionDef, ast.ClassDef)
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            told |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NOT_CODE:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - told)


def test_lines_are_counted() -> None:
    assert (
        lines_of_code('"""A.\n\nB."""\n\n# c\nx = (\n    1,\n)\n\ndef f():\n    "d"\n    y()\n')
        == 5
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_family_is_a_small_file(path: Path) -> None:
    assert lines_of_code(path.read_text()) < LARGER.get(path.stem, MOST)


def test_there_is_a_file_for_each_few_families() -> None:
    assert len(FILES) <= len(known_model_types()) + 1
