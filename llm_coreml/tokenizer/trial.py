"""The first reading of a tokenizer file, in a process of its own: a crash or a hang is there.

try_apart(Path("tokenizer.json"))
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from llm_coreml.errors import CheckpointError
from llm_coreml.tokenizer.apart import ApartError, run_apart
from llm_coreml.tokenizer.battery import TEXTS

# A tokenizer of 30 MB takes two seconds on a busy machine.
_SECONDS = 30.0
# Contents that passed in this process.
_PASSED: set[str] = set()


class UnfitError(CheckpointError):
    """A tokenizer that can be loaded, and cannot read plain texts."""


def try_apart(path: Path) -> None:
    """Read `path` and the battery's texts with it in another process, once per content.

    Raises:
        CheckpointError: there is no such file, it is no tokenizer, or it crashes or hangs.
        UnfitError: it fails on a plain text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"'{path}' is no tokenizer: {error.strerror or error}. Save it again."
        ) from None
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 in _PASSED:
        return
    try:
        reply = run_apart("trial", {"path": str(path.absolute())}, _SECONDS)
    except ApartError as error:
        raise CheckpointError(
            f"'{path}' cannot be used as a tokenizer: {error}. Save it again, or leave it out."
        ) from None
    if reply["damaged"] is not None:
        raise CheckpointError(f"'{path}' is no tokenizer: {reply['damaged']}. Save it again.")
    if reply["problem"] is not None:
        raise UnfitError(f"The tokenizer cannot be used: {reply['problem']}.")
    _PASSED.add(sha256)


def work(request: dict[str, Any]) -> dict[str, str | None]:
    """Load the file and read every text of the battery; runs in the other process.

    Returns:
        `damaged`, why it cannot be loaded, and `problem`, what goes wrong with a text; or None.
    """
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(Path(request["path"]).read_bytes())
    except BaseException as error:  # a panic is no Exception
        return {"damaged": str(error), "problem": None}
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return {"damaged": None, "problem": _problem(tokenizer)}


def _problem(tokenizer: Any) -> str | None:
    for text in TEXTS:
        try:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            tokenizer.encode(text, add_special_tokens=True)
            tokenizer.decode(ids, skip_special_tokens=True)
            tokenizer.decode(ids, skip_special_tokens=False)
        except BaseException as error:  # a panic is no Exception
            return f"it cannot read {text[:20]!r}: {error}"
        if not ids and text.isascii() and text.strip() and text.isprintable():
            return f"it has no token for {text[:20]!r}"
    return None
