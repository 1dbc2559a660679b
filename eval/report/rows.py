"""The results of a folder as rows of a table, read quickly, and what could not be read.

found = collect(Path("results"))
found.rows[0].perplexity, found.problems

A folder may hold ten thousand results, so that a document is not held against the whole schema:
what a row is made of is checked, and a document that lacks it is named and left out.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from llm_coreml.eval.compared import name_of, tokens_per_second
from llm_coreml.eval.failed_cells import Failure, failures_in
from llm_coreml.eval.result_places import no_results, result_files
from llm_coreml.printable import printable

# A line of results takes some thousand bytes for each hundred windows.
_LARGEST = 1 << 24
_LONGEST = 200
# By which share a perplexity is worse than the one before it to be called a regression.
_WORSE = 0.01
_TOLD = ("export", "source", "machine", "tool", "program_sha256", "tokens", "mode", "device")


@dataclass(frozen=True)
class Row:
    """A result.

    Attributes:
        name: What was evaluated.
        model: What was exported.
        format: Format of the linear layers, and what else was done to weights.
        target: What it was exported for.
        created: When, ISO 8601 in UTC.
        text: What it was measured on.
        text_sha256: Hash of that.
        perplexity: Per token; None where it was not measured, as in each figure.
        mean_kl: From the original, in nats per token.
        top1: Share of tokens with the original's most likely next one.
        bytes: Of the program.
        bits_per_weight: Of all matrices.
        speed: Tokens per second of decoding.
        runtime: What computed.
        latencies: Tokens of a call, and seconds.
        told: Parts of its document, from which `facts_of` tells more.
        front: No other is smaller and better on the same text.
        regression: By which share the perplexity is worse than that of the result before it, of
            the same model, format, target and text; None if it is no regression.
    """

    name: str
    model: str
    format: str
    target: str
    created: str
    text: str
    text_sha256: str
    perplexity: float | None
    mean_kl: float | None
    top1: float | None
    bytes: float | None
    bits_per_weight: float | None
    speed: float | None
    runtime: str
    latencies: tuple[tuple[int, float], ...] = ()
    told: Mapping[str, Any] = field(default_factory=dict, repr=False)
    front: bool = False
    regression: float | None = None

    @property
    def series(self) -> tuple[str, str, str, str]:
        """What it has in common with earlier and later results of the same."""
        return self.model, self.format, self.target, self.text_sha256


@dataclass(frozen=True)
class Collected:
    """What a folder holds.

    Attributes:
        rows: The results, the newest first.
        problems: What could not be read, a sentence each.
        failures: Cells of sweeps that have none, the newest first.
    """

    rows: tuple[Row, ...]
    problems: tuple[str, ...]
    failures: tuple[Failure, ...] = ()


def collect(place: Path) -> Collected:
    """Read every result in a folder.

    Args:
        place: A folder with `.jsonl` and `.json` files and bundles, a bundle, or a file.

    Raises:
        ConfigError: it cannot be read, or holds nothing that looks like a result.
    """
    rows, problems = [], []
    for found in _read(place):
        if isinstance(found, Row):
            rows.append(found)
        else:
            problems.append(found)
    failures = sorted(failures_in(place), key=lambda each: each.created, reverse=True)
    if not rows and not problems and not failures:
        raise no_results(place)
    rows.sort(key=lambda row: row.created)
    judged = _with_regressions(_with_front(rows))
    return Collected(tuple(reversed(judged)), tuple(problems), tuple(failures))


def _read(place: Path) -> Iterator[Row | str]:
    for path in result_files(place):
        try:
            with path.open("rb") as opened:
                lines: Iterator[bytes] | list[bytes] = opened
                if path.suffix != ".jsonl":
                    lines = [opened.read(_LARGEST + 1)]
                for number, line in enumerate(lines, 1):
                    where = (
                        f"line {number} of {path.name}" if path.suffix == ".jsonl" else path.name
                    )
                    if line.strip():
                        yield _row_or_problem(line, where)
        except OSError as error:
            yield f"{path.name} cannot be read: {error.strerror}"


def _row_or_problem(line: bytes, where: str) -> Row | str:
    if len(line) > _LARGEST:
        return f"{where} has more than {_LARGEST:,} bytes, and is no result"
    try:
        document = json.loads(line)
        version = document["version"]
        if version != _version():
            told = printable(str(version), 20)
            return f"{where} has version {told} of results, and this release reads {_version()}"
        return _row(document)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        return f"{where} is damaged ({printable(f'{type(error).__name__}: {error}', 80)})"


@functools.cache
def _version() -> int:
    """Return the version of results that is read; their module would bring torch."""
    schema = importlib.resources.files("llm_coreml.eval").joinpath("results.schema.json")
    (version,) = json.loads(schema.read_text("utf-8"))["properties"]["version"]["enum"]
    return int(version)


def _row(document: Mapping[str, Any]) -> Row:
    artifact = document["qualities"][-1]
    export, source = document.get("export") or {}, document.get("source") or {}
    calibrated = " calibrated" if export.get("calibrated") else ""
    created = str(document["created"])
    datetime.fromisoformat(created.replace("Z", "+00:00"))
    speed = tokens_per_second(document)
    return Row(
        name=_text(name_of(document)),
        model=_text(str(source.get("name") or document["subject"]["name"])),
        format=_text(f"{export.get('format') or document['subject']['kind']}{calibrated}"),
        target=_text(str(export.get("target") or "none")),
        created=created,
        text=_text(str(document["text"])),
        text_sha256=str(document["text_sha256"]),
        perplexity=_number(artifact.get("perplexity")),
        mean_kl=_number(artifact.get("mean_kl")),
        top1=_number(artifact.get("top1_agreement")),
        bytes=_number(document.get("program_bytes")),
        bits_per_weight=_number(document.get("bits_per_weight")),
        speed=_number(speed),
        runtime=_text(str(artifact["runtime"])),
        latencies=tuple(
            (int(each["tokens"]), float(each["seconds"]))
            for each in document.get("latencies") or ()
            if float(each["seconds"]) > 0 and int(each["tokens"]) > 0
        ),
        told={
            **{key: document.get(key) for key in _TOLD},
            "not_finite": artifact.get("not_finite"),
        },
    )


def facts_of(row: Row) -> dict[str, str]:
    """Return what is told of a result when one looks closer: its manifest, text and machine."""
    export, source = row.told.get("export") or {}, row.told.get("source") or {}
    machine, tool = row.told.get("machine") or {}, row.told.get("tool") or {}
    bad = row.told.get("not_finite")
    facts = {
        "source": _joined(source, "kind", "name", "revision"),
        "weights (SHA-256)": _joined(source, "sha256"),
        "program (SHA-256)": _joined(row.told, "program_sha256"),
        "manifest (checksum)": _joined(export, "manifest_checksum"),
        "token table": _joined(export, "embedding_format"),
        "head": _joined(export, "head_format"),
        "made for": _joined(export, "backend", "minimum_os", "compute_precision"),
        "lengths": _joined(export, "seq_lengths"),
        "context": _joined(export, "context"),
        "text": row.text,
        "tokens": _joined(row.told, "tokens"),
        "measured by": " ".join((row.runtime, _joined(row.told, "mode", "device"))),
        "machine": _joined(machine, "system", "machine", "cores"),
        "tool": _joined(tool, "name", "version"),
        "no numbers": f"{bad['rows']} rows of logits hold NaN or inf" if bad else "",
    }
    return {name: _text(value) for name, value in facts.items() if value}


def _joined(values: Mapping[str, Any], *keys: str) -> str:
    return " ".join(str(values[key]) for key in keys if values.get(key) is not None)


@functools.lru_cache(1 << 14)
def _text(value: str) -> str:
    return printable(value, _LONGEST)


def _number(value: Any) -> float | None:
    """Return a figure; what is no number is not measured."""
    if value is None or isinstance(value, bool) or not math.isfinite(float(value)):
        return None
    return float(value)


def _with_front(rows: Sequence[Row]) -> list[Row]:
    """Mark those that no other of the same model and text beats in both size and perplexity."""
    best: dict[tuple[str, str], float] = {}
    front = set()
    sized = [at for at, row in enumerate(rows) if None not in (row.bytes, row.perplexity)]
    for at in sorted(sized, key=lambda at: (rows[at].bytes or 0.0, rows[at].perplexity or 0.0)):
        key, value = (rows[at].model, rows[at].text_sha256), rows[at].perplexity or 0.0
        if value < best.get(key, math.inf):
            best[key] = value
            front.add(at)
    return [replace(row, front=True) if at in front else row for at, row in enumerate(rows)]


def _with_regressions(rows: Sequence[Row]) -> list[Row]:
    """Mark those that are worse than the one before them, the oldest first."""
    before: dict[tuple[str, ...], float] = {}
    judged = []
    for row in rows:
        value = row.perplexity
        if value is not None:
            last = before.get(row.series)
            before[row.series] = value
            if last and value / last - 1.0 > _WORSE:
                row = replace(row, regression=value / last - 1.0)
        judged.append(row)
    return judged
