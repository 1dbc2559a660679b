"""Hold the tensors of a checkpoint against what its configuration promises.

    notes = check_tensors(checkpoint, {"model.norm.weight": (2048,), ...})

Everything that can be wrong is told by file and tensor, before any work is spent. What lies beside
and changes nothing is left out and told; what is arranged in another way is named, with the way to
convert it; the rest disagrees with the configuration.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from llm_coreml.checkpoint.checkpoint import (
    WEIGHT_DTYPES,
    Checkpoint,
    listing,
    matches,
    quoted,
    type_name,
)
from llm_coreml.checkpoint.conversions import conversion_of
from llm_coreml.checkpoint.layouts import HEAD_WEIGHT, TABLE_WEIGHT
from llm_coreml.checkpoint.packed import names_quantization
from llm_coreml.errors import CheckpointError, UnsupportedError

Shape = tuple[int, ...]

_TOKENS = {TABLE_WEIGHT, HEAD_WEIGHT}

# What no logits depend on, and what it is.
_BESIDE = (
    ("ranges of a quantized cache", ("*.[kvq]_scale", "*.kv_scale", "*.[kvq]_proj.output_scale")),
    (
        "tables that are computed anew",
        ("*.rotary_emb.*", "*.masked_bias", "*.causal_mask", "*.position_ids"),
    ),
    ("a value head", ("v_head.*",)),
    ("layers that predict further tokens", ("model.mtp_layers.*", "mtp.*")),
)


def beside(name: str) -> bool:
    """Say whether no logits depend on a tensor of this name, whatever the model."""
    return any(matches(name, patterns) for _, patterns in _BESIDE)


@dataclass
class _Findings:
    """Where a checkpoint parts from its promise.

    Attributes:
        missing: Names that it lacks.
        surplus: Names that nobody asked for.
        shapes: Name, shape found and shape promised.
        types: Sentences about types that no weight has.
    """

    missing: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)
    shapes: list[tuple[str, Shape, Shape]] = field(default_factory=list)
    types: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.missing or self.surplus or self.shapes or self.types)


def check_tensors(
    checkpoint: Checkpoint,
    expected: Mapping[str, Shape],
    optional: Collection[str] = (),
) -> tuple[str, ...]:
    """Check that the checkpoint holds the tensors that its configuration promises, and no others.

    Args:
        checkpoint: An open checkpoint; of its data only biases that nobody asked for are read.
        expected: The shape of each tensor, by name.
        optional: Glob patterns of tensors that may be there though nothing reads them, such as
            `*.rotary_emb.inv_freq`.

    Returns:
        What lies beside and is left out, a sentence each.

    Raises:
        CheckpointError: Tensors are missing, surplus, of another shape, or not of a weight's type;
            all of them are in the one message, the first five of each kind by name.
        UnsupportedError: The tensors are arranged in a way that is known and not read.
    """
    found = _compare(checkpoint, expected, optional)
    notes = list(_set_aside(checkpoint, found))
    if not found:
        return tuple(notes)
    source = f"'{checkpoint.source.name}'"
    if any(0 in shape for _, shape, promised in found.shapes if 0 not in promised):
        empty = quoted(name for name, shape, _ in found.shapes if 0 in shape)
        raise UnsupportedError(
            f"{source} holds {len(empty)} tensors without values: {listing(empty)}. DeepSpeed "
            "ZeRO-3 saved its placeholders; get the weights by python zero_to_fp32.py . FOLDER "
            "--safe_serialization, in the folder of the training."
        )
    quantized = names_quantization(checkpoint.config)
    answer = conversion_of(found.surplus, quantized)
    if answer:
        raise UnsupportedError(f"{source} holds tensors {answer}")
    raise CheckpointError(
        f"{source} does not hold the tensors that its config.json promises; "
        f"{'; '.join(_problems(checkpoint, found))}. {_next_step(found)}"
    )


def _compare(
    checkpoint: Checkpoint, expected: Mapping[str, Shape], optional: Collection[str]
) -> _Findings:
    names, tied, found = checkpoint.names(), checkpoint.tied(), _Findings()
    for name, shape in expected.items():
        if name not in names and name not in tied:
            found.missing.append(name)
            continue
        if checkpoint.shape(name) != tuple(shape):
            found.shapes.append((name, checkpoint.shape(name), tuple(shape)))
        if checkpoint.dtype(name) not in WEIGHT_DTYPES:
            stored = type_name(checkpoint.dtype(name))
            found.types.append(f"'{name}' in {checkpoint.where(name)} is {stored}")
    found.surplus = [
        name for name in sorted(names - expected.keys()) if not matches(name, optional)
    ]
    return found


def _set_aside(checkpoint: Checkpoint, found: _Findings) -> Iterator[str]:
    """Take out of the surplus what changes nothing, and yield what it is."""
    kinds = [
        (kind, [name for name in found.surplus if matches(name, patterns)])
        for kind, patterns in _BESIDE
    ]
    kinds.append(
        (
            "biases that are zero",
            [
                name
                for name in found.surplus
                if name.endswith(".bias") and not bool(checkpoint.stored(name).any())
            ],
        )
    )
    for kind, names in kinds:
        if names:
            yield f"{len(names)} tensors are left out, {kind}: {listing(quoted(names), limit=2)}."
            found.surplus = [name for name in found.surplus if name not in set(names)]


def _problems(checkpoint: Checkpoint, found: _Findings) -> Iterator[str]:
    """Yield what is wrong, a clause for each kind."""
    shapes = [
        f"'{name}' in {checkpoint.where(name)} is {list(shape)}, not {list(promised)}"
        for name, shape, promised in found.shapes
    ]
    for items, kind in (
        (quoted(found.missing), "missing"),
        (quoted(found.surplus), "surplus"),
        (shapes, "misshapen"),
        (found.types, "not bfloat16, float16 or float32"),
    ):
        if items:
            yield f"{len(items)} {kind}: {listing(items)}"


def _next_step(found: _Findings) -> str:
    """Return what to do about a checkpoint that is none of the known arrangements."""
    if found.missing == [HEAD_WEIGHT] and "score.weight" in found.surplus:
        return "It is a classifier: give the causal LM that it was trained from."
    if found.missing == [HEAD_WEIGHT] and not (found.surplus or found.shapes or found.types):
        return (
            "It was saved without its head, as AutoModel and LlamaModel do: save it from "
            "AutoModelForCausalLM. If its head is the token table, set tie_word_embeddings to true "
            "in config.json."
        )
    if found.missing == [TABLE_WEIGHT] and not (found.surplus or found.shapes or found.types):
        return (
            "If its head is the token table, set tie_word_embeddings to true in config.json; else "
            "save the model again."
        )
    if found.surplus and all(name.endswith(".bias") for name in found.surplus):
        return (
            "The biases are not zero, and transformers would leave them out. If the model was "
            "trained with them, set attention_bias or mlp_bias to true in config.json; if not, "
            "remove them."
        )
    rows = {shape[0] for name, shape, _ in found.shapes if shape and name in _TOKENS}
    if len(rows) == 1 and {name for name, _, _ in found.shapes} <= _TOKENS:
        return (
            f"If tokens were added to the model, set vocab_size to {rows.pop()} in config.json; "
            "else use config.json and weights of one and the same model, or download both again."
        )
    return "Use config.json and weights of one and the same model, or download both again."
