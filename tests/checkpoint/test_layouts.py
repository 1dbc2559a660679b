"""Checkpoints under other names than the ordinary ones: read as what they are, or named."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_coreml.checkpoint.layouts import ordinary_names
from llm_coreml.errors import CheckpointError, LlmCoreMLError, UnsupportedError
from llm_coreml.model import open_model
from llm_coreml.quantize.quantized import build_original
from llm_coreml.runtime.eager import EagerRunner
from packers import checkpoint, gptq
from tiny import expected_logits, llama, mistral, save, tokens_for

CONTEXT = 64
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q = "model.layers.0.self_attn.q_proj"

Tensors = dict[str, torch.Tensor]


def edit(folder: Path, change: Callable[[Tensors], Tensors | None]) -> Path:
    """Rewrite the weights of a folder by `change`, which returns others or changes those given."""
    path = folder / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    changed = change(tensors)
    save_file(tensors if changed is None else changed, path, {"format": "pt"})
    return folder


def renamed(pattern: str, by: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {re.sub(pattern, by, name): value for name, value in tensors.items()}


def configure(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def logits_of(source: Any, tokens: list[int]) -> torch.Tensor:
    return EagerRunner(build_original(open_model(source), CONTEXT), "eager").logits(tokens)


# Read


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (renamed("^", "_orig_mod."), "'_orig_mod.' (torch.compile)"),
        (renamed("^", "module."), "'module.' (DataParallel or DeepSpeed)"),
        (renamed("^", "base_model.model."), "'base_model.' (PEFT)"),
        (renamed("^", "pretrained_model."), "'pretrained_model.' (TRL)"),
        (renamed("^", "model."), "'model.' (a module around the model)"),
        (renamed("^", "module._orig_mod."), "'_orig_mod.' (torch.compile), 'module.'"),
        (renamed(r"layers\.1\.", "layers.1._orig_mod."), "'_orig_mod.' (torch.compile)"),
        (renamed(r"^model\.", "model.language_model."), "'language_model.'"),
        (
            renamed(
                r"layers\.(\d)\.", r"layers.\1._fsdp_wrapped_module._checkpoint_wrapped_module."
            ),
            "'_checkpoint_wrapped_module.' (activation checkpointing), '_fsdp_wrapped_module.' (FS",
        ),
    ],
)
def test_what_wrappers_add_to_names_is_left_out(
    change: Callable[[Tensors], Tensors], told: str, tied: bool, tmp_path: Path
) -> None:
    reference = llama(num_hidden_layers=2, tie_word_embeddings=tied)
    plain = open_model(save(reference, tmp_path / "plain"))
    model = open_model(edit(save(reference, tmp_path / "m"), change))
    assert plain.notes == ()
    assert len(model.notes) == 1 and told in model.notes[0]
    # The same names, types and bytes as the ordinary copy has.
    assert model.checkpoint.names() == plain.checkpoint.names()
    assert model.sha256() == plain.sha256()


def test_weights_of_a_base_model_are_read_where_the_head_is_tied(tmp_path: Path) -> None:
    reference = llama(num_hidden_layers=2, tie_word_embeddings=True)
    reference.model.save_pretrained(tmp_path / "m")
    assert "norm.weight" in load_file(tmp_path / "m" / "model.safetensors")
    model = open_model(tmp_path / "m")
    assert model.notes == (
        "Names of tensors are read with 'model.', as of a model without its head.",
    )
    tokens = tokens_for(97, 20)
    error = (logits_of(tmp_path / "m", tokens) - expected_logits(reference, tokens)).abs()
    assert error.max() < 1e-4


def test_tied_weights_may_be_kept_as_the_head(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    reference = llama(tie_word_embeddings=True)
    folder = edit(save(reference, tmp_path / "m"), renamed(f"^{TABLE}$", HEAD))
    tokens = tokens_for(97, 20)
    wanted = expected_logits(reference, tokens)
    theirs = LlamaForCausalLM.from_pretrained(folder).eval()
    assert (expected_logits(theirs, tokens) - wanted).abs().max() < 1e-4
    assert (logits_of(folder, tokens) - wanted).abs().max() < 1e-4
    assert open_model(folder).sha256() == open_model(save(reference, tmp_path / "plain")).sha256()
    # Where nothing says that they are one matrix, the table is missing.
    with pytest.raises(
        CheckpointError, match=rf"1 missing: '{TABLE}'.*tie_word_embeddings to true"
    ):
        open_model(configure(folder, tie_word_embeddings=False))


def _gemma(**sizes: Any) -> Any:
    from transformers import GemmaConfig, GemmaForCausalLM

    return GemmaForCausalLM(
        GemmaConfig(
            **sizes, head_dim=8, num_key_value_heads=2, intermediate_size=64, pad_token_id=None
        )
    )


def _gpt2(hidden_size: int, num_hidden_layers: int, num_attention_heads: int, **sizes: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    heads, layers = num_attention_heads, num_hidden_layers
    return GPT2LMHeadModel(GPT2Config(n_embd=hidden_size, n_head=heads, n_layer=layers, **sizes))


@pytest.mark.parametrize(("make", "table"), [(_gemma, TABLE), (_gpt2, "transformer.wte.weight")])
def test_a_head_alone_is_the_table_where_its_family_ties_by_default(
    make: Callable[..., Any], table: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    reference = make(**sizes, bos_token_id=0, eos_token_id=1).eval()
    folder = edit(save(reference, tmp_path / "m"), renamed(f"^{re.escape(table)}$", HEAD))
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings", None)  # as in published files
    (folder / "config.json").write_text(json.dumps(config))
    tokens = tokens_for(97, 20)
    theirs = type(reference).from_pretrained(folder).eval()
    wanted = expected_logits(reference, tokens)
    assert (expected_logits(theirs, tokens) - wanted).abs().max() < 1e-4
    assert (logits_of(folder, tokens) - wanted).abs().max() < 1e-4
    assert f"is read from '{HEAD}'" in " ".join(open_model(folder).notes)


def test_a_compiled_live_model_is_read(tmp_path: Path) -> None:
    reference = llama()
    compiled = torch.compile(reference)
    model = open_model(compiled)  # type: ignore[arg-type]
    assert model.checkpoint.names() == open_model(reference).checkpoint.names()
    assert model.sha256() == open_model(reference).sha256() and not model.notes


def test_quantized_matrices_are_found_under_other_names(tmp_path: Path) -> None:
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    packed = gptq(4, 32, 1, (8, 8))
    folder, meant = checkpoint(tmp_path / "m", {"quantization_config": settings}, packed)
    plain = open_model(folder)
    sha256, forms = plain.sha256(), plain.weights.forms()
    model = open_model(edit(folder, renamed("^", "_orig_mod.")))
    assert model.sha256() == sha256 and "torch.compile" in model.notes[0]
    assert model.weights.forms() == forms and len(forms) == 7
    found = model.checkpoint.tensor(f"{Q}.weight", torch.float32)
    assert torch.equal(found, torch.from_numpy(meant[f"{Q}.weight"]).float())


def test_names_that_would_fall_together_stay_apart() -> None:
    names = ["model.norm.weight", "module.model.norm.weight", "layers.0.a.weight", "_orig_mod"]
    layout = ordinary_names(names)
    assert layout.names == {name: name for name in names} and layout.notes == ()


# Left out


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (f"{Q}.bias", "biases that are zero"),
        ("lm_head.bias", "biases that are zero"),
        ("model.layers.0.self_attn.k_scale", "ranges of a quantized cache"),
        ("model.layers.0.self_attn.v_proj.output_scale", "ranges of a quantized cache"),
        ("model.layers.0.self_attn.rotary_emb.cos_cached", "tables that are computed anew"),
        ("model.layers.0.self_attn.masked_bias", "tables that are computed anew"),
        ("v_head.summary.weight", "a value head"),
    ],
)
def test_what_changes_nothing_is_left_out_and_told(extra: str, told: str, tmp_path: Path) -> None:
    reference = llama()
    plain = open_model(save(reference, tmp_path / "plain"))
    folder = edit(
        save(reference, tmp_path / "m"), lambda tensors: tensors.update({extra: torch.zeros(64)})
    )
    model = open_model(folder)
    assert len(model.notes) == 1 and f"left out, {told}: '{extra}'" in model.notes[0]
    assert model.sha256() == plain.sha256()


@pytest.mark.parametrize("value", [1e-30, float("nan")])
def test_a_bias_that_is_not_zero_is_refused(value: float, tmp_path: Path) -> None:
    bias = torch.zeros(64)
    bias[7] = value
    folder = edit(
        save(llama(), tmp_path / "m"), lambda tensors: tensors.update({f"{Q}.bias": bias})
    )
    with pytest.raises(CheckpointError, match=rf"1 surplus: '{Q}\.bias'.*not zero.*attention_bias"):
        open_model(folder)


# Named


def consolidated(tensors: Tensors) -> Tensors:
    kinds = {"q_proj": "attention.wq", "o_proj": "attention.wo", "gate_proj": "feed_forward.w1"}
    found = {}
    for name, value in tensors.items():
        module = name.removeprefix("model.").removesuffix(".weight")
        for kind, theirs in kinds.items():
            module = re.sub(rf"(self_attn|mlp)\.{kind}$", theirs, module)
        found[f"{module}.weight"] = value
    return found


def with_lora(tensors: Tensors) -> None:
    tensors[f"{Q}.base_layer.weight"] = tensors.pop(f"{Q}.weight")
    tensors[f"{Q}.lora_A.default.weight"] = torch.ones(4, 64)
    tensors[f"{Q}.lora_B.default.weight"] = torch.ones(64, 4)


def without_head(tensors: Tensors) -> None:
    del tensors[HEAD]


def added_tokens(tensors: Tensors) -> None:
    for name in (TABLE, HEAD):
        tensors[name] = torch.cat([tensors[name], tensors[name][:3]])


def classifier(tensors: Tensors) -> None:
    tensors["score.weight"] = tensors.pop(HEAD)[:2].clone()


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (consolidated, UnsupportedError, r"original arrangement of Mistral or Meta.*convert_"),
        (with_lora, UnsupportedError, r"LoRA layers inside.*merge_and_unload"),
        (
            lambda tensors: {name: value[:0] for name, value in tensors.items()},
            UnsupportedError,
            r"12 tensors without values.*ZeRO-3.*zero_to_fp32\.py",
        ),
        (
            renamed("self_attn.q_proj.weight", "self_attn.q_proj.qweight"),
            UnsupportedError,
            "quantized matrices, but config.json has no quantization_config",
        ),
        (
            renamed(r"mlp.up_proj", "block_sparse_moe.experts.0.w1"),
            UnsupportedError,
            "mixture of experts",
        ),
        (
            renamed(r"^model\.layers\.0\.self_attn.q_proj", "decoder.0.attention.query_key_value"),
            UnsupportedError,
            "Megatron",
        ),
        (renamed(r"^model\.layers\.0", "transformer.h.0"), UnsupportedError, "another architec"),
        (
            renamed(r"q_proj.weight", "q_proj.parametrizations.weight.original0"),
            UnsupportedError,
            "remove_parametrizations",
        ),
        (without_head, CheckpointError, "saved without its head.*AutoModelForCausalLM"),
        (classifier, CheckpointError, "It is a classifier"),
        (added_tokens, CheckpointError, "2 misshapen.*set vocab_size to 100 in config.json"),
    ],
)
def test_an_arrangement_that_is_not_read_is_named_with_its_way_out(
    change: Callable[[Tensors], Tensors | None],
    error: type[LlmCoreMLError],
    told: str,
    tmp_path: Path,
) -> None:
    folder = edit(save(llama(), tmp_path / "m"), change)
    with pytest.raises(error, match=told) as raised:
        open_model(folder)
    assert "download both again" not in str(raised.value) or change is added_tokens


@pytest.mark.parametrize("tied", [True, False])
def test_the_advice_for_more_tokens_works(tied: bool, tmp_path: Path) -> None:
    reference = llama(tie_word_embeddings=tied)
    folder = save(reference, tmp_path / "m")
    reference.resize_token_embeddings(100)
    reference.save_pretrained(tmp_path / "resized")
    (tmp_path / "resized" / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="vocab_size to 100"):
        open_model(folder)
    tokens = [*tokens_for(97, 20), 99]
    error = logits_of(configure(folder, vocab_size=100), tokens) - expected_logits(
        reference, tokens
    )
    assert error.abs().max() < 1e-4


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (("__0_0.distcp", ".metadata"), "shards of FSDP.*accelerate merge-weights"),
        (("global_step10/", "zero_to_fp32.py"), "DeepSpeed.*zero_to_fp32.py"),
        (("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",), "DeepSpeed"),
        (("consolidated.00.pth", "params.json"), "original arrangement of Mistral or Meta"),
        (("model.nemo",), "NeMo"),
        (("flax_model.msgpack",), "another framework"),
        (("tf_model.h5",), "another framework"),
        (("model.onnx",), "program that was made of a model"),
        (("weights.00.npz",), "early MLX"),
        (("optimizer.pt", "scheduler.pt", "rng_state_0.pth"), "has no model.safetensors and no"),
        (("optimizer.pt", "pytorch_model.bin"), r"pickle \('pytorch_model.bin'\)"),
        (("checkpoint-500/config.json",), "Give the folder inside: .*checkpoint-500"),
        (("model.fp16.safetensors",), "rename a single file"),
    ],
)
def test_what_lies_in_the_place_of_weights_is_named(
    files: tuple[str, ...], told: str, tmp_path: Path
) -> None:
    folder = save(llama(), tmp_path / "m")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
        else:
            path.write_bytes(weights)
    with pytest.raises(CheckpointError, match=told):
        open_model(folder)


def test_a_consolidated_file_is_no_matter_of_its_name(tmp_path: Path) -> None:
    folder = edit(save(mistral(sliding_window=None), tmp_path / "m"), consolidated)
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    (folder / "params.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="original arrangement of Mistral") as raised:
        open_model(folder)
    assert "rename" not in str(raised.value)


# Git-LFS pointers

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 9085657\n"


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "tokenizer.model",
    ],
)
def test_a_pointer_in_the_place_of_a_file_is_told(name: str, tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "m")
    (folder / name).write_text(POINTER)
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(str(folder / name))} is a Git-LFS .*pull"
    ):
        open_model(folder)


def test_pointers_in_the_place_of_shards_their_index_and_a_gguf(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "m", max_shard_size="30KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_text(POINTER)
    with pytest.raises(CheckpointError, match=rf"{shard.name} is a Git-LFS pointer"):
        open_model(folder)
    (folder / "model.safetensors.index.json").write_text(POINTER)
    with pytest.raises(CheckpointError, match=r"index\.json is a Git-LFS pointer"):
        open_model(folder)
    (folder / "m.gguf").write_text(POINTER)
    with pytest.raises(CheckpointError, match=r"m\.gguf is a Git-LFS pointer"):
        open_model(folder / "m.gguf")


# Files that nobody may read


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "m.gguf"])
def test_a_file_that_may_not_be_read_is_no_damaged_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(llama(), tmp_path / "m")
    (folder / name).touch()
    opened = Path.open

    # Root may read everything, so the system's answer is given here.
    def refuse(path: Path, *words: Any, **settings: Any) -> Any:
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *words, **settings)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(
        CheckpointError, match=rf"{name} cannot be read: Permission denied\. Make it readable\.$"
    ):
        open_model(folder / name if name.endswith(".gguf") else folder)


def test_a_folder_that_may_not_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(llama(), tmp_path / "m")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder)
    with pytest.raises(CheckpointError, match=r"/m cannot be read: Permission denied\. Make it"):
        open_model(folder)
