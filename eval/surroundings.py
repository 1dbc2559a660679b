"""When, by what and where an evaluation was made."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform

from llm_coreml.eval.results import Machine, Tool
from llm_coreml.machine import machine_memory, usable_cores

_NAME = "llm-coreml"


def now() -> str:
    """Return the time in UTC, to the second, such as `2026-11-29T07:45:12Z`."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def this_tool() -> Tool:
    """Return name and version of this package."""
    return Tool(_NAME, importlib.metadata.version(_NAME))


def this_machine() -> Machine:
    """Return what this machine is, without its name."""
    return Machine(
        system=f"{platform.system()} {platform.release()}",
        machine=platform.machine(),
        cores=usable_cores(),
        memory_bytes=machine_memory(),
    )
