"""What formats are said to cost, against what they cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from llm_coreml.decoder import Decoder
from llm_coreml.errors import CheckpointError
from llm_coreml.fidelity import kl_divergence
from llm_coreml.model import Model, open_model
from llm_coreml.quantize.formats.round import dense_rows, quantized
from llm_coreml.quantize.formats.schemes import Codebook, IntChannel, IntGroup, Scheme
from llm_coreml.quantize.plan import sensitivity
from llm_coreml.quantize.plan.plan import matrices
from llm_coreml.quantize.plan.sensitivity import Losses, sensitivities
from llm_coreml.quantize.quantized import build_original
from tiny import llama, tokens_for

WINDOWS = [tokens_for(97, 32, seed) for seed in range(20)]


def losses_of(
    model: Model,
    windows: Sequence[Sequence[int]] = WINDOWS[:2],
    schemes: tuple[Scheme, ...] = (Codebook(3, 16), IntGroup(4, 16)),
) -> Losses:
    options = {name: schemes for name, _ in matrices(model.spec)}
    return sensitivities(model.weights, model.spec, windows, options)


def logits(decoder: Decoder) -> torch.Tensor:
    """Return the rows of all windows, `[tokens, vocab]`."""
    rows = []
    for window in WINDOWS:
        decoder.reset()
        with torch.inference_mode():
            hidden = decoder.hidden(torch.tensor([window]), torch.tensor([0]))
            rows.append(decoder.head(hidden)[0])
    return torch.cat(rows)


def measured(decoder: Decoder, name: str, scheme: Scheme, wanted: torch.Tensor) -> float:
    """Return the divergence with one matrix quantized."""
    linear = decoder.get_submodule(name)
    weight = linear.get_parameter("weight")
    dense = torch.cat(list(dense_rows(quantized(scheme, weight.detach()))))
    linear.weight = nn.Parameter(dense, requires_grad=False)
    found = float(kl_divergence(wanted, logits(decoder)).mean())
    linear.weight = weight
    return found


@pytest.mark.parametrize(
    ("certainty", "schemes"), [(1, (Codebook(3, 16), IntGroup(4, 16))), (8, (IntChannel(8),))]
)
def test_losses_are_those_that_are_measured(certainty: float, schemes: tuple[Scheme, ...]) -> None:
    """Also where one token has nearly all of the probability."""
    source = llama(num_hidden_layers=2, attention_bias=True)
    source.lm_head.weight.data.mul_(certainty)
    model = open_model(source)
    decoder = build_original(model, context=32)
    wanted, losses = logits(decoder), losses_of(model, WINDOWS, schemes)
    assert sorted(losses) == sorted(name for name, _ in matrices(model.spec))
    for at, scheme in enumerate(schemes):
        ratios = [
            math.log(found[at] / measured(decoder, name, scheme, wanted))
            for name, found in losses.items()
        ]
        assert abs(statistics.mean(ratios)) < math.log(1.25)
        assert max(map(abs, ratios)) < math.log(2.5)


@pytest.mark.parametrize(
    ("silent", "unheard"),
    [("o_proj", ("q_proj", "k_proj", "v_proj")), ("down_proj", ("gate_proj", "up_proj"))],
)
def test_what_nobody_hears_costs_nothing(silent: str, unheard: tuple[str, ...]) -> None:
    source = llama(num_hidden_layers=2)
    for name, parameter in source.named_parameters():
        if name.startswith("model.layers.1.") and f"{silent}.weight" in name:
            parameter.data.zero_()
    for name, found in losses_of(open_model(source)).items():
        free = name.startswith("layers.1.") and name.endswith((silent, *unheard))
        assert all((loss == 0) == free for loss in found), name


def test_the_same_every_time() -> None:
    model = open_model(llama())
    assert losses_of(model) == losses_of(model)


def test_no_block_is_held_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of blocks are read one block at a time, and let go."""
    model = open_model(llama(num_hidden_layers=3))
    held: list[Decoder] = []
    made = Decoder.__init__

    def kept(self: Decoder, *args: object, **settings: object) -> None:
        made(self, *args, **settings)  # type: ignore[arg-type]
        held.append(self)

    def counted(scheme: Scheme, weight: torch.Tensor) -> torch.Tensor:
        blocks = {
            name.split(".")[1]
            for decoder in held
            for name, p in decoder.named_parameters()
            if name.startswith("layers.") and p.ndim == 2 and not p.is_meta
        }
        assert len(blocks) == 1
        return quantized(scheme, weight)

    monkeypatch.setattr(Decoder, "__init__", kept)
    monkeypatch.setattr(sensitivity, "quantized", counted)
    losses_of(model, WINDOWS[:1])
    held_on = [n for n, p in held[-1].named_parameters() if p.ndim == 2 and not p.is_meta]
    assert held_on == ["embed_tokens.weight", "lm_head.weight"]


def test_a_model_that_overflows_is_refused() -> None:
    source = llama()
    with torch.no_grad():
        source.model.layers[0].mlp.up_proj.weight.fill_(3e38)
    model = open_model(source)
    options = {name: (IntChannel(8),) for name, _ in matrices(model.spec)}
    with pytest.raises(CheckpointError, match="gets inf or NaN when the model reads"):
        sensitivities(model.weights, model.spec, WINDOWS[:1], options)
