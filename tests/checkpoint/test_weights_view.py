"""One view of a model's weights, whatever a checkpoint calls them and however it lays them out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_coreml.checkpoint import check_tensors, open_checkpoint
from llm_coreml.checkpoint.value_maps import (
    Blocks,
    Interleaved,
    PlusOne,
    Rows,
    Stacked,
    Then,
    Transposed,
    ValueMap,
    Waves,
)
from llm_coreml.checkpoint.weights_view import FamilyWeights, Stored, expected_tensors
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.decoder import Decoder
from llm_coreml.errors import CheckpointError, UnsupportedError
from llm_coreml.model import Model, open_model
from llm_coreml.quantize.plan.choose import plan_for
from llm_coreml.quantize.quantized import build_decoder
from packers import checkpoint, gptq
from tiny import llama, save, tokens_for

Tensors = dict[str, torch.Tensor]
SIZES: dict[str, Any] = {"num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 96}
# Rows of queries, keys and values, which are stored as one.
ROWS = {"q": (0, 64), "k": (64, 96), "v": (96, 128)}


def arranged(tensors: Tensors) -> Tensors:
    """Lay the tensors of a Llama out as other architectures do."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if "self_attn.q_proj" in name:
            parts = [tensors[name.replace("q_proj", f"{kind}_proj")] for kind in ROWS]
            found[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        elif "norm" in name:
            found[name] = tensor - 1
        elif "down_proj" in name:
            found[name] = tensor.T.contiguous()
        elif "gate_proj" in name:
            found |= {f"{name}.{at}": row.contiguous() for at, row in enumerate(tensor)}
        elif not any(f"self_attn.{kind}_proj" in name for kind in "kv"):
            found[name] = tensor
    return found


def stored_so(plain: Mapping[str, Stored]) -> dict[str, Stored]:
    """Say of each parameter how `arranged` has laid it out."""
    found = {}
    for ours, made in plain.items():
        (name,) = made.names
        kind = next((kind for kind in ROWS if f"self_attn.{kind}_proj" in ours), None)
        if kind is not None:
            whole = name.replace(f"{kind}_proj", "qkv_proj")
            found[ours] = Stored((whole,), Rows(*ROWS[kind], of=128))
        elif "norm" in ours:
            found[ours] = Stored((name,), PlusOne())
        elif "down_proj" in ours:
            found[ours] = Stored((name,), Transposed())
        elif "gate_proj" in ours:
            found[ours] = Stored(tuple(f"{name}.{at}" for at in range(96)), Stacked(96))
        else:
            found[ours] = made
    return found


def reopened(plain: Model, folder: Path) -> Model:
    """Open `folder`, laid out by `arranged`, as the family of `plain` with other value maps."""
    files = open_checkpoint(folder)
    family = replace(plain.family, stored=lambda spec: stored_so(plain.family.stored(spec)))
    stored = family.stored(plain.spec)
    parameters = Decoder(plain.spec, context=1).named_parameters()
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters}
    check_tensors(files, expected_tensors(stored, shapes), optional=family.ignored)
    return Model(files.source, files, family, plain.spec, FamilyWeights(files, stored))


