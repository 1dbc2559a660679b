"""A bundle as lm-eval needs it: a program that reads tokens, and what its tokenizer calls things.

subject = open_subject(Path("out"))
subject.runner.rows_after(subject.tokenizer.prompt("def add(a, b):"), 1)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llm_coreml.bundle.bundle_runner import open_runner
from llm_coreml.bundle.folder import Bundle, open_bundle
from llm_coreml.errors import ArtifactError
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.reference import DECLARED
from llm_coreml.runtime.runner import Runner
from llm_coreml.tokenizer import Tokenizer
from llm_coreml.tokenizer.chat_template import ChatTemplate, find_template, named_tokens


@dataclass(frozen=True)
class NamedTokens:
    """A tokenizer's special tokens and template, under the names by which lm-eval asks for them.

    Attributes:
        bos_token: Text of the token that begins a text, None if none does.
        bos_token_id: Its id.
        eos_token: Text of the token that ends a text.
        eos_token_id: Its id.
        pad_token: Text of what fills up; nothing is ever filled up here.
        pad_token_id: Its id.
        chat_template: The Jinja of the chat template, None without one.
    """

    bos_token: str | None = None
    bos_token_id: int | None = None
    eos_token: str | None = None
    eos_token_id: int | None = None
    pad_token: str | None = None
    pad_token_id: int | None = None
    chat_template: str | None = None


@dataclass(frozen=True, eq=False)
class Subject:
    """A language model with its tokenizer.

    Attributes:
        name: What its results are filed under.
        runner: Reads tokens.
        tokenizer: Text to tokens and back.
        names: Its special tokens and template.
        stop: Tokens that end a text.
        template: The chat template, None without one.
        info: What results tell of it, by lm-eval's keys.
    """

    name: str
    runner: Runner
    tokenizer: Tokenizer
    names: NamedTokens
    stop: tuple[int, ...] = ()
    template: ChatTemplate | None = None
    info: Mapping[str, str | int] = field(default_factory=dict)


def open_subject(folder: Path, execution: Execution = DECLARED, checked: bool = True) -> Subject:
    """Open the bundle in `folder` for lm-eval.

    Args:
        folder: Folder that an export wrote.
        execution: Numerics, device and memory of the reference runtime.
        checked: Refuse files that have changed since the export wrote them.

    Raises:
        ArtifactError: the bundle is damaged, or has no tokenizer.
        ConfigError: the execution asks for what is not there.
    """
    bundle = open_bundle(folder, checked)
    if not bundle.tokenizer.is_file():
        raise ArtifactError(
            f"'{folder}' was exported without a tokenizer, and lm-eval's tasks are texts; export "
            "again with one."
        )
    tokenizer = Tokenizer(bundle.tokenizer)
    template = find_template(bundle.folder)
    return Subject(
        name=bundle.folder.resolve().name,
        runner=open_runner(bundle, execution),
        tokenizer=tokenizer,
        names=_names(bundle, tokenizer, template),
        stop=bundle.manifest.description.stop_tokens,
        template=template,
        info=_info(bundle),
    )


def _names(bundle: Bundle, tokenizer: Tokenizer, template: ChatTemplate | None) -> NamedTokens:
    """Return the special tokens of a bundle: its tokenizer's files name them, or the program."""
    stop = bundle.manifest.description.stop_tokens
    unnamed = {"bos_token": tokenizer.beginning[:1], "eos_token": stop[:1]}
    texts = {key: tokenizer.decode(ids, special=True) for key, ids in unnamed.items() if ids}
    texts |= named_tokens(bundle.folder)
    known = {
        key: (text, number)
        for key, text in texts.items()
        if (number := tokenizer.token(text)) is not None
    }
    (bos, bos_id), (eos, eos_id), (pad, pad_id) = (
        known.get(key, (None, None)) for key in ("bos_token", "eos_token", "pad_token")
    )
    return NamedTokens(
        bos_token=bos,
        bos_token_id=bos_id,
        eos_token=eos,
        eos_token_id=eos_id,
        pad_token=pad,
        pad_token_id=pad_id,
        chat_template=None if template is None else template.text,
    )


def _info(bundle: Bundle) -> dict[str, str | int]:
    """Return what lm-eval's results tell of a model: there the keys are those of a HF model."""
    manifest = bundle.manifest
    return {
        "model_dtype": manifest.target.compute_precision,
        "model_revision": manifest.source.revision or "",
        "model_sha": manifest.source.sha256,
        "model_source_name": manifest.source.name,
        "program_sha256": manifest.program.sha256,
        "bits_per_weight": str(manifest.quantization.bits_per_weight),
        "target": manifest.target.backend,
    }
