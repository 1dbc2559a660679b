"""`docs/targets.md` says which forms of a program each target takes, and is made from the code.

python tests/lower/test_targets_table.py      # writes the table anew
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_coreml.config import ExportConfig, resolve
from llm_coreml.config.values import SKIPPED
from llm_coreml.errors import LlmCoreMLError
from llm_coreml.lower.forms import FORMS
from llm_coreml.lower.shares import cut_of
from llm_coreml.quantize import make_plan
from llm_coreml.targets import BACKENDS, TARGETS

DOCUMENT = Path(__file__).parents[2] / "docs" / "targets.md"
BEGIN, END = "<!-- the table: made by tests/lower/test_targets_table.py -->\n", "<!-- end -->\n"
LENGTHS: dict[str, dict[str, Any]] = {
    "several, `1,8,64,512`": {"seq_lengths": (1, 8, 64, 512)},
    "a range, `1..512`": {"seq_lengths": "1..512"},
    "one, `1`": {"seq_lengths": (1,)},
    "one, `64`": {"seq_lengths": (64,)},
    "`--functions prefill:512,decode:1`": {"functions": "prefill:512,decode:1"},
}
# What lies in partitions, or outside of Core ML; each goes with all lengths of a kind.
_SEVERAL = {"seq_lengths": (1, 8, 64, 512)}
LENGTHS |= {
    "several, `--split embedding,head`": {**_SEVERAL, "split": ("embedding", "head")},
    "several, `--partition-size 200KB`": {**_SEVERAL, "partition_size": 200_000},
    "several, `--skip-ops aten.embedding.default`": {**_SEVERAL, "skip_ops": SKIPPED[:1]},
    "several, `--constants inputs --bits 16`": {**_SEVERAL, "constants": "inputs"},
    "a range, `--split head`": {"seq_lengths": "1..512", "split": ("head",)},
    "`--functions prefill:512,decode:1`, `--split head`": {
        "functions": "prefill:512,decode:1",
        "split": ("head",),
    },
}
# Plain weights: what formats a system has is another table's.
PLAIN: dict[str, Any] = {"context": 512, "bits": 16}
CACHES = ("state", "inputs")
SYSTEMS = ("iOS18", "iOS16")


def table() -> tuple[list[str], list[str]]:
    """Return the lines of the table, and those of the reasons that it refers to."""
    from tiny import small_spec

    spec = small_spec(max_position_embeddings=512)
    columns = [f"`--target {name}`" for name in TARGETS]
    columns += [f"`--backend {name}`" for name, each in BACKENDS.items() if not each.has_targets]
    reasons: list[str] = []
    lines = [
        "| lengths | cache | from | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for (lengths, settings), cache, system in itertools.product(LENGTHS.items(), CACHES, SYSTEMS):
        cells = []
        for chosen in _columns(system):
            try:
                job = resolve(
                    ExportConfig(**{**PLAIN, "kv_cache": cache, **settings, **chosen}), spec
                )
                (form,) = [form for form in FORMS if form.fits(job)]
                count = len(cut_of(job, spec, make_plan(job, spec)).shares)
                cells.append(f"{form.name}, {count} partitions" if count > 1 else form.name)
            except LlmCoreMLError as error:
                told = str(error)
                if told not in reasons:
                    reasons.append(told)
                cells.append(f"refused ({reasons.index(told) + 1})")
        lines.append(f"| {lengths} | {cache} | {system} | " + " | ".join(cells) + " |")
    return lines, [f"{number}. {told}" for number, told in enumerate(reasons, 1)]


def _columns(system: str) -> Iterator[dict[str, Any]]:
    for name in TARGETS:
        yield {"target": name, "minimum_os": system}
    for name, each in BACKENDS.items():
        if not each.has_targets:
            yield {"backend": name}


def text() -> str:
    """Return what stands between the marks."""
    lines, reasons = table()
    return "\n".join(["", *lines, "", *reasons, "", ""])


def test_the_document_has_the_table_of_today() -> None:
    written = DOCUMENT.read_text(encoding="utf-8")
    assert written.partition(BEGIN)[2].partition(END)[0] == text()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_in_the_table(form: Any) -> None:
    assert any(f"| {form.name} |" in line for line in table()[0])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    DOCUMENT.write_text(before + BEGIN + text() + END + rest.partition(END)[2], encoding="utf-8")