@pytest.fixture
def both(tmp_path: Path) -> tuple[Model, Model]:
    """The same model, stored as a Llama and in another arrangement."""
    folder = save(llama(**SIZES), tmp_path / "plain")
    other = save(llama(**SIZES), tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    save_file(arranged(tensors), other / "model.safetensors", metadata={"format": "pt"})
    plain = open_model(folder)
    return plain, reopened(plain, other)


def test_every_arrangement_gives_the_same_weights(both: tuple[Model, Model]) -> None:
    plain, other = both
    assert other.weights.names() == plain.weights.names()
    for name in plain.weights.names():
        expected = plain.weights.tensor(name, torch.float32)
        found = other.weights.tensor(name, torch.float32)
        assert found.is_contiguous()
        # A gain minus one plus one is rounded once more.
        within = 1e-7 if "norm" in name else 0.0
        torch.testing.assert_close(found, expected, rtol=0, atol=within)


@pytest.mark.parametrize("rotate", ["none", "both"])
def test_a_decoder_of_another_arrangement_computes_the_same(
    rotate: Any, both: tuple[Model, Model]
) -> None:
    config = ExportConfig(
        scheme="none", embedding="none", context=32, rotate=rotate, compute_precision="fp32"
    )
    rows = []
    for model in both:
        job = resolve(config, model.spec)
        decoder = build_decoder(model, job, plan_for(job, model))
        with torch.inference_mode():
            rows.append(decoder(torch.tensor([tokens_for(96, 20)]), torch.zeros(1).long()))
    torch.testing.assert_close(rows[1], rows[0], rtol=0, atol=1e-5 * float(rows[0].abs().max()))


def test_the_hash_follows_from_tensors_and_from_what_is_made_of_them(
    both: tuple[Model, Model],
) -> None:
    name = "layers.0.self_attn.k_proj.weight"
    plain, other = both
    stored = other.family.stored(other.spec)
    before = other.weights.sha256([name])
    assert before == FamilyWeights(other.checkpoint, stored).sha256([name])
    stored[name] = replace(stored[name], values=Rows(63, 95, of=128))
    assert before != FamilyWeights(other.checkpoint, stored).sha256([name])
    assert before != other.weights.sha256(["layers.1.self_attn.k_proj.weight"])
    assert before != plain.weights.sha256([name])


CHOICES: dict[str, tuple[ValueMap, list[int]]] = {
    "rows": (Rows(8, 72, of=96), list(range(8, 72))),
    "blocks": (Blocks(8, 16, of=48, count=2), [*range(8, 16), *range(56, 64)]),
    "pairs": (Interleaved(48, dim=2), list(range(96))),
    "neighbours": (
        Interleaved(12, dim=6),
        [8 * head + row for head in range(12) for row in (0, 2, 4, 1, 3, 5, 6, 7)],
    ),
    "one after another": (
        Then(Blocks(8, 16, of=48, count=2), Interleaved(2, dim=8)),
        [first + row for first in (8, 56) for row in (0, 2, 4, 6, 1, 3, 5, 7)],
    ),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_chosen_rows_of_a_quantized_matrix_keep_its_codes(choice: str, tmp_path: Path) -> None:
    settings = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}
    folder, meant = checkpoint(tmp_path / "model", settings, gptq(4, 32, 1, (1, 15), seed=3))
    model = open_model(folder)
    ours, theirs = "layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"
    values, rows = CHOICES[choice]
    stored = {ours: Stored((theirs,), values)}
    weights = FamilyWeights(model.checkpoint, stored)
    assert expected_tensors(stored, {ours: (len(rows), 64)}) == {theirs: (96, 64)}
    assert weights.forms()[ours] == model.weights.forms()[ours]
    packed = weights.packed(ours)
    assert packed is not None and packed.order is not None
    scale, zero = packed.levels.scale, packed.levels.zero_point
    assert zero is not None
    wide = (part.double().repeat_interleave(32, dim=1) for part in (scale, zero))
    scales, zeros = wide
    found = (scales * (packed.codes.double() - zeros))[:, torch.argsort(packed.order)]
    assert np.array_equal(found.numpy(), meant[theirs][rows])
    vector = torch.arange(96.0)
    assert values.values([vector]).tolist() == rows


def test_a_quantized_matrix_that_is_rearranged_otherwise_is_refused(tmp_path: Path) -> None:
    settings = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}
    folder, _ = checkpoint(tmp_path / "model", settings, gptq(4, 32, 1, (1, 15)))
    files = open_model(folder).checkpoint
    stored = {"a.weight": Stored(("model.layers.0.mlp.up_proj.weight",), Transposed())}
    with pytest.raises(UnsupportedError, match=r"up_proj.*this family rearranges it"):
        FamilyWeights(files, stored).forms()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda found: found.pop("model.layers.0.self_attn.qkv_proj.weight"), "1 missing: .*qkv"),
        (
            lambda found: found.update(
                {"model.layers.1.mlp.down_proj.weight": torch.zeros(64, 96)}
            ),
            r"1 misshapen: .*down_proj.* is \[64, 96\], not \[96, 64\]",
        ),
        (lambda found: found.pop("model.layers.0.mlp.gate_proj.weight.95"), "1 missing: .*95"),
    ],
    ids=["fused", "transposed", "stacked"],
)
def test_shapes_are_checked_before_data_is_read(
    spoil: Callable[[Tensors], object], told: str, tmp_path: Path
) -> None:
    folder = save(llama(**SIZES), tmp_path)
    plain = open_model(folder)
    tensors = arranged(load_file(folder / "model.safetensors"))
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=told):
        reopened(plain, folder)


def test_two_parameters_cannot_want_a_tensor_in_two_shapes() -> None:
    stored = {"a": Stored(("both",)), "b": Stored(("both",), Transposed())}
    with pytest.raises(CheckpointError, match=r"'both' as \[2, 3\] and as \[4, 2\]"):
        expected_tensors(stored, {"a": (2, 3), "b": (2, 4)})


@pytest.mark.parametrize("values", [None, PlusOne(), Rows(0, 64, of=64)])
def test_what_is_not_finite_is_named_as_it_is_stored(
    values: ValueMap | None, tmp_path: Path
) -> None:
    model = llama(**SIZES)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    files = open_checkpoint(save(model, tmp_path))
    weights = FamilyWeights(files, {"norm.weight": Stored(("model.norm.weight",), values)})
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' in .* is nan at \[3\]"):
        weights.tensor("norm.weight", torch.float16)


def test_what_an_arrangement_makes_too_large_is_refused(tmp_path: Path) -> None:
    model = llama(**SIZES)
    with torch.no_grad():
        model.model.norm.weight[3] = 65519.5
    files = open_checkpoint(save(model, tmp_path))
    weights = FamilyWeights(files, {"norm.weight": Stored(("model.norm.weight",), PlusOne())})
    assert float(weights.tensor("norm.weight", torch.float32)[3]) == 65520.5
    with pytest.raises(CheckpointError, match="beyond the largest float16"):
        weights.tensor("norm.weight", torch.float16)


def test_positions_that_no_file_holds(tmp_path: Path) -> None:
    view = FamilyWeights(
        open_checkpoint(save(llama(), tmp_path)),
        {"p": Stored((), Waves(5, 7, period=2, first=3)), "q": Stored((), Waves(5, 7, period=3))},
    )
    found = view.tensor("p", torch.float32)
    expected = [
        [*(wave(at / slower) for wave in (math.sin, math.cos) for slower in (1, 100, 1e4)), 0.0]
        for at in range(3, 8)
    ]
    assert (found - torch.tensor(expected)).abs().max() < 1e-6
    assert view.dtype("p") == torch.float32 and view.packed("p") is None and not view.forms()
    assert view.sha256(["p"]) != view.sha256(["q"])
    assert expected_tensors({"p": Stored((), Waves(5, 7, 2))}, {"p": (5, 7)}) == {}
