"""The tokenizer of a GGUF file as the files that `transformers` has for it.

`transformers` reads vocabulary, merges, special tokens and the chat template. How a text is split
before merges apply, a file only names: what the name means is llama.cpp's, and is set here, since
`transformers` takes names that it does not know for GPT-2's. The same holds for the space that
sentencepiece puts before a text, also before one that begins with a space.

    write_tokenizer(Path("model.gguf"), metadata, folder)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_coreml.errors import CheckpointError
from llm_coreml.tokenizer.failures import raised_as

_GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
_DIGITS = (r"\p{N}", *_GPT2)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_QWEN2 = tuple(each.replace("{1,3}", "") for each in _LLAMA3)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_ENDING = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"{_ENDING}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_SEED = (_QWEN2[0].replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+"),)
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", *_GPT2, "[0-9][0-9][0-9]")
_HUNYUAN = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", *_GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
# Expressions that cut a text one after the other, by the name that llama.cpp gives to them.
_SPLITS = {
    "default": _DEFAULT,
    **dict.fromkeys(
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4"), _GPT2
    ),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS
    ),
    **dict.fromkeys(
        (
            *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0"),
            *("chatglm-bpe", "glm4", "lfm2"),
        ),
        _LLAMA3,
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), _QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), _GPT4O),
    "falcon": _FALCON,
    "hunyuan-dense": _HUNYUAN,
    "seed-coder": _SEED,
    "tekken": _TEKKEN,
}
# Bytes of a token or a merge: conversions try every cut of each.
_LONGEST = 4096
_ADVICE = "Put the model's tokenizer.json beside the file"


def write_tokenizer(path: Path, metadata: Mapping[str, Any], folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and a chat template, if there is one.

    Args:
        path: The file, of parts the first; its header was read without fault.
        metadata: What the header says.
        folder: Where to write; made if need be.

    Raises:
        CheckpointError: there is no tokenizer in the file, or none that can be converted.
        OSError: the folder cannot be written.
    """
    from transformers import PreTrainedTokenizerFast

    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(kind, str) or not isinstance(tokens, dict):
        raise CheckpointError(f"{path} holds no tokenizer. {_ADVICE}.")
    if any(isinstance(v, dict) and v.get("longest", 0) > _LONGEST for v in metadata.values()):
        raise CheckpointError(f"{path} holds tokens of more than {_LONGEST} bytes. {_ADVICE}.")
    name = metadata.get("tokenizer.ggml.pre", "default")
    if kind == "gpt2" and name not in _SPLITS:
        raise CheckpointError(
            f"{path} has a tokenizer that splits a text as '{name}' does, which is not known "
            f"here. {_ADVICE}."
        )
    failed = raised_as(
        lambda error: CheckpointError(
            f"The tokenizer in {path} cannot be converted: {type(error).__name__}: {error}. "
            f"{_ADVICE}."
        )
    )
    with failed:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            str(path.parent), gguf_file=path.name, local_files_only=True
        )
        backend = tokenizer.backend_tokenizer
        if kind == "gpt2":
            backend.pre_tokenizer = _splitter(_SPLITS[name])
        elif kind == "llama":
            _set_spaces(backend, metadata.get("tokenizer.ggml.add_space_prefix", True) is True)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))


def _splitter(expressions: tuple[str, ...]) -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(each), behavior="isolated") for each in expressions),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _set_spaces(backend: Any, prefix: bool) -> None:
    """Have spaces read as sentencepiece and llama.cpp do, with or without one before a text."""
    from tokenizers import decoders, normalizers

    space = "\u2581"
    prepend = [normalizers.Prepend(space)] if prefix else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", space)])
    backend.pre_tokenizer = None
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
