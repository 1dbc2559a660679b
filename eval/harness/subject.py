"""A bundle or a model as lm-eval needs it: what reads tokens, and what its tokenizer calls things.

subject = open_subject(Path("out"))
subject.runner.rows_after(subject.tokenizer.prompt("def add(a, b):"), 1)
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llm_coreml.bundle.bundle_runner import open_runner
from llm_coreml.bundle.bundled_tokenizer import write_tokenizer
from llm_coreml.bundle.folder import TOKENIZER, Bundle, open_bundle
from llm_coreml.errors import ArtifactError, CheckpointError, ConfigError
from llm_coreml.eval.measurable import kind_of
from llm_coreml.eval.originals import EAGER
from llm_coreml.model import open_model
from llm_coreml.quantize.quantized import build_original
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.eager import EagerRunner
from llm_coreml.runtime.reference import DECLARED
from llm_coreml.runtime.runner import Runner
from llm_coreml.tokenizer import Tokenizer
from llm_coreml.tokenizer.chat_template import ChatTemplate, find_template, named_tokens

# Most positions of a model that is not exported; its own are often more than memory holds.
_CONTEXT = 4096


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


def open_subject(
    folder: Path,
    execution: Execution = DECLARED,
    checked: bool = True,
    note: Callable[[str], None] = lambda _: None,
) -> Subject:
    """Open a bundle, or the folder or hub id of a model, for lm-eval.

    Args:
        folder: Folder that an export wrote; or a model, which answers in PyTorch.
        execution: Numerics, device and memory of the reference runtime.
        checked: Refuse files that have changed since the export wrote them.
        note: Told what a user should know of a model.

    Raises:
        ArtifactError: the bundle is damaged, or has no tokenizer.
        CheckpointError: the model is damaged, or has no tokenizer.
        ConfigError: the execution asks for what is not there.
    """
    if kind_of(folder) == "eager":
        return _open_model(folder, execution, note)
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
        names=_names(bundle.folder, bundle.manifest.description.stop_tokens, tokenizer, template),
        stop=bundle.manifest.description.stop_tokens,
        template=template,
        info=_info(bundle),
    )


def _open_model(source: Path, execution: Execution, note: Callable[[str], None]) -> Subject:
    """Open a model that has not been exported."""
    if execution != DECLARED:
        raise ConfigError(
            f"'{source}' is a model, which answers in PyTorch with fp32 on the CPU; leave mode and "
            "device out, or export it."
        )
    model = open_model(source)
    with tempfile.TemporaryDirectory(prefix="llm-coreml-") as place:
        files = Path(place)
        _, stop = write_tokenizer(model, files, note)
        if not (files / TOKENIZER).is_file():
            raise CheckpointError(
                f"'{source}' has no tokenizer that can be read here, and lm-eval's tasks are "
                "texts; give a model with one."
            )
        tokenizer, template = Tokenizer(files / TOKENIZER), find_template(files)
        names = _names(files, stop, tokenizer, template)
    decoder = build_original(model, min(_CONTEXT, model.spec.longest_context))
    return Subject(
        name=model.source.name.rstrip("/").rpartition("/")[2],
        runner=EagerRunner(decoder, EAGER),
        tokenizer=tokenizer,
        names=names,
        stop=stop,
        template=template,
        info={
            "model_dtype": "fp32",
            "model_revision": model.source.revision or "",
            "model_sha": model.sha256(),
            "model_source_name": model.source.name,
        },
    )


def _names(
    folder: Path, stop: Sequence[int], tokenizer: Tokenizer, template: ChatTemplate | None
) -> NamedTokens:
    """Return special tokens: the tokenizer's files in `folder` name them, or the program."""
    unnamed = {"bos_token": tokenizer.beginning[:1], "eos_token": stop[:1]}
    texts = {key: tokenizer.decode(ids, special=True) for key, ids in unnamed.items() if ids}
    texts |= named_tokens(folder)
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
