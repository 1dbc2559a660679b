"""Which systems this package runs on, told before a module is missed.

check_host()
"""

from __future__ import annotations

import importlib.util
import sys

from llm_coreml.errors import SystemUnfitError

# What only POSIX has: locks of drafts, bounds of memory and time.
_NEEDED = ("fcntl", "resource")


def check_host() -> None:
    """Refuse a system without what is needed of it.

    Raises:
        SystemUnfitError: as said.
    """
    if all(importlib.util.find_spec(name) for name in _NEEDED):
        return
    instead = (
        "install it in WSL (`wsl --install`, then pip in there)"
        if sys.platform == "win32"
        else "use one of these"
    )
    raise SystemUnfitError(
        f"llm-coreml runs on Linux and macOS, and this Python is one for '{sys.platform}'; "
        f"{instead}."
    )
