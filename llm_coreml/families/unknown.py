"""What is said of a `model_type` that has no family, and when it may be read as another.

refusal("mixtral", config, known)                 # what it is, and what it is near to
offer(config, shapes, known, load)                # "Its tensors are those of 'llama': ..."
check_renamed(config, "llama", has_own=False)     # raises if something would be lost
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm_coreml.checkpoint.checkpoint import listing
from llm_coreml.errors import UnsupportedError, nearest
from llm_coreml.families.family import Family
from llm_coreml.families.known_types import known_of
from llm_coreml.families.likeness import nearest_type, readable_as, unread
from llm_coreml.families.shape import changes_values, shape_of
from llm_coreml.printable import printable

_PAGE = "CONTRIBUTING.md tells under 'A model family' how one is added."


def refusal(model_type: str, config: Mapping[str, Any], known: Sequence[str]) -> str:
    """Return what to say of a model_type without a family.

    Args:
        model_type: As `config.json` has it.
        config: The whole of it.
        known: The model types that have a family, those first that are preferred.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    shape, why = shape_of(config), known_of(model_type)
    told = [
        f"model_type '{printable(model_type, 60)}' is not supported; supported are "
        f"{', '.join(sorted(known))}."
    ]
    if why is not None:
        told.append(why.sentence)
    elif model_type not in CONFIG_MAPPING_NAMES:
        told.append(
            "transformers has no such architecture either: it is misspelt, or brings code of its "
            f"own, which is not run.{nearest(model_type, known)}"
        )
    near = nearest_type(config, known) if shape.dense else None
    to = "" if near is None else f"nearest to '{near}': "
    told.append(f"By its config.json it is {to}{shape.told}.")
    return " ".join([*told, _PAGE])


def offer(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    known: Sequence[str],
    load: Callable[[str], Family],
) -> str:
    """Return a sentence on the family whose tensors a checkpoint has, an empty one if none.

    Args:
        config: `config.json`.
        shapes: Of the checkpoint's tensors, by name.
        known: The model types that have a family, those first that are preferred.
        load: Returns one.
    """
    names = readable_as(config, shapes, known, load)
    if not names:
        return ""
    lost = _lost(config, names[0])
    if lost:
        return (
            f"Its tensors are those of '{names[0]}', but its config.json gives {listing(lost)}, "
            "which that family does not have."
        )
    return (
        f"Its tensors are those of '{names[0]}': if it is that under another name, give --family "
        f"{names[0]}."
    )


def check_renamed(config: Mapping[str, Any], family: str, has_own: bool) -> None:
    """Refuse to read a configuration as that of a family, where something would be lost.

    Args:
        config: `config.json`.
        family: What it is to be read as.
        has_own: Its model_type has a family.

    Raises:
        UnsupportedError: it has a family of its own, or settings that change what is computed.
    """
    own = printable(str(config.get("model_type")), 60)
    if has_own:
        raise UnsupportedError(
            f"--family {family}: config.json gives model_type '{own}', which has a family of its "
            "own; drop --family."
        )
    lost = _lost(config, family)
    if lost:
        raise UnsupportedError(
            f"--family {family}: config.json gives {listing(lost)}, which that family does not "
            f"have: it would compute something else. {_PAGE}"
        )


def note_of_renamed(config: Mapping[str, Any], family: str) -> str:
    """Return what to know of a configuration that is read as that of a family."""
    told = (
        f"config.json gives model_type '{config.get('model_type')}', which is read as '{family}' "
        "as --family has it"
    )
    passed = sorted(unread(config, family))
    return f"{told}; its {listing(passed)} are passed over." if passed else f"{told}."


def _lost(config: Mapping[str, Any], family: str) -> list[str]:
    """Return the settings that change what a model computes, and that a family does not have."""
    return [
        f"{key} = {printable(str(value), 30)}"
        for key, value in unread(config, family).items()
        if changes_values(key)
    ]
