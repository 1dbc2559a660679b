"""PT2E: the decoder holds what ExecuTorch's quantizer chose, and so does the program."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import llm_coreml
from exported import make_model, make_tokenizer
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.decoder import Decoder
from llm_coreml.errors import ConfigError, UnsupportedError
from llm_coreml.quantize import make_plan
from llm_coreml.quantize.formats.schemes import IntChannel
from llm_coreml.quantize.pt2e import _Blocks, converted_blocks, found_codes, pt2e_weights
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


def test_the_decoder_computes_what_the_converted_graph_does(plain: Decoder) -> None:
    converted, layers = converted_blocks(copy.deepcopy(plain))
    decoder = copy.deepcopy(plain)
    pt2e_weights(decoder)
    found = {name: codes for name, codes, _, _ in found_codes(converted, layers)}
    linears = {
        f"layers.{name}": module
        for name, module in decoder.layers.named_modules()
        if isinstance(module, nn.Linear)
    }
    assert found.keys() == linears.keys()
    for name, module in linears.items():
        weight: Any = module.weight
        assert torch.equal(weight.qdata, found[name]), name
        assert not weight.zero_point.any() and weight.scale.shape == (len(found[name]), 1)
        assert int(found[name].abs().max()) in (127, 128), name
        kept = plain.get_submodule(name).get_parameter("weight").float()
        steps = (weight.dequantize() - kept).abs() / weight.scale
        assert float(steps.max()) < 0.51 + 128 * 2**-11, name
    x = decoder.embed(torch.arange(8, dtype=torch.int32).unsqueeze(0))
    with torch.no_grad():
        theirs, ours = converted(x), _Blocks(decoder, 8)(x)
    # Scales are rounded to fp16 here.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3 * float(theirs.abs().max()))
    assert not torch.equal(theirs, _Blocks(plain, 8)(x))


def test_a_layer_that_is_left_out_is_told(plain: Decoder) -> None:
    graph = torch.export.export(_Blocks(plain, 8), (torch.zeros(1, 8, 64),), strict=False).module()
    with pytest.raises(UnsupportedError, match=r"PT2E left .* unquantized; give --scheme int8-"):
        list(found_codes(graph, {}))


def test_an_export_is_verified(tmp_path: Path) -> None:
    config = ExportConfig(context=64, seq_lengths=(1, 8), pt2e="weights")
    bundle = llm_coreml.export(
        make_model(), make_tokenizer(), output=tmp_path / "out", config=config, cache=False
    )
    manifest = bundle.manifest
    assert manifest.verification.conversion is not None and manifest.verification.mean_kl < 1e-3
    assert manifest.quantization.linear.label == "int8 per channel"
    assert manifest.config["weights"]["pt2e"] == "weights"


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
    with pytest.raises(ConfigError, match="--pt2e weights reads no text, which --calibrate gives"):
        ExportConfig(pt2e="weights", calibrate="bundled")
