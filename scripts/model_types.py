"""Write `docs/model-types.md`: what becomes of every causal LM that `transformers` has.

python scripts/model_types.py > docs/model-types.md
"""

from __future__ import annotations

from collections.abc import Iterator

from llm_coreml.families import known_model_types
from llm_coreml.families.known_types import known_names, known_of

_TITLES = {
    "planned": ("Planned", "Not exported yet; the decoder will learn what they need."),
    "dense": ("Possible", "Dense decoders that have no family yet."),
    "inside": ("Read as what is inside", "Their text models have a `model_type` of their own."),
    "other": ("Not planned", "What stands against each."),
}
_HEAD = """# Model types

What becomes of every `model_type` that `transformers` has a causal LM for. A test compares this
page with its list and with the families of this package; `python scripts/model_types.py` writes it.
What is not here brings code of its own: where its tensors are those of a family that is here, the
error says so, and `--family` has it read as one.
"""


def page() -> Iterator[str]:
    """Yield the lines of the page."""
    built = known_model_types()
    yield _HEAD
    yield f"## Exported\n\n{_listed(built)}\n"
    for outlook, (title, told) in _TITLES.items():
        kinds: dict[str, list[str]] = {}
        for name in known_names():
            known = known_of(name)
            if known is not None and known.outlook == outlook and name not in built:
                kinds.setdefault(known.what, []).append(name)
        if kinds:
            yield f"## {title}\n\n{told}\n\n| it is | `model_type` |\n|---|---|"
            for what, names in sorted(kinds.items()):
                yield f"| {what} | {_listed(names)} |"
            yield ""


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    print("\n".join(page()).rstrip())
