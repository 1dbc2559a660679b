"""What differs between the layers of Gemma 4, from the metadata of a GGUF file.

Layers without a window have heads of another size, and may have another number of heads of keys,
which then make values, too. The last layers may use keys and values of earlier ones, and be twice
as wide.

    own, config, block = of_windows(own, shapes, path)
    own["attention.key_length"]           # 256, of the layers that have a window
    config["global_head_dim"]             # 512
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_coreml.checkpoint.gguf_rope import ADVICE, number
from llm_coreml.errors import CheckpointError, UnsupportedError

_OF_WINDOWS = {
    "attention.key_length": "attention.key_length_swa",
    "attention.value_length": "attention.value_length_swa",
    "rope.dimension_count": "rope.dimension_count_swa",
}
_PATTERN, _SHARED = "attention.sliding_window_pattern", "attention.shared_kv_layers"
_KEYS, _WIDTH = "attention.head_count_kv", "feed_forward_length"
_TABLE = "per_layer_token_embd.weight"


def of_windows(
    own: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Part metadata into that of layers with a window, and what `config.json` says of the others.

    Args:
        own: Metadata of the architecture, without its name.
        shapes: Of all tensors, by their names in the file.
        path: The file.

    Returns:
        The metadata with one number for each size, what is told of other layers, and the block
        that has these sizes: the first with a window.

    Raises:
        CheckpointError: a number is none, or there is not one for each layer.
        UnsupportedError: sizes that `config.json` cannot say.
    """
    count = int(number(own, "block_count", path)) if "block_count" in own else 0
    local = _entries(own, _PATTERN, count, path) if _PATTERN in own else []
    block = next((index for index, each in enumerate(local) if each), 0)
    whole = next((index for index, each in enumerate(local) if not each), None)
    found = {key: value for key, value in own.items() if key not in _OF_WINDOWS.values()}
    found |= {key: own[name] for key, name in _OF_WINDOWS.items() if name in own and any(local)}
    config: dict[str, Any] = {"vocab_size_per_layer_input": shapes.get(_TABLE, (0,))[0]}
    sizes = {number(own, key, path) for key in _OF_WINDOWS if key in own}
    if len(sizes) > 1:
        raise UnsupportedError(
            f"{path} gives layers that see everything heads of {sorted(sizes)}: keys, values and "
            "what RoPE turns differ in size, which is not computed. Give another model."
        )
    if sizes:
        config["global_head_dim"] = sizes.pop()
    if isinstance(own.get(_KEYS), Mapping):
        keys = _entries(own, _KEYS, count, path)
        for kind in (True, False):
            if len({each for each, near in zip(keys, local, strict=False) if near == kind}) > 1:
                raise UnsupportedError(
                    f"{path} gives {_KEYS} = {keys}: layers of one kind differ. {ADVICE}"
                )
        found[_KEYS] = keys[block]
        config["num_global_key_value_heads"] = None if whole is None else keys[whole]
    if whole is not None:
        config["attention_k_eq_v"] = f"blk.{whole}.attn_v.weight" not in shapes
    if isinstance(own.get(_WIDTH), Mapping):
        found[_WIDTH], config["use_double_wide_mlp"] = _width(own, count, path)
    return found, config, block


def _width(own: Mapping[str, Any], count: int, path: Path) -> tuple[Any, bool]:
    """Return the width of the first layers, and whether those that share are twice as wide."""
    widths = _entries(own, _WIDTH, count, path)
    shared = int(number(own, _SHARED, path)) if _SHARED in own else 0
    first, single = widths[0], widths[: max(0, count - shared)]
    for factor in (1, 2):
        if widths == len(single) * [first] + (count - len(single)) * [factor * first]:
            return first, factor == 2
    raise UnsupportedError(
        f"{path} gives {_WIDTH} = {widths}, which config.json cannot say of {count} layers, of "
        f"which the last {shared} share keys and values. {ADVICE}"
    )


def _entries(own: Mapping[str, Any], key: str, count: int, path: Path) -> list[Any]:
    """Return a list of the metadata with an entry for each layer."""
    told = own[key]
    values = told.get("values") if isinstance(told, Mapping) else None
    if values is None or len(values) != count or not count:
        raise CheckpointError(
            f"{path} gives {key} = {told!r}; it must be one entry for each of {count} layers. "
            f"{ADVICE}"
        )
    return list(values)
