"""What a file may ask of this machine: sizes are read from files that nobody vouches for.

check_memory(4 * elements, "The state 'cache'")
"""

from __future__ import annotations

import functools
import os

from llm_coreml.errors import ArtifactError


@functools.cache
def machine_memory() -> int:
    """Return the bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(nbytes: int, who: str) -> None:
    """Check that `nbytes` could be held at all.

    Raises:
        ArtifactError: the machine has less memory; `who` is the subject of the sentence.
    """
    if nbytes > machine_memory():
        raise ArtifactError(
            f"{who} takes {nbytes / 2**30:.0f} GiB; this machine has "
            f"{machine_memory() / 2**30:.0f} GiB. The file is damaged, or needs a larger machine."
        )
