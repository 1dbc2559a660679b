"""CodeGen: GPT-J with queries, values and keys in one matrix, in four parts."""

from __future__ import annotations

from llm_coreml.checkpoint.value_maps import Blocks, Then, ValueMap
from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.families import gptj
from llm_coreml.families.arrangements import interleaved
from llm_coreml.families.family import Family
from llm_coreml.families.gpt import no_notes
from llm_coreml.families.names import Names, stored

_PARTS = 4  # as it was trained


def _values(spec: DecoderSpec, layer: LayerSpec) -> dict[str, ValueMap]:
    size, turned = spec.hidden_size // _PARTS, interleaved(spec, layer)
    found = {
        f"self_attn.{kind}_proj": Blocks(at * size, (at + 1) * size, 3 * size, _PARTS)
        for at, kind in enumerate("qvk")
    }
    return {
        name: Then(rows, turned[name]) if name in turned else rows for name, rows in found.items()
    }


_NAMES = Names(
    "transformer.",
    "h",
    modules={**gptj.MODULES, **{f"self_attn.{kind}_proj": "attn.qkv_proj" for kind in "qkv"}},
    values=_values,
)


FAMILY = Family(
    gptj.spec,
    lambda spec: stored(spec, _NAMES),
    no_notes,
    ignored=("*.attn.causal_mask", *gptj.FAMILY.ignored),
)
