"""Tells trackers of evaluations, each library in a process of its own.

    track(result, "wandb:my-project", "tensorboard:runs", bundle="out")

A library that hangs, prints, or has the host's run open can do no harm that way: it has so many
seconds, its output goes nowhere, and what fails is one sentence without secrets.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llm_coreml.errors import TrackerError
from llm_coreml.eval.results import Evaluation
from llm_coreml.eval.trackers.record import Record, record_of
from llm_coreml.eval.trackers.sink import Sink, Tracker, reason_of
from llm_coreml.own_process import python_command
from llm_coreml.quiet import is_loud

# Seconds for the library to load and its server to answer, and for each run beyond the first.
PATIENCE, _EACH = 120.0, 10.0
# None of them tells its makers of its use; what a user has set wins.
_PRIVATE = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
}
_SECRET = re.compile(r"(KEY|TOKEN|PASSWORD|SECRET|CREDENTIALS?)$", re.IGNORECASE)
_LEAST = 6
# `scheme://user:password@host`, and what a query calls a secret.
_IN_ADDRESS = re.compile(
    r"(?<=://)[^/@\s]+(?=@)|(?<=[?&])[^=&\s]*(?:key|token|secret)=[^&\s'\"]+", re.IGNORECASE
)


def track(
    result: Evaluation | Mapping[str, Any],
    *trackers: str | Sink,
    bundle: str | Path | None = None,
    name: str = "",
) -> tuple[str, ...]:
    """Tell trackers of an evaluation.

    Args:
        result: What `evaluate` returned, or a document that `read_results` read.
        trackers: Names as on the command line, such as `wandb:my-project`; or sinks of one's own,
            which are called in this process.
        bundle: What was measured, whose card and versions are told, too.
        name: Of the run; what was measured gives its own.

    Returns:
        Where each run can be looked at.

    Raises:
        ConfigError: no such tracker; none is told then.
        TrackerError: some could not be told; all others were.
    """
    document = result.to_json() if isinstance(result, Evaluation) else result
    record = record_of(document, bundle, name)
    parsed = [Tracker.parse(each) if isinstance(each, str) else each for each in trackers]
    places, failures = [], []
    for tracker in parsed:
        try:
            places += send([record], tracker)
        except TrackerError as error:
            failures.append(str(error))
    if failures:
        raise TrackerError(" ".join(failures))
    return tuple(places)


def send(
    records: Sequence[Record], tracker: Tracker | Sink, patience: float = PATIENCE
) -> list[str]:
    """Tell one tracker of evaluations, and return where each can be looked at.

    Args:
        records: At least one.
        tracker: Whom to tell.
        patience: Seconds that a library in a process of its own has for the first.

    Raises:
        TrackerError: it could not be told of all.
    """
    if not isinstance(tracker, Tracker):
        return [_called(record, tracker) for record in records]
    tracker.check_installed()
    given = json.dumps([asdict(record) for record in records])
    out, ended = _run(tracker, given, patience + _EACH * (len(records) - 1))
    answers = [json.loads(line) for line in out.splitlines()]
    places = [without_secrets(answer["where"]) for answer in answers if "where" in answer]
    if len(places) == len(records):
        return places
    reason = next((answer["error"] for answer in answers if "error" in answer), ended)
    some = f"{len(places)} of {len(records)} evaluations" if len(records) > 1 else "no evaluation"
    raise TrackerError(f"{tracker.name} was told of {some}: {without_secrets(reason)}.")


def _called(record: Record, sink: Sink) -> str:
    try:
        return sink.log(record)
    # It is anybody's, and may raise anything.
    except Exception as error:
        reason = without_secrets(reason_of(error))
        raise TrackerError(f"{type(sink).__name__} was told of no evaluation: {reason}.") from error


def _run(tracker: Tracker, given: str, seconds: float) -> tuple[str, str]:
    """Return what the process answered, and how it ended."""
    command = python_command("llm_coreml.eval.trackers.own", "answer", tracker.name, tracker.place)
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if is_loud() else subprocess.DEVNULL,
        env={**_PRIVATE, **os.environ},
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )
    ended = ""
    try:
        out, _ = process.communicate(given, seconds)
    except subprocess.TimeoutExpired:
        _kill(process)
        out, _ = process.communicate()
        ended = f"it did not answer within {seconds:.0f} seconds"
    finally:
        # Whatever it has started ends with it.
        _kill(process)
        process.wait()
    return out, ended or f"its process ended with code {process.returncode}"


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def without_secrets(text: str) -> str:
    """Return a text without what the environment calls a key, a token or a password."""
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= _LEAST:
            text = text.replace(value, "***")
    return _IN_ADDRESS.sub("***", text)
