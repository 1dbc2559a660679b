"""LoRA adapters beside full weights: merged by hand, as the paper says, and as PEFT does."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_coreml.checkpoint import open_checkpoint
from llm_coreml.errors import CheckpointError, LlmCoreMLError, UnsupportedError
from llm_coreml.model import open_model
from llm_coreml.progress import Silent
from llm_coreml.quantize.quantized import build_original
from llm_coreml.runtime.eager import EagerRunner
from tiny import expected_logits, llama, save, tokens_for
from warned import OF_PEFT

pytestmark = OF_PEFT

CONTEXT, RANK = 64, 4
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
TABLE, HEAD = "model.embed_tokens", "lm_head"
TOKENS = tokens_for(97, 24)

Tensors = dict[str, torch.Tensor]


def settings(**changes: Any) -> dict[str, Any]:
    """Return an adapter_config.json as PEFT writes it."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/base",
        "bias": "none",
        "r": RANK,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "down_proj"],
        "init_lora_weights": True,
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
        **changes,
    }


def pair(model: Any, module: str, rank: int = RANK, seed: int = 0) -> tuple[Any, Any]:
    """Return random `lora_A` and `lora_B` for a linear module of `model`."""
    draw = torch.Generator().manual_seed(seed)
    rows, columns = model.state_dict()[f"{module}.weight"].shape
    return (
        torch.randn(rank, columns, generator=draw) * 0.2,
        torch.randn(rows, rank, generator=draw) * 0.2,
    )


