"""Open a language model for a look inside: a bundle, its program, or a .pte without a bundle.

opened = open_artifact(Path("out"))
name, windows = read_tokens((opened,), text=None, ids=None, limit=64)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_coreml.bundle.folder import may_be_bundle, open_bundle
from llm_coreml.config.values import checked_count
from llm_coreml.errors import ArtifactError, ConfigError
from llm_coreml.eval.heldout import cut_to_context, read_windows
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.reference import DECLARED, ReferenceRunner
from llm_coreml.targets import BACKENDS


@dataclass(frozen=True, eq=False)
class Opened:
    """A program with what is needed to feed it.

    Attributes:
        path: The `.pte`.
        runner: Executes the program in the reference runtime.
        tokenizer: Its `tokenizer.json`, None if it has none.
    """

    path: Path
    runner: ReferenceRunner
    tokenizer: Path | None


def open_artifact(path: Path, execution: Execution = DECLARED, checked: bool = True) -> Opened:
    """Open a bundle, the program in it, or any other `.pte`.

    Args:
        path: Where it is.
        execution: Numerics, device and memory.
        checked: Refuse a bundle whose files have changed since the export wrote them.

    Raises:
        ArtifactError: it is damaged, no language model, or lowered for another runtime.
        ConfigError: the execution asks for what is not there.
    """
    if not may_be_bundle(path):
        return Opened(path, ReferenceRunner(path, execution), None)
    bundle = open_bundle(path, checked)
    description = bundle.manifest.description
    if BACKENDS[description.backend].runtime != "reference":
        raise ArtifactError(
            f"'{path}' is lowered for {description.backend}, into which the reference runtime "
            "cannot look; export with --backend coreml."
        )
    runner = ReferenceRunner(bundle.program, execution, description if checked else None)
    return Opened(bundle.program, runner, bundle.tokenizer if bundle.tokenizer.is_file() else None)


def read_tokens(
    artifacts: Sequence[Opened], text: Path | None, ids: Path | None, limit: int
) -> tuple[str, list[list[int]]]:
    """Return the name of what is read, and its tokens in windows that fit every artifact.

    Args:
        artifacts: Who will read; the first one with a tokenizer cuts the text.
        text: UTF-8 file; None takes the held-out text that ships in the package.
        ids: File of tokens, separated by white space or commas, instead of a text.
        limit: Most tokens to read.

    Raises:
        ConfigError: the file cannot be used, no tokenizer is at hand, or `limit` is no count.
    """
    checked_count("--tokens", limit)
    if text is not None and ids is not None:
        raise ConfigError("--text and --ids are two sources of tokens; give one of them.")
    context = min(artifact.runner.context for artifact in artifacts)
    if ids is not None:
        return ids.name, cut_to_context(_read_ids(ids), context, (), limit)
    tokenizer = next((item.tokenizer for item in artifacts if item.tokenizer is not None), None)
    if tokenizer is None:
        raise ConfigError(
            f"'{artifacts[0].path}' comes without a tokenizer, so no text can be read; give its "
            "bundle, or tokens with --ids FILE."
        )
    return read_windows(text, tokenizer, context, limit)


def _read_ids(path: Path) -> list[int]:
    try:
        words = path.read_text(encoding="utf-8").replace(",", " ").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--ids '{path}' cannot be read: {error}.") from None
    for word in words:
        # Digits of other scripts are numbers to int(), but no tokens.
        if not (word.isascii() and word.isdigit()) or len(word) > 9:
            raise ConfigError(
                f"--ids '{path}' holds '{word[:40]}', which is no token; give numbers separated by "
                "white space."
            )
    return [int(word) for word in words]
