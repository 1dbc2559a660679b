"""Arrangements of weights that are recognised and not read, and how to convert each.

conversion_of(names)  # by the tensors' names, or None
folder_conversion(folder)  # by the files that lie in the place of model.safetensors, or None
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from llm_coreml.checkpoint.checkpoint import listing, matches, quoted

SAVE = "AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)"
_SCRIPTS = "in the repository of transformers, src/transformers/models"
_META = (
    "in the original arrangement of Mistral or Meta, which is not read. Take the "
    "model-*.safetensors of the same model, or convert it: convert_mistral_weights_to_hf.py or "
    f"convert_llama_weights_to_hf.py ({_SCRIPTS})."
)

# What a name shows, and what is to be said of its checkpoint.
_BY_NAME = (
    (
        re.compile(r"\.lora_[AB]\.|\.lora_embedding_[AB]\b|\.base_layer\."),
        "with LoRA layers inside, and no adapter_config.json that gives their scaling. Merge them "
        "first: model = model.merge_and_unload() of the PeftModel, then "
        "model.save_pretrained(folder).",
    ),
    (re.compile(r"\.attention\.w[qkvo]\.weight$|\.feed_forward\.w[123]\.weight$"), _META),
    (
        re.compile(r"linear_qkv\.|\bquery_key_value\.|\bdense_h_to_4h\.|language_model\.encoder\."),
        "as Megatron or NeMo name them, or those of another architecture. Convert it with the tool "
        "that exports to Hugging Face (Megatron Bridge, or nemo's convert scripts).",
    ),
    (
        re.compile(r"\bblock_sparse_moe\.|\.experts\.\d+\.|\.experts\.(gate_up|down)_proj"),
        "of a mixture of experts, which config.json does not describe. Use the config.json that "
        "belongs to them; mixtures of experts are not supported yet.",
    ),
    (
        re.compile(r"^(transformer\.h|gpt_neox|model\.decoder|bert|encoder)\."),
        "of another architecture than config.json names. Use config.json and weights of one and "
        "the same model.",
    ),
    (
        re.compile(r"\.parametrizations\.|\.weight_orig$|\.weight_g$"),
        "with parametrized weights. Make them plain first (remove_parametrizations, prune.remove "
        "or remove_weight_norm of torch), then save the model again.",
    ),
)

_QUANTIZED = (
    re.compile(r"\.qweight$|\.weight_packed$|\.weight_scale(_inv)?$|\.quant_state\.|\.absmax$"),
    "of quantized matrices, but config.json has no quantization_config. Put it back as it was "
    "published, or give the unquantized checkpoint.",
)

# The same of files, in the order in which they are looked for.
_BY_FILE = (
    (
        ("*.distcp", "pytorch_model_fsdp_*"),
        "shards of FSDP. Merge them: accelerate merge-weights SHARDS FOLDER, where SHARDS is the "
        "folder of the .distcp files.",
    ),
    (
        ("global_step*", "zero_to_fp32.py", "*mp_rank_*_model_states.pt", "*zero_pp_rank_*"),
        "shards of DeepSpeed. Merge them: python zero_to_fp32.py . FOLDER --safe_serialization, in "
        "the folder of the training.",
    ),
    (("consolidated*", "params.json"), f"weights {_META}"),
    (
        ("*.nemo", "model_optim_rng.pt", "mp_rank_*"),
        "weights of Megatron or NeMo. Convert it with the tool that exports to Hugging Face "
        "(Megatron Bridge, or nemo's convert scripts).",
    ),
    (
        ("flax_model*.msgpack", "tf_model*.h5", "rust_model.ot", "*.ckpt.index"),
        "weights of another framework. Convert it where a transformers 4 reads them: "
        "AutoModelForCausalLM.from_pretrained(..., from_flax=True or from_tf=True)"
        ".save_pretrained(folder).",
    ),
    (
        ("*.onnx", "*.mlpackage", "*.mlmodelc", "*.pte", "*.engine"),
        "a program that was made of a model, and not its weights. Give the checkpoint that it was "
        "made from.",
    ),
    (
        ("weights*.npz",),
        "weights of an early MLX. Convert the original with a present one: mlx_lm.convert.",
    ),
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# What a training leaves beside weights.
_NO_WEIGHTS = (
    "optimizer*",
    "scheduler*",
    "scaler*",
    "rng_state*",
    "training_args*",
    "random_states*",
)


def conversion_of(names: Collection[str], quantized: bool = False) -> str | None:
    """Return what tensors of these names are, and how they become what is read; None if unknown.

    Args:
        names: Names that are not the ordinary ones of weights.
        quantized: The configuration says how matrices are quantized.

    Returns:
        An answer that goes on from "it holds tensors".
    """
    for pattern, answer in _BY_NAME if quantized else (*_BY_NAME, _QUANTIZED):
        if any(pattern.search(name) for name in names):
            return answer
    return None


def folder_conversion(folder: Path) -> str | None:
    """Return what lies in `folder` in the place of safetensors, and what to do; None if unknown."""
    files = sorted(path.name for path in folder.iterdir())
    for patterns, answer in _BY_FILE:
        found = [name for name in files if matches(name, patterns)]
        if found:
            return f"{folder} holds {listing(quoted(found), limit=3)}: {answer}"
    pickles = [name for name in files if name.endswith(_PICKLES) and not matches(name, _NO_WEIGHTS)]
    if pickles:
        return (
            f"{folder} holds its weights only as a pickle ({listing(quoted(pickles))}), which can "
            f"run code and is never loaded; convert it once where you trust it: {SAVE} writes "
            "safetensors."
        )
    inner = _models_inside(folder)
    if inner:
        return (
            f"{folder} holds no weights itself. Give the folder inside: {listing(inner, limit=3)}."
        )
    return None


def _models_inside(folder: Path) -> list[str]:
    """Return the folders of models that a training or the hub's cache keeps inside of `folder`."""
    found = [*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")]
    return sorted(str(path.parent) for path in found)