def put(folder: Path, tensors: Tensors, config: dict[str, Any], prefix: str = "base_model.model."):
    """Write an adapter beside the weights in `folder`."""
    named = {prefix + name: value.contiguous() for name, value in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged(model: Any, values: Tensors) -> Any:
    """Put values into a transformers model, each under its own name though they be tied."""
    untied = llama(tie_word_embeddings=False)
    state = {**model.state_dict(), **values}
    untied.load_state_dict(state)
    return untied


def weights_of(folder: Path) -> Path:
    return folder / "model.safetensors"


def logits_of(source: Any) -> torch.Tensor:
    return EagerRunner(build_original(open_model(source), CONTEXT), "eager").logits(TOKENS)


def assert_equal(folder: Path, reference: Any) -> None:
    error = logits_of(folder) - expected_logits(reference, TOKENS)
    assert error.abs().max() < 1e-4


@pytest.mark.parametrize("prefix", ["base_model.model.", "", "_orig_mod.base_model.model."])
@pytest.mark.parametrize("named", ["", ".default"])
def test_an_adapter_beside_the_weights_is_merged(prefix: str, named: str, tmp_path: Path) -> None:
    base = llama()
    tensors, values = {}, {}
    for module in (Q, DOWN):
        down, up = pair(base, module)
        tensors |= {f"{module}.lora_A{named}.weight": down, f"{module}.lora_B{named}.weight": up}
        weight = base.state_dict()[f"{module}.weight"].double()
        values[f"{module}.weight"] = (weight + 16 / RANK * up.double() @ down.double()).float()
    folder = put(save(base, tmp_path / "m"), tensors, settings(), prefix)
    model = open_model(folder)
    assert "merged into 2 matrices" in model.notes[-1]
    for name, wanted in values.items():
        read = model.checkpoint.tensor(name, torch.float32)
        assert torch.allclose(read, wanted, rtol=0, atol=1e-6)
    assert_equal(folder, merged(base, values))
    assert (expected_logits(base, TOKENS) - logits_of(folder)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("changes", "rank", "scale"),
    [
        ({"use_rslora": True}, RANK, 16 / math.sqrt(RANK)),
        ({"lora_alpha": 2.5}, RANK, 2.5 / RANK),
        ({"rank_pattern": {"q_proj": 8}}, 8, 16 / 8),
        ({"rank_pattern": {"layers.0.self_attn.q_proj": 8}, "r": 3}, 8, 16 / 8),
        ({"rank_pattern": {"k_proj": 8}}, RANK, 16 / RANK),
        ({"rank_pattern": {"_proj": 8}}, RANK, 16 / RANK),
        ({"alpha_pattern": {f"^{Q}": 3}}, RANK, 3 / RANK),
        ({"alpha_pattern": {"layers.*q_proj": 3, "q_proj": 5}}, RANK, 3 / RANK),
        ({"alpha_pattern": {"^q_proj": 3}}, RANK, 16 / RANK),
        ({"fan_in_fan_out": True, "inference_mode": True}, RANK, 16 / RANK),
    ],
)
def test_the_scale_of_a_module(
    changes: dict[str, Any], rank: int, scale: float, tmp_path: Path
) -> None:
    base = llama()
    down, up = pair(base, Q, rank)
    tensors = {f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up}
    folder = put(save(base, tmp_path / "m"), tensors, settings(**changes))
    read = open_checkpoint(folder).tensor(f"{Q}.weight", torch.float32)
    wanted = base.state_dict()[f"{Q}.weight"] + scale * up @ down
    assert torch.allclose(read, wanted, rtol=0, atol=1e-6)


def test_dora_gives_rows_their_magnitude(tmp_path: Path) -> None:
    base = llama()
    down, up = pair(base, Q)
    magnitude = torch.rand(64) + 0.5
    tensors = {
        f"{Q}.lora_A.weight": down,
        f"{Q}.lora_B.weight": up,
        f"{Q}.lora_magnitude_vector": magnitude,
    }
    folder = put(save(base, tmp_path / "m"), tensors, settings())
    with pytest.raises(CheckpointError, match=r"use_dora = false.*holds a lora_magnitude_vector"):
        open_checkpoint(folder)
    plain = {name: value for name, value in tensors.items() if "magnitude" not in name}
    folder = put(save(base, tmp_path / "o"), plain, settings(use_dora=True))
    with pytest.raises(CheckpointError, match=r"use_dora = true.*holds no lora_magnitude_vector"):
        open_checkpoint(folder)
    folder = put(save(base, tmp_path / "p"), tensors, settings(use_dora=True))
    summed = base.state_dict()[f"{Q}.weight"] + 4 * up @ down
    rows = summed / summed.norm(dim=1, keepdim=True)
    assert_equal(folder, merged(base, {f"{Q}.weight": magnitude.unsqueeze(1) * rows}))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("module", [TABLE, HEAD])
def test_whole_modules_take_the_place_of_the_weights(
    module: str, tied: bool, tmp_path: Path
) -> None:
    base = llama(tie_word_embeddings=tied)
    own = torch.randn(97, 64, generator=torch.Generator().manual_seed(1))
    config = settings(modules_to_save=[module.rpartition(".")[2]])
    folder = put(save(base, tmp_path / "m"), {f"{module}.weight": own}, config)
    # Of a tied pair the other stays what both were.
    assert_equal(folder, merged(base, {f"{module}.weight": own}))


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_of_the_token_table(tied: bool, tmp_path: Path) -> None:
    base = llama(tie_word_embeddings=tied)
    draw = torch.Generator().manual_seed(1)
    down, up = torch.randn(RANK, 97, generator=draw), torch.randn(64, RANK, generator=draw) * 0.2
    table = base.state_dict()[f"{TABLE}.weight"]
    tensors = {
        f"{TABLE}.lora_embedding_A": down,
        f"{TABLE}.lora_embedding_B": up,
        f"{TABLE}.base_layer.weight": table.clone(),
    }
    folder = put(save(base, tmp_path / "m"), tensors, settings())
    assert_equal(folder, merged(base, {f"{TABLE}.weight": table + 4 * (up @ down).T}))


def test_an_adapter_inside_of_the_weights(tmp_path: Path) -> None:
    base = llama(tie_word_embeddings=True)
    folder = save(base, tmp_path / "m")
    tensors = load_file(weights_of(folder))
    down, up = pair(base, Q)
    weight = tensors.pop(f"{Q}.weight")
    tensors |= {
        f"{Q}.base_layer.weight": weight,
        f"{Q}.lora_A.default.weight": down,
        f"{Q}.lora_B.default.weight": up,
    }
    for spoiled in (False, True):
        if spoiled:  # two adapters
            tensors[f"{Q}.lora_A.other.weight"] = down.clone()
            tensors[f"{Q}.lora_B.other.weight"] = up.clone()
        inside = {f"base_model.model.{name}": value for name, value in tensors.items()}
        save_file(inside, weights_of(folder), {"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(settings()))
        if not spoiled:
            assert_equal(folder, merged(base, {f"{Q}.weight": weight + 4 * up @ down}))
    with pytest.raises(UnsupportedError, match="holds 2 adapters: 'default', 'other'"):
        open_model(folder)


def test_the_hash_follows_from_all_that_is_merged(tmp_path: Path) -> None:
    base = llama()
    down, up = pair(base, Q)
    tensors = {f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up}
    folder = save(base, tmp_path / "m")
    seen = {open_model(folder).sha256()}
    for changed, config in (
        (tensors, settings()),
        (tensors, settings(lora_alpha=17)),
        ({**tensors, f"{Q}.lora_B.weight": up * 2}, settings()),
    ):
        seen.add(open_model(put(folder, changed, config)).sha256())
    assert len(seen) == 4
    assert open_model(put(folder, tensors, settings())).sha256() in seen


def test_an_adapter_is_read_when_its_weight_is(tmp_path: Path) -> None:
    base = llama()
    down, up = pair(base, Q)
    down[1, 2] = float("nan")
    folder = put(
        save(base, tmp_path / "m"),
        {f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up},
        settings(),
    )
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensor(f"{DOWN}.weight", torch.float16).any()
    with pytest.raises(CheckpointError, match=rf"'{Q}\.weight' in model.safetensors is nan"):
        checkpoint.tensor(f"{Q}.weight", torch.float16)


def test_the_exported_program_is_the_merged_model(tmp_path: Path) -> None:
    import llm_coreml

    base = llama(tie_word_embeddings=True)
    folder = save(base, tmp_path / "m")
    down, up = pair(base, Q)
    put(folder, {f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up}, settings())
    # Names of a compiled model, a bias of zeros and a range beside: all told, none of them read.
    tensors = {f"_orig_mod.{name}": value for name, value in load_file(weights_of(folder)).items()}
    tensors |= {f"{Q}.bias": torch.zeros(64), "model.layers.0.self_attn.k_scale": torch.ones(1)}
    save_file(tensors, weights_of(folder), {"format": "pt"})
    told: list[str] = []
    listener = Silent()
    listener.note = told.append  # type: ignore[method-assign]
    config = llm_coreml.ExportConfig(
        scheme="none", embedding="none", logits="all", context=CONTEXT, seq_lengths=(1, 8)
    )
    bundle = llm_coreml.export(
        folder, output=tmp_path / "out", config=config, cache=False, progress=listener
    )
    for words in ("'_orig_mod.'", "merged into 1 matrices", "quantized cache", "are zero"):
        assert any(words in note for note in told), (words, told)
    weight = base.state_dict()[f"{Q}.weight"]
    wanted = expected_logits(merged(base, {f"{Q}.weight": weight + 4 * up @ down}), TOKENS)
    error = (llm_coreml.load(bundle.folder).logits(TOKENS) - wanted).abs().max()
    assert error < 2e-2 * wanted.abs().max()
    apart = (expected_logits(base, TOKENS) - wanted).abs().max()
    assert apart > 10 * error


# Refused


def a_and_b(model: Any) -> Tensors:
    down, up = pair(model, Q)
    return {f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'; only LoRA"),
        ({"peft_type": None}, "peft_type None"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"invented_in_2031": 1}, "invented_in_2031 = 1"),
        ({"rank_pattern": {"(a+)+": 3}}, r"rank_pattern '\(a\+\)\+'"),
    ],
)
def test_an_adapter_that_is_not_computed_here_is_refused(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    base = llama()
    folder = put(save(base, tmp_path / "m"), a_and_b(base), settings(**changes))
    with pytest.raises(UnsupportedError, match=rf"{told}.*merge_and_unload"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0},
        {"r": 2.5},
        {"r": "4"},
        {"r": True},
        {"lora_alpha": None},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"rank_pattern": [1]},
        {"alpha_pattern": {"q_proj": "x"}},
        {"modules_to_save": {"a": 1}},
        {"r": 8},
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], tmp_path: Path) -> None:
    base = llama()
    folder = put(save(base, tmp_path / "m"), a_and_b(base), settings(**changes))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (lambda t: t.pop(f"{Q}.lora_B.weight"), UnsupportedError, "holds lora_A for"),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(RANK, 65)}),
            CheckpointError,
            r"is \[64, 4\] by \[4, 65\], which does not fit the weight \[64, 64\]",
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(RANK, 64, dtype=torch.int32)}),
            CheckpointError,
            "stored as int32",
        ),
        (
            lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(3)}),
            CheckpointError,
            "use_dora = false, and the adapter of .* holds a lora_magnitude_vector",
        ),
        (
            lambda t: t.update({"model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 4)}),
            CheckpointError,
            r"'model.layers.7.mlp.up_proj.weight', which the weights do not hold",
        ),
        (
            lambda t: t.update({f"{DOWN}.weight": torch.ones(64, 80)}),
            UnsupportedError,
            "differs from the weights', and its modules_to_save do not name it",
        ),
        (lambda t: t.update({f"{Q}.bias": torch.ones(64)}), UnsupportedError, "not merged here"),
        (lambda t: t.update({f"{Q}.ia3_l": torch.ones(64)}), UnsupportedError, "not merged here"),
    ],
)
def test_tensors_that_do_not_fit(
    change: Callable[[Tensors], Any],
    error: type[LlmCoreMLError],
    told: str,
    tmp_path: Path,
) -> None:
    base = llama()
    tensors = a_and_b(base)
    change(tensors)
    folder = put(save(base, tmp_path / "m"), tensors, settings())
    with pytest.raises(error, match=told):
        open_checkpoint(folder)


