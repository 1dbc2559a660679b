"""Bytes of every part of a bundle and of the program in it."""

from __future__ import annotations

from llm_coreml.artifact.inmemoryfs import unpack
from llm_coreml.artifact.pte import read_delegates
from llm_coreml.bundle.folder import PROGRAM, RESULTS, Bundle
from llm_coreml.targets import BACKENDS


def measure_bytes(bundle: Bundle) -> dict[str, int]:
    """Return bytes by part: files of the bundle, and below `model.pte/` what is inside it.

    Raises:
        ArtifactError: the program is damaged.
    """
    sizes = {
        path.name: path.stat().st_size
        for path in sorted(bundle.folder.iterdir())
        if path.is_file() and path.name != RESULTS
    }
    if BACKENDS[bundle.manifest.target.backend].runtime != "reference":
        return sizes
    inside = 0
    for delegate in read_delegates(bundle.program):
        for path, content in unpack(delegate.data).items():
            name = f"{PROGRAM}/{path.rsplit('/', 1)[-1]}"
            sizes[name] = sizes.get(name, 0) + len(content)
            inside += len(content)
    sizes[f"{PROGRAM}/container"] = sizes[PROGRAM] - inside
    return sizes
