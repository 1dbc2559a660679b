"""CodeGen: GPT-J with one matrix for queries, values and keys, in the order of four machines."""

from __future__ import annotations

from dataclasses import replace

from llm_coreml.checkpoint.value_maps import Blocks, RowChoice, Then, ValueMap
from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.families import gptj
from llm_coreml.families.arrangements import interleaved
from llm_coreml.families.family import Family
from llm_coreml.families.names import Names, stored

_MACHINES = 4


def _values(spec: DecoderSpec, layer: LayerSpec) -> dict[str, ValueMap]:
    part = spec.hidden_size // _MACHINES
    rows = {
        f"self_attn.{kind}_proj": Blocks(place * part, (place + 1) * part, 3 * part, _MACHINES)
        for place, kind in enumerate("qvk")
    }
    turned = interleaved(spec, layer)
    return {
        name: Then(rows[name], order) if isinstance(order := turned.get(name), RowChoice) else each
        for name, each in rows.items()
    }


_NAMES: Names = replace(
    gptj.NAMES,
    modules={
        **gptj.NAMES.modules,
        **{f"self_attn.{kind}_proj": "attn.qkv_proj" for kind in "qkv"},
    },
    values=_values,
)
FAMILY = Family(gptj.spec, lambda spec: stored(spec, _NAMES), lambda _: [], ignored=gptj.IGNORED)
