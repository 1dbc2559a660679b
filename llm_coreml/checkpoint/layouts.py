"""The ordinary names of tensors that a checkpoint stores under others.

    layout = ordinary_names(["_orig_mod.model.norm.weight", "_orig_mod.lm_head.weight"])
    layout.names     # {'model.norm.weight': '_orig_mod.model.norm.weight', ...}
    layout.notes     # what was read otherwise than it stands there

Ordinary is what `save_pretrained` of a causal LM writes: `model.` before all but the head. Wrappers
of a model (torch.compile, FSDP, DeepSpeed, PEFT) add parts to names, and a model saved without its
head lacks `model.`. Whatever cannot be told with certainty keeps the name that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import final

from llm_coreml.checkpoint.checkpoint import listing

# Parts of a name that belong to no model, wherever they stand, and what puts them there.
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_forward_module": "Lightning Fabric",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
# The same of parts that stand in front only.
_FRONTS = {
    "module": "DataParallel or DeepSpeed",
    "base_model": "PEFT",
    "pretrained_model": "TRL",
}
# Names of the text model inside of a model of several modalities.
_TEXTS = frozenset({"language_model", "text_model", "llm", "vlm"})
_MODEL = "model"
_HEAD = "lm_head"
# What is inside of the model, and what is beside it.
_INNER = (
    "embed_tokens", "embed_tokens_per_layer", "layers", "norm", "per_layer_model_projection",
    "per_layer_projection_norm", "rotary_emb",
)  # fmt: skip
_OUTER = (_HEAD, "score", "v_head")

TABLE_WEIGHT, HEAD_WEIGHT = "model.embed_tokens.weight", "lm_head.weight"


@final
@dataclass(frozen=True)
class Layout:
    """How a checkpoint names its tensors.

    Attributes:
        names: The stored name of each tensor, by the ordinary one.
        notes: What was read otherwise than it stands there, a sentence each.
        beside: The stored names of what is no part of the text model.
    """

    names: dict[str, str]
    notes: tuple[str, ...]
    beside: tuple[str, ...] = ()


def ordinary_names(
    stored: Collection[str], tied: Callable[[], bool] | None = None, among_others: bool = False
) -> Layout:
    """Find the ordinary name of each tensor.

    Args:
        stored: The names in the files.
        tied: Says whether the configuration has the head as the token table; asked where only one
            of both is stored. None where it has not.
        among_others: The text model is a part of a model of several modalities.
    """
    beside = tuple(sorted(name for name in stored if among_others and not _is_text(name)))
    stored = [name for name in stored if name not in set(beside)]
    ordinary = {name: _unwrapped(name, among_others) for name in stored}
    within_model = any(name.startswith(f"{_MODEL}.") for name in stored)
    taken = {name for name in stored if ordinary[name] == name}
    bare = False
    wrappers: dict[str, str] = {}
    for name in (each for each in stored if ordinary[each] != each):
        lacks_model = ordinary[name] == f"{_MODEL}.{name}"
        if ordinary[name] in taken or (lacks_model and within_model):
            ordinary[name] = name
            continue
        taken.add(ordinary[name])
        bare |= lacks_model
        wrappers |= {} if lacks_model else _wrappers_of(name, among_others)
    names = {ordinary[name]: name for name in stored}
    notes = []
    if wrappers:
        told = [f"'{part}.' ({tool})" for part, tool in sorted(wrappers.items())]
        notes.append(f"Names of tensors are read without {listing(told)}.")
    if bare:
        notes.append(f"Names of tensors are read with '{_MODEL}.', as of a model without its head.")
    alone = within_model and HEAD_WEIGHT in names and TABLE_WEIGHT not in names
    if alone and tied is not None and tied():
        names[TABLE_WEIGHT] = names.pop(HEAD_WEIGHT)
        notes.append(f"The token table, which is also the head, is read from '{HEAD_WEIGHT}'.")
    return Layout(names, tuple(notes), beside)


def ordinary_name(name: str) -> str:
    """Return the ordinary name of a tensor or module of a model of several modalities."""
    return _unwrapped(name, among_others=True)


def _is_text(name: str) -> bool:
    """Say whether a tensor of a model of several modalities is one of its text model."""
    fronts, rest = _split(name)
    return _within_text(fronts) or rest[0] in (*_INNER, *_OUTER)


def _within_text(fronts: Collection[str]) -> bool:
    return not _TEXTS.isdisjoint(fronts)


def _wrappers_of(name: str, among_others: bool) -> dict[str, str]:
    """Return the parts of `name` that wrappers added, and what adds each."""
    known = {**_WRAPPERS, **_FRONTS}
    found = {part: known[part] for part in name.split(".") if part in known}
    fronts = [part for part in _split(name)[0] if part in _TEXTS]
    if not among_others:
        found |= {part: "a model of several modalities" for part in fronts}
    return found if found or fronts else {_MODEL: "a module around the model"}


def _split(name: str) -> tuple[list[str], list[str]]:
    """Return the parts of a name that stand around the model, and those of the tensor in it."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS] or [name]
    at = 0
    while at < len(parts) - 1 and parts[at] in (_MODEL, *_FRONTS, *_TEXTS):
        at += 1
    return parts[:at], parts[at:]


def _unwrapped(name: str, among_others: bool) -> str:
    """Return a name without the parts that wrappers add, with `model.` where it belongs."""
    fronts, rest = _split(name)
    if rest[0] in _OUTER:
        return ".".join(rest)
    inside = rest[0] in _INNER or (among_others and _within_text(fronts))
    return ".".join([_MODEL, *rest]) if inside else name
