"""Git-LFS pointers: short texts in the place of files that a clone did not fetch.

pointer_advice(Path("model/tokenizer.json"))  # None, or what it is and how to get the file
"""

from __future__ import annotations

from pathlib import Path

from llm_coreml.errors import CheckpointError

# The second is what the tool was called before its first release.
_BEGINNINGS = (
    b"version https://git-lfs.github.com/spec/",
    b"version https://hawser.github.com/spec/",
)

_LARGEST = 1 << 10


def pointer_advice(path: Path) -> str | None:
    """Return a sentence about `path` where it is a pointer, None where it is none or unreadable."""
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            return None
        with path.open("rb") as file:
            start = file.read(max(map(len, _BEGINNINGS)))
    except OSError:
        return None
    if not start.startswith(_BEGINNINGS):
        return None
    return (
        f"{path} is a Git-LFS pointer, not the file itself. Run git lfs install and git lfs pull "
        "where it was cloned, or download the file."
    )


def require_fetched(path: Path) -> None:
    """Raise CheckpointError where `path`, which may be absent, is a pointer or unreadable."""
    if advice := pointer_advice(path):
        raise CheckpointError(advice)
    try:
        if path.is_file():
            path.open("rb").close()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}. Make it readable."
        ) from None
