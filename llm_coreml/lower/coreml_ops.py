"""The Core ML lowering of the ops that write states, one for each kind of state, and of GELU.

Importing the module registers them with coremltools; the partitioner then accepts them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.frontend.torch.ops import _get_inputs
from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op
from coremltools.converters.mil.mil import types
from torch._library.custom_ops import CustomOpDef

from llm_coreml.decoder import states


def _names(write: CustomOpDef) -> list[str]:
    """Return what coremltools may call the op that writes a kind of state."""
    return [write._qualname, write._qualname.replace("::", ".")]


@register_torch_op(torch_alias=_names(states.kv_write), override=True)  # type: ignore[untyped-decorator]
def kv_write(context: Any, node: Any) -> None:
    """Lower a cache write to `slice_update` on the state's value and a state write right after.

    coremltools itself would chain all updates and write the state once at the end, which leaves
    no update next to its state for the compiler to do in place.
    """
    cache, update, layer, start = _get_inputs(context, node, expected=4)
    state = context.name_to_source_state[node.inputs[0]]
    length = mb.slice_by_index(x=mb.shape(x=update), begin=[2], end=[3])
    first = np.array([int(layer.val), 0], dtype=np.int32)
    begin = mb.concat(values=[first, start, np.array([0], dtype=np.int32)], axis=0)
    last = np.array([int(layer.val) + 1, cache.shape[1]], dtype=np.int32)
    end = mb.concat(
        values=[last, mb.add(x=start, y=length), np.array([cache.shape[3]], dtype=np.int32)], axis=0
    )
    updated = mb.slice_update(x=cache, update=update, begin=begin, end=end)
    narrowed = mb.cast(x=updated, dtype=types.builtin_to_string(state.dtype))
    written = mb.coreml_update_state(state=state, value=narrowed)
    context.name_to_source_state[node.name] = state
    context.add(mb.cast(x=written, dtype="fp32", name=node.name))


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
