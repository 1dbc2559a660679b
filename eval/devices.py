"""Figures of a device, beside what the evaluation found: they join a bundle's results.

results, devices = import_device_run("out", Path("device.json"), "MacBook Air M3")

The figures are a device's own, as its runner printed them; nothing here measures or checks them.
"""

from __future__ import annotations

import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from llm_coreml.bundle.folder import RESULTS, Bundle, open_bundle
from llm_coreml.bundle.strict_json import parse
from llm_coreml.bundle.typed_json import read_record
from llm_coreml.cpp.device_run import (
    DeviceRun,
    check_record,
    device_run_schema,
    read_device_run,
)
from llm_coreml.errors import ConfigError
from llm_coreml.eval.results import RESULTS_VERSION, DeviceFigures
from llm_coreml.output import check_writable, write_json
from llm_coreml.printable import printable
from llm_coreml.progress import Progress, Silent

# Results hold a few figures of each part; nobody has so many devices.
_LARGEST = 1 << 22
_LONGEST_NAME = 100


def import_device_run(
    bundle: str | Path, run: Path, name: str, checked: bool = True
) -> tuple[dict[str, Any], tuple[DeviceFigures, ...]]:
    """Put a device's figures into a bundle's `results.json`, in place of earlier ones of its name.

    Args:
        bundle: Folder that an export wrote, and that has been evaluated.
        run: What the runner printed on the device.
        name: What to call the device.
        checked: Refuse files that have changed since the export wrote them.

    Returns:
        The content of `results.json`, and the devices in it.

    Raises:
        ArtifactError: the bundle is damaged.
        ConfigError: the run is damaged or another program's, the name is none, or there are no
            results of this program to join.
        OutputError: the results cannot be written.
    """
    _check_name(name)
    opened = open_bundle(Path(bundle), checked)
    check_writable(opened.folder, RESULTS)
    found = read_device_run(run)
    _check_program(found, run, opened)
    results = _results_of(opened)
    if results is None:
        raise ConfigError(
            f"'{opened.folder}' has no {RESULTS} of this program, which the figures would join; "
            "measure it first with llm-coreml eval, and --artifact-only if the original is not at "
            "hand."
        )
    devices = {device.name: device for device in devices_of(opened)} | {name: _figures(name, found)}
    joined = tuple(devices[each] for each in sorted(devices))
    results["devices"] = [asdict(device) for device in joined]
    write_json(opened.folder / RESULTS, results)
    return results, joined


def devices_of(bundle: Bundle, progress: Progress | None = None) -> tuple[DeviceFigures, ...]:
    """Return the devices in a bundle's results, if those are whole and of its program.

    Args:
        bundle: A bundle.
        progress: Told where there are results that are not.
    """
    results = _results_of(bundle)
    if results is None and os.path.lexists(bundle.folder / RESULTS):
        (progress or Silent()).note(
            f"the {RESULTS} that was there is damaged, or another program's or version's: figures "
            "of devices in it are not kept; import them again"
        )
    listed = [] if results is None else results.get("devices", [])
    return tuple(read_record(DeviceFigures, each) for each in listed)


def _results_of(bundle: Bundle) -> dict[str, Any] | None:
    """Return the results beside a program; None if they are damaged, another's, or not there."""
    path = bundle.folder / RESULTS
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            return None
        found = parse(path.read_bytes())
        check_record(found, _results_schema(bundle.manifest.program.sha256))
    except (OSError, ValueError):
        return None
    results: dict[str, Any] = found
    return results


def _results_schema(program_sha256: str) -> dict[str, Any]:
    """Return what is asked of results that figures join, and of the figures in them."""
    run = device_run_schema()
    told = [field.name for field in fields(DeviceFigures)]
    names = {key: rule for key, rule in run["properties"].items() if key in told}
    count = {"type": "integer", "minimum": 0}
    device = {
        "type": "object",
        "additionalProperties": False,
        "required": told,
        "properties": {
            **names,
            "name": {"type": "string", "minLength": 1, "maxLength": _LONGEST_NAME},
            "prompt_tokens": count,
            "new_tokens": count,
        },
    }
    return {
        "type": "object",
        "required": ["program_sha256", "qualities", "version"],
        "properties": {
            "version": {"const": RESULTS_VERSION},
            "program_sha256": {"const": program_sha256},
            "devices": {"type": "array", "items": device},
        },
        "$defs": run["$defs"],
    }


def _figures(name: str, run: DeviceRun) -> DeviceFigures:
    return DeviceFigures(
        name=name,
        runner=run.runner,
        executorch=run.executorch,
        system=run.system,
        prompt_tokens=len(run.prompt_ids),
        new_tokens=len(run.ids),
        runs=run.runs,
        runs_agree=run.runs_agree,
        load_seconds=run.load_seconds,
        time_to_first_token_seconds=run.time_to_first_token_seconds,
        tokens_per_second=run.tokens_per_second,
        peak_memory_bytes=run.peak_memory_bytes,
    )


def _check_program(run: DeviceRun, path: Path, bundle: Bundle) -> None:
    """Refuse the run of another program, or one that this program cannot have."""
    program = bundle.manifest.program
    if run.program_sha256 != program.sha256:
        raise ConfigError(
            f"'{path}' tells of another program (SHA-256 {run.program_sha256[:12]}...) than "
            f"'{bundle.folder}' holds ({program.sha256[:12]}...); give the run of this one."
        )
    # The last token is chosen, and not read.
    read = len(run.prompt_ids) + max(0, len(run.ids) - 1)
    vocabulary = program.constant_methods.get("get_vocab_size")
    largest = max(*run.prompt_ids, *run.ids, 0)
    if read > program.context or (isinstance(vocabulary, int) and largest >= vocabulary):
        raise ConfigError(
            f"'{path}' tells of {read} tokens up to {largest}, and the program has a context of "
            f"{program.context} and a vocabulary of {vocabulary}; run it on the device again."
        )
    if run.backend != bundle.manifest.target.backend:
        raise ConfigError(
            f"'{path}' tells of a program for {run.backend}, and this one is for "
            f"{bundle.manifest.target.backend}; give the run of this one."
        )


def _check_name(name: str) -> None:
    if not name.strip() or len(name) > _LONGEST_NAME or printable(name) != name:
        raise ConfigError(
            f"--device-name is '{printable(name, 60)}'; give one line of 1 to {_LONGEST_NAME} "
            "printable characters, such as 'iPhone 16 Pro'."
        )
