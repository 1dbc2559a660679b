"""The Core ML lowering of the ops that write states, of GELU, and of rounding to 8 bits.

Importing the module registers them with coremltools; the partitioner then accepts them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil._deployment_compatibility import AvailableTarget
from coremltools.converters.mil.frontend._utils import is_current_opset_version_compatible_with
from coremltools.converters.mil.frontend.torch.ops import _get_inputs
from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op
from coremltools.converters.mil.mil import types
from torch._library.custom_ops import CustomOpDef

from llm_coreml.decoder import caches, eight_bit


def _names(write: CustomOpDef) -> list[str]:
    """Return what coremltools may call the op that writes a kind of state."""
    return [write._qualname, write._qualname.replace("::", ".")]


@register_torch_op(torch_alias=_names(caches.kv_write), override=True)  # type: ignore[untyped-decorator]
def kv_write(context: Any, node: Any) -> None:
    """Lower a cache write to `slice_update` on the cache's value, and a state write right after.

    A cache that is an input of the program is no state.

    coremltools itself would chain all updates and write the state once at the end, which leaves
    no update next to its state for the compiler to do in place.
    """
    cache, update, layer, start = _get_inputs(context, node, expected=4)
    state = context.name_to_source_state.get(node.inputs[0])
    length = mb.slice_by_index(x=mb.shape(x=update), begin=[2], end=[3])
    _add(context, node, state, _written(state, cache, update, int(layer.val), start, length))


@register_torch_op(torch_alias=_names(caches.ring_write), override=True)  # type: ignore[untyped-decorator]
def ring_write(context: Any, node: Any) -> None:
    """Lower a write to a ring to two pieces of the update's length, each in place.

    Shapes must follow from those of inputs, so no piece can be as long as what is left of the ring.
    The last piece ends with the ring, and begins with what lies there before `place`; the first one
    begins at 0, and ends with what lies there. Both are cut out of
    `[what is before place, update, what is behind the wrapped part]`. If nothing wraps, the first
    is what lies there already, and the last is the update: so it comes last.
    """
    cache, update, layer, place, count = _get_inputs(context, node, expected=5)
    state = context.name_to_source_state.get(node.inputs[0])
    (_, heads, size, width), row = cache.shape, int(layer.val)
    length = mb.reshape(x=count, shape=[1])
    if not _updates_slices():
        _add(context, node, state, _scattered(cache, update, place, length, size))
        return
    if length.val is not None and length.val[0] == 1:
        _add(context, node, state, _written(state, cache, update, row, place, length))
        return
    zero = np.array([0], dtype=np.int32)
    past = mb.sub(x=mb.add(x=place, y=length), y=np.array([size], dtype=np.int32))
    wrapped = mb.maximum(x=past, y=zero)
    kept = mb.sub(x=length, y=wrapped)
    piece = _corner(1, heads, length, width)

    def cut(x: Any, first: int, begin: Any) -> Any:
        return mb.slice_by_size(x=x, begin=_corner(first, 0, begin, 0), size=piece)

    before = cut(cache, row, mb.maximum(x=mb.sub(x=place, y=length), y=zero))
    behind = cut(cache, row, wrapped)
    all_three = mb.concat(values=[before, update, behind], axis=2)
    first = cut(all_three, 0, mb.add(x=length, y=kept))
    last = cut(all_three, 0, kept)
    at_first = _written(state, cache, first, row, zero, length)
    cache = mb.cast(x=at_first, dtype="fp32")
    at_last = _written(state, cache, last, row, mb.sub(x=place, y=wrapped), length)
    _add(context, node, state, at_last)


def _add(context: Any, node: Any, state: Any, written: Any) -> None:
    """Make of what a cache holds the result of the op, and of the op's result that cache."""
    if state is not None:
        context.name_to_source_state[node.name] = state
    context.add(mb.cast(x=written, dtype="fp32", name=node.name))


def _written(state: Any, cache: Any, update: Any, row: int, place: Any, length: Any) -> Any:
    """Write `update` to a row of a cache's value, then its state, and return what that holds."""
    if not _updates_slices():
        return _scattered(cache, update, place, length)
    _, heads, _, width = cache.shape
    begin = _corner(row, 0, place, 0)
    end = _corner(row + 1, heads, mb.add(x=place, y=length), width)
    updated = mb.slice_update(x=cache, update=update, begin=begin, end=end)
    if state is None:
        return updated
    narrowed = mb.cast(x=updated, dtype=types.builtin_to_string(state.dtype))
    return mb.coreml_update_state(state=state, value=narrowed)


def _updates_slices() -> bool:
    """Return whether the oldest system has `slice_update`; states are as old."""
    compatible: bool = is_current_opset_version_compatible_with(AvailableTarget.iOS18)
    return compatible


def _scattered(cache: Any, update: Any, place: Any, length: Any, ring: int | None = None) -> Any:
    """Return a cache of one layer with `update` from `place` on, past a ring's end at its start.

    Older systems have no states, and a cache that is given has one layer.
    """
    first = mb.squeeze(x=place, axes=[0])
    count = mb.squeeze(x=length, axes=[0])
    places = mb.range_1d(start=first, end=mb.add(x=first, y=count), step=np.int32(1))
    if ring is not None:
        places = mb.mod(x=places, y=np.int32(ring))
    return mb.scatter(data=cache, indices=places, updates=update, axis=2, mode="update")


def _corner(first: int, heads: int, position: Any, width: int) -> Any:
    """Return int32 `[4]` of numbers and `position`, int32 `[1]`."""
    ends = np.array([first, heads], dtype=np.int32), np.array([width], dtype=np.int32)
    return mb.concat(values=[ends[0], position, ends[1]], axis=0)


@register_torch_op(override=True)  # type: ignore[untyped-decorator]
def gelu(context: Any, node: Any) -> None:
    """Lower GELU in the form that is asked for.

    coremltools reads the form among the plain inputs, while an exported graph names it: every GELU
    would be the exact one.
    """
    (x,) = _get_inputs(context, node, expected=1)
    # As it stands there: coremltools would take the word for a tensor of that name.
    (form,) = (node.kwinputs or {}).get("approximate", ["none"])
    mode = {"none": "EXACT", "tanh": "TANH_APPROXIMATION"}[form]
    context.add(mb.gelu(x=x, mode=mode, name=node.name))


@register_torch_op(torch_alias=_names(eight_bit.as_eight_bit), override=True)  # type: ignore[untyped-decorator]
def as_eight_bit(context: Any, node: Any) -> None:
    """Lower a rounding to codes and back."""
    x, scale, zero_point = _get_inputs(context, node, expected=3)
    numbers = {"scale": np.float32(scale.val), "zero_point": np.uint8(zero_point.val)}
    codes = mb.quantize(input=x, output_dtype="uint8", **numbers)
    context.add(mb.dequantize(input=codes, name=node.name, **numbers))
