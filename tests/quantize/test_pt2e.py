"""PT2E: the decoder holds what ExecuTorch's quantizer chose, and so does the program."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from llm_coreml.config import ExportConfig, resolve
from llm_coreml.decoder import Decoder
from llm_coreml.decoder.matrices import Linear
from llm_coreml.decoder.mlp import MLP
from llm_coreml.errors import ConfigError, UnsupportedError
from llm_coreml.quantize import make_plan
from llm_coreml.quantize.formats.schemes import IntChannel
from llm_coreml.quantize.pt2e import (
    _Blocks,
    converted_blocks,
    pt2e_static,
    pt2e_weights,
    rounded_layers,
)
from tiny import small_spec

SPEC = small_spec(vocab_size=96)


@pytest.fixture(scope="module")
def plain() -> Decoder:
    """A decoder of random numbers, its matrices held as fp16."""
    decoder = Decoder(SPEC, context=32)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(decoder.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        values = torch.randn(parameter.shape, generator=generator) * 0.1
        values = values if values.dim() > 1 else 1 + values
        held = nn.Parameter(values.to(torch.float16), requires_grad=False)
        setattr(decoder.get_submodule(owner), attribute, held)
    return decoder.eval()


WINDOWS = [tuple((7 * at + 13 * start) % 96 for at in range(8)) for start in range(4)]


@pytest.mark.parametrize("static", [False, True])
def test_the_decoder_computes_what_the_converted_graph_does(plain: Decoder, static: bool) -> None:
    kind = torch.quint8 if static else torch.float32
    converted, layers = converted_blocks(copy.deepcopy(plain), WINDOWS, kind)
    decoder = copy.deepcopy(plain)
    pt2e_static(decoder, WINDOWS) if static else pt2e_weights(decoder)
    found = {each.name: each for each in rounded_layers(converted, layers)}
    linears: dict[str, Linear] = {
        f"layers.{name}": module
        for name, module in decoder.layers.named_modules()
        if isinstance(module, Linear)
    }
    assert found.keys() == linears.keys()
    for name, module in linears.items():
        weight: Any = module.weight
        assert torch.equal(weight.qdata, found[name].codes), name
        assert not weight.zero_point.any() and weight.scale.shape == (len(weight), 1)
        assert int(found[name].codes.int().abs().max()) in (127, 128), name
        kept = plain.get_submodule(name).get_parameter("weight").float()
        steps = (weight.dequantize() - kept).abs() / weight.scale
        assert float(steps.max()) < 0.51 + 128 * 2**-11, name
        assert (module.entering is not None) is static, name
        around = decoder.get_submodule(name.rpartition(".")[0])
        activated = isinstance(around, MLP) and name.endswith("gate_proj")
        assert (module.leaving is not None) is (static and not activated), name
        if activated:
            assert (around.activated is not None) is static
    x = decoder.embed(torch.tensor([list(WINDOWS[0])]))
    with torch.no_grad():
        theirs, ours = converted(x), _Blocks(decoder, 8)(x)
        unrounded = _Blocks(plain, 8)(x)
    # Scales are rounded to fp16 here, which moves some activations to the next of 256 numbers.
    atol = (0.03 if static else 0.002) * float(theirs.abs().max())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    assert 0 < float((theirs - unrounded).norm() / unrounded.norm()) < 0.2


def test_activations_that_no_scale_of_fp16_holds_are_told(plain: Decoder) -> None:
    """Whose they are, by the decoder's name and not by the graph's."""
    wide = copy.deepcopy(plain)
    projection = wide.block(0).mlp.up_proj
    projection.weight = nn.Parameter(projection.weight.float() * 1e8, requires_grad=False)
    told = r"What layers\.0\.mlp\.\w+ (reads|gives) spans .* ends at 65,504. Give --pt2e weights"
    with pytest.raises(UnsupportedError, match=told):
        pt2e_static(wide, WINDOWS)


def test_a_layer_that_is_left_out_is_told(plain: Decoder) -> None:
    graph = torch.export.export(_Blocks(plain, 8), (torch.zeros(1, 8, 64),), strict=False).module()
    with pytest.raises(UnsupportedError, match=r"PT2E left .* unquantized; give --scheme int8-"):
        list(rounded_layers(graph, {}))


def test_it_decides_the_format_of_linear_layers() -> None:
    plan = make_plan(resolve(ExportConfig(pt2e="weights", embedding="int4-channel"), SPEC), SPEC)
    assert (plan.linear, plan.embedding) == (IntChannel(8), IntChannel(4))
    for other in ({"bits": 4}, {"scheme": "int4-group"}, {"size": 1000}, {"plan": "p.json"}):
        ((name, value),) = other.items()
        with pytest.raises(ConfigError) as caught:
            ExportConfig(pt2e="weights", **other)
        assert "would; drop one of them" in str(caught.value), name
        assert ExportConfig(**other).under({"pt2e": "weights"}) == ExportConfig(pt2e="weights")
        assert ExportConfig(pt2e="weights").under(other) == ExportConfig(**other), value
    for settings, message in (
        ({"pt2e": "weights", "calibrate": "bundled"}, "--pt2e weights reads no text, which --cal"),
        (
            {"pt2e": "static", "calibrate": "bundled", "backend": "xnnpack"},
            "--pt2e static rounds activations, which --backend xnnpack keeps as fp32; give --pt2e",
        ),
        ({"pt2e": "static"}, "--pt2e static reads a text for the ranges of activations; give"),
        (
            {"pt2e": "static", "calibrate": "bundled", "tune": 5},
            "--tune changes what --pt2e",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            ExportConfig(**settings)
        assert str(caught.value).startswith(message)