def test_an_adapter_that_is_not_there_or_cannot_be_merged(tmp_path: Path) -> None:
    base = llama()
    folder = put(save(base, tmp_path / "m"), a_and_b(base), settings())
    config = json.loads((folder / "config.json").read_text())
    quantized = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantized}))
    with pytest.raises(UnsupportedError, match="beside quantized weights"):
        open_checkpoint(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is a Git-LFS pointer"):
        open_checkpoint(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is not there.*remove"):
        open_checkpoint(folder)
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(CheckpointError, match="pickle"):
        open_checkpoint(folder)


# PEFT's own word


@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (False, {}),
        (False, {"use_rslora": True, "r": 3}),
        (False, {"use_dora": True}),
        (False, {"rank_pattern": {"down_proj": 7}, "alpha_pattern": {"^model.layers.0.self": 3}}),
        (False, {"alpha_pattern": {"layers.0.self_attn.q_proj": 3, "q_proj": 40}}),
        (False, {"modules_to_save": ["lm_head", "norm"]}),
        (True, {"modules_to_save": ["embed_tokens"]}),
        (True, {"modules_to_save": ["lm_head"]}),
        (True, {"target_modules": ["q_proj", "embed_tokens"]}),
        (True, {"target_modules": ["lm_head"]}),
        (False, {"target_modules": "all-linear"}),
        (False, {"bias": "all"}),
    ],
)
def test_what_peft_makes_of_the_same_folder(
    tied: bool, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is no dependency")
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    folder = save(llama(tie_word_embeddings=tied), tmp_path / "m")
    config = peft.LoraConfig(
        **{"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"], **options}
    )
    trained = peft.get_peft_model(llama(tie_word_embeddings=tied), config)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.2)
    trained.save_pretrained(folder)
    assert (folder / "config.json").is_file()
    theirs = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=tied), folder).eval()
    wanted = expected_logits(theirs, TOKENS)
    assert (wanted - expected_logits(llama(tie_word_embeddings=tied), TOKENS)).abs().max() > 0.1
    assert (logits_of(folder) - wanted).abs().max() < 1e-4
