"""Links in a checkpoint's folder: what one leads to elsewhere is never copied into a bundle.

refuse_foreign_link(Path("model/chat_template.jinja"))
"""

from __future__ import annotations

from pathlib import Path

from llm_coreml.errors import UnsupportedError

_SNAPSHOTS, _BLOBS = "snapshots", "blobs"


def refuse_foreign_link(path: Path) -> None:
    """Refuse a file that is a link out of its folder; the hub's cache links to its own blobs.

    Whoever wrote the folder chose the target, which may be any file that this user can read.

    Raises:
        UnsupportedError: as said.
    """
    folder, target = path.parent.resolve(), path.resolve()
    if target.is_relative_to(folder):
        return
    in_cache = folder.parent.name == _SNAPSHOTS
    if in_cache and target.is_relative_to(folder.parent.parent / _BLOBS):
        return
    raise UnsupportedError(
        f"'{path}' is a link to '{target}', outside of its folder, and is not copied into a "
        "bundle. If you trust it, put the file itself there."
    )
