"""What a run on a device was found to be: the JSON of the runners in C++ and Swift, typed.

    run = read_device_run(Path("device.json"))
    run.tokens_per_second, run.time_to_first_token_seconds

The file comes from another machine, so that nothing in it is believed before it fits the schema.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_coreml.bundle.strict_json import parse, validator
from llm_coreml.bundle.typed_json import read_record
from llm_coreml.config.setting import brief
from llm_coreml.errors import ConfigError
from llm_coreml.runtime.runner import Finish
from llm_coreml.runtime.sampling import Sampling

# A token takes seven bytes or so, and no context holds a million.
_LARGEST = 1 << 24
_LONGEST = 160


@dataclass(frozen=True)
class DeviceRun:
    """A prompt, and what a device made of it.

    Attributes:
        version: Of this form.
        runner: `cpp`, or `swift`.
        executorch: Version of the runtime.
        system: Name, version and machine, as the system tells them.
        backend: What ran the program, a name in `targets.BACKENDS`.
        program_sha256: Which program.
        sampling: How tokens were chosen.
        prompt_ids: What was read.
        ids: What came after, in the first of the runs.
        finish: Why it ended: `stop`, `length` or `context`.
        runs: How often it was done.
        runs_agree: Every time gave the same tokens.
        load_seconds: Until the program was loaded; on Core ML it is compiled then.
        time_to_first_token_seconds: Median over the runs, from the prompt to its first token.
        peak_memory_bytes: Most memory of the process, mapped files included.
        tokens_per_second: Median over the runs, of all tokens after that; None if there are none.
    """

    version: int
    runner: str
    executorch: str
    system: str
    backend: str
    program_sha256: str
    sampling: Sampling
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    finish: Finish
    runs: int
    runs_agree: bool
    load_seconds: float
    time_to_first_token_seconds: float
    peak_memory_bytes: int
    tokens_per_second: float | None = None


def read_device_run(path: Path) -> DeviceRun:
    """Read what a runner printed.

    Raises:
        ConfigError: the file cannot be read, or is no such report.
    """
    try:
        if not path.is_file():
            raise ConfigError(f"'{path}' is no file; give what a runner printed on the device.")
        if path.stat().st_size > _LARGEST:
            raise ConfigError(f"'{path}' is larger than what any runner prints; give another file.")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise ConfigError(f"'{path}' cannot be read: {error}. Give another file.") from None
    try:
        return parse_device_run(data)
    except ValueError as error:
        raise ConfigError(
            f"'{path}' is nothing that a runner prints: {error}. Run it on the device again, and "
            "keep what it prints as it is."
        ) from None


def parse_device_run(data: bytes) -> DeviceRun:
    """Return the report in a JSON text.

    Raises:
        ValueError: it is none; the message names the place.
    """
    found = parse(data)
    check_record(found, device_run_schema())
    return read_record(DeviceRun, found)


def device_run_schema() -> dict[str, Any]:
    """Return the JSON schema of a report, which ships in the package."""
    text = importlib.resources.files(__package__).joinpath("device_run.schema.json").read_text()
    schema: dict[str, Any] = json.loads(text)
    return schema


def check_record(value: Any, schema: Mapping[str, Any]) -> None:
    """Hold a value against a schema, by which 1.0 is no integer.

    Raises:
        ValueError: it does not fit; the message names the first place.
    """
    error = next(validator(schema).iter_errors(value), None)
    if error is not None:
        told = error.message
        if len(told) > _LONGEST:
            told = f"{brief(error.instance)} breaks its rule, {error.validator}"
        raise ValueError(f"{error.json_path[:_LONGEST]}: {told}")
