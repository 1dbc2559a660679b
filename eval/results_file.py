"""Results on disk: one document of an evaluation, or a line for each of many.

    append_result(Path("results"), evaluation.to_json())        # a line of results/results.jsonl
    for document in read_results(Path("results")): ...

Several processes may append to a folder at once: a line is written by one call, under a lock.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import importlib.resources
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fastjsonschema

from llm_coreml.bundle.strict_json import parse, validator
from llm_coreml.config.setting import brief
from llm_coreml.errors import ConfigError, OutputError
from llm_coreml.eval.result_places import no_results, result_files
from llm_coreml.eval.results import RESULTS_VERSION
from llm_coreml.output import check_name, output_error

LINES = "results.jsonl"
# A window takes a hundred bytes or so for each model, and no text has a hundred thousand of them.
_LARGEST = 1 << 24
_LONGEST = 160
# Seconds to wait for the lock of a folder: a line is written in less than one.
_PATIENCE = 30.0


def append_result(folder: Path, document: Mapping[str, Any]) -> Path:
    """Append a document to the lines in `folder`, which is made, and return their file.

    Raises:
        OutputError: it cannot be written, or another process keeps it locked.
    """
    check_name(folder)
    path = folder / LINES
    line = json.dumps(document, allow_nan=False, ensure_ascii=False).encode() + b"\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _lock(number, path)
            _append(number, line)
        finally:
            os.close(number)
    except OSError as error:
        raise output_error(path, error) from None
    return path


def check_results_folder(folder: Path) -> None:
    """Refuse a folder into which nothing can be appended, before hours are spent for it.

    Raises:
        OutputError: as said.
    """
    check_name(folder)
    lines = folder / LINES
    place = next(each for each in (lines, folder, *folder.absolute().parents) if each.exists())
    wrong_kind = place.is_dir() if place == lines else not place.is_dir()
    if wrong_kind or not os.access(place, os.W_OK | (os.X_OK if place.is_dir() else 0)):
        raise OutputError(
            f"'{place}' cannot be written to, and results belong there; make it writable, or give "
            "another folder with --results."
        )


def _append(number: int, line: bytes) -> None:
    """Write a line with one call; what a full disk took half of is taken back."""
    before = os.fstat(number).st_size
    # A process that was killed on other systems of files may have left half a line.
    if before and os.pread(number, 1, before - 1) != b"\n":
        line = b"\n" + line
    written = os.write(number, line)
    if written != len(line):
        os.ftruncate(number, before)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _lock(number: int, path: Path) -> None:
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise OutputError(
                    f"'{path}' has been locked by another process for {_PATIENCE:.0f} seconds; end "
                    "that process, or give another folder with --results."
                ) from None
            time.sleep(0.02)
        else:
            return


def read_results(place: Path) -> list[dict[str, Any]]:
    """Return the documents at `place`, each held against the schema.

    Args:
        place: A folder of results, whose files and those of the bundles in it are read; a bundle;
            a `.jsonl`, or a `.json`.

    Raises:
        ConfigError: there is none, or one is damaged or of another version.
    """
    # What is no folder is read as it is: a pipe, too.
    files = result_files(place) if place.is_dir() else [place]
    if not files:
        raise no_results(place)
    return [document for path in files for document in _documents(path)]


def latest_result(place: Path) -> dict[str, Any]:
    """Return the document at `place`, of several the one that was made last.

    Raises:
        ConfigError: as `read_results`.
    """
    return max(read_results(place), key=lambda document: str(document["created"]))


def _documents(path: Path) -> Iterator[dict[str, Any]]:
    try:
        if path.suffix == ".jsonl":
            with path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _document(line, f"Line {number} of '{path}'")
        else:
            if path.stat().st_size > _LARGEST:
                raise ConfigError(f"'{path}' has more than {_LARGEST:,} bytes; it is no result.")
            yield _document(path.read_bytes(), f"'{path}'")
    except OSError as error:
        raise ConfigError(
            f"'{path}' cannot be read: {error.strerror}. Give a file or folder of results."
        ) from None


def _document(data: bytes, who: str) -> dict[str, Any]:
    try:
        found = parse(data)
    except ValueError as error:
        raise ConfigError(f"{who} is damaged: {error}. Evaluate again.") from None
    version = found.get("version") if isinstance(found, dict) else None
    if type(version) is not int or version != RESULTS_VERSION:
        raise ConfigError(
            f"{who} has version {brief(version)} of results; this release reads version "
            f"{RESULTS_VERSION}. Evaluate again, or use the release that wrote it."
        )
    # The library for schemas has the last word; of ten thousand documents it needs eight seconds.
    wrong = None if fits(found) else next(_validator().iter_errors(found), None)
    if wrong is not None:
        told = wrong.message if len(wrong.message) <= _LONGEST else f"breaks {wrong.validator}"
        raise ConfigError(f"{who} is damaged at {wrong.json_path}: {told}. Evaluate again.")
    document: dict[str, Any] = found
    return document


def results_schema() -> dict[str, Any]:
    """Return the JSON schema of `results.json` that ships in the package."""
    text = importlib.resources.files("llm_coreml.eval").joinpath("results.schema.json").read_text()
    schema: dict[str, Any] = json.loads(text)
    return schema


def fits(document: object) -> bool:
    """Return whether results have the form of the schema: quickly, and without saying why not."""
    try:
        _quick()(document)
    except fastjsonschema.JsonSchemaValueException:
        return False
    return True


@functools.cache
def _quick() -> Any:
    # By draft 4, unlike later ones, 1.0 is no integer; the schema has no keyword that is younger.
    older = {"$schema": "http://json-schema.org/draft-04/schema#"}
    return fastjsonschema.compile(results_schema() | older)


@functools.cache
def _validator() -> Any:
    return validator(results_schema())
