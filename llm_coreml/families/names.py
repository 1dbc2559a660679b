"""What checkpoints call the parameters of a decoder, and how they are stored.

stored(spec)                                                  # as Llama has them
stored(spec, Names(modules={"mlp_out_norm": "post_feedforward_layernorm"}))

The decoder of the spec says which parameters there are; a family says what is called otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import final

from llm_coreml.checkpoint.value_maps import Rows, Stacked, ValueMap
from llm_coreml.checkpoint.weights_view import Stored
from llm_coreml.decoder import DecoderSpec, skeleton
from llm_coreml.decoder.matrices import PositionTable
from llm_coreml.decoder.norm import RMSNorm
from llm_coreml.decoder.spec import LayerSpec

# Of one layer: how parameters are stored, by the decoder's name of one or of its module.
Arrangement = Mapping[str, ValueMap]
_PLAIN: Arrangement = MappingProxyType({})


def _as_they_are(spec: DecoderSpec, layer: LayerSpec) -> Arrangement:
    return _PLAIN


@final
@dataclass(frozen=True)
class Names:
    """How a family's checkpoints name and store what the decoder has.

    Attributes:
        trunk: What stands before every name but those of the head.
        layers: The list of layers.
        head: The head.
        modules: Modules, or single parameters, with other names than the decoder's; those of a
            layer as the layer has them. A `*` counts the modules that one is stacked of.
        gains: How gains of norms are stored; None as they are.
        values: How other parameters of a layer are stored, by name or by module.
        first_position: How many rows a table of learned positions has before the first.
        positions: What a table of positions is computed as, where none is stored.
    """

    trunk: str = "model."
    layers: str = "layers"
    head: str = "lm_head"
    modules: Mapping[str, str] = field(default_factory=dict)
    gains: ValueMap | None = None
    values: Callable[[DecoderSpec, LayerSpec], Arrangement] = _as_they_are
    first_position: int = 0
    positions: ValueMap | None = None


_LLAMA = Names()
# What transformers calls norms behind a layer's parts, and such on both sides of them.
BEHIND: Mapping[str, str] = MappingProxyType(
    {
        "attention_out_norm": "post_attention_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    }
)
SANDWICH: Mapping[str, str] = MappingProxyType(
    {**BEHIND, "post_attention_layernorm": "pre_feedforward_layernorm"}
)


def stored(spec: DecoderSpec, names: Names = _LLAMA) -> dict[str, Stored]:
    """Return what every parameter of the decoder of `spec` is made of."""
    found = {}
    arrangements = [names.values(spec, layer) for layer in spec.layers]
    for path, module in skeleton(spec).named_modules():
        for kind, _ in module.named_parameters(recurse=False):
            if spec.tie_word_embeddings and (path, kind) == ("lm_head", "weight"):
                continue
            if isinstance(module, PositionTable) and names.positions is not None:
                found[f"{path}.{kind}"] = Stored((), names.positions)
                continue
            place, inner, theirs = _named(path, kind, names)
            arrangement = _PLAIN if place is None else arrangements[place]
            values = arrangement.get(f"{inner}.{kind}", arrangement.get(inner))
            if values is None and kind == "weight" and isinstance(module, RMSNorm):
                values = names.gains
            if isinstance(module, PositionTable) and names.first_position:
                count = names.first_position + module.weight.shape[0]
                values = Rows(names.first_position, count, of=count)
            places = range(values.count) if isinstance(values, Stacked) else range(1)
            each = tuple(theirs.replace("*", str(index)) for index in places)
            found[f"{path}.{kind}"] = Stored(each, values)
    return found


def _named(path: str, kind: str, names: Names) -> tuple[int | None, str, str]:
    """Return a parameter's layer, its module within that, and what checkpoints call it."""
    if path == "lm_head":
        return None, path, f"{names.head}.{kind}"
    if not path.startswith("layers."):
        return None, path, f"{names.trunk}{names.modules.get(path, path)}.{kind}"
    _, index, *rest = path.split(".", 2)
    inner = "".join(rest)  # nothing, of what a layer holds itself
    module = ".".join((index, names.modules.get(inner, inner))).rstrip(".")
    alone = names.modules.get(f"{inner}.{kind}")
    theirs = f"{module}.{kind}" if alone is None else f"{index}.{alone}"
    return int(index), inner, f"{names.trunk}{names.layers}.{theirs}"
