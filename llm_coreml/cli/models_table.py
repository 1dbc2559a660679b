"""The Core ML models of a program as tables: what each takes and is made of, and what runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group

from llm_coreml.artifact.description import WEIGHTS
from llm_coreml.cli.cells import plain

if TYPE_CHECKING:  # they bring torch, which a list does not need
    from llm_coreml.inspect.contents import DelegateContents
    from llm_coreml.inspect.extraction import Extraction


def delegate_rows(delegate: DelegateContents) -> dict[str, str]:
    """Return what Core ML is given in a part of a method; nothing of another backend's."""
    model = delegate.model
    if model is None:
        return {}
    used = f"what it uses begins with {model.needed or 'a newer one'}"
    rows = {"runs from": f"{model.declared or 'a newer system'} on; {used}"}
    features = {"input": model.inputs, "output": model.outputs, "state": model.states}
    for kind, shapes in features.items():
        own = [name for name in shapes if not name.startswith(WEIGHTS)]
        rows |= {f"{kind} {name}": shapes[name] for name in own}
        if handed := len(shapes) - len(own):
            rows["further inputs"] = f"{handed} weights, which the method holds"
    for name, count in model.files.items():
        rows[name.rsplit("/", 1)[-1]] = f"{count:,} bytes"
    counts = {op: count for op, count in model.ops.items() if op != "const"}
    if model.ops:
        rows[f"{sum(counts.values())} ops"] = ", ".join(f"{n} {op}" for op, n in counts.items())
    return rows


def extraction_table(found: Extraction) -> Group:
    """Return which models were written, and what runs them."""
    table = plain("model", "bytes", "run by", numeric=["bytes"])
    for model in found.models:
        calls = (
            f"{use.method}, partition {use.partition}: {use.function or 'its default function'}"
            for use in model.used_by
        )
        size = f"{sum(model.files.values()):,}"
        table.add_row(f"{found.folder}/{model.path}", size, "\n".join(calls))
    return Group(table)
