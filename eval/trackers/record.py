"""What a tracker is told of an evaluation: figures and settings under stable names, and files.

    record = record_of(result.to_json())
    record.metrics["artifact/perplexity"], record.config["format"]

Names are those of `results.json`, joined by `/`. What no tracker could draw (windows, buckets, what
llama-perplexity prints) is in the document, which goes along as a file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from llm_coreml.bundle.folder import CARD, MANIFEST, RESULTS
from llm_coreml.bundle.manifest_file import read_manifest

_SOURCE = {"name": "model", "revision": "model_revision", "sha256": "model_sha256"}
# What no name of a metric may hold, by the strictest of the trackers.
_UNFIT = re.compile(r"[^A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Record:
    """One evaluation, for a tracker.

    Attributes:
        name: Of the run.
        created: When it was made, in UTC, as `2026-11-29T07:45:12Z`.
        config: Settings by name: model, format, target, text, machine, versions.
        metrics: Figures by name, all finite.
        document: The content of `results.json`; of a model's folder its own name alone.
        card: The model card, in Markdown; empty if there is none.
    """

    name: str
    created: str
    config: Mapping[str, str | int | float | bool]
    metrics: Mapping[str, float]
    document: Mapping[str, Any] = field(repr=False)
    card: str = field(default="", repr=False)

    @property
    def models(self) -> tuple[tuple[str, ...], list[list[str | float | None]]]:
        """Return names of columns and a row for each model that was measured, as a table."""
        rows = self.document["qualities"]
        names = [name for name, value in rows[-1].items() if _number(value) is not None]
        cells = [[each["name"], *(_number(each.get(name)) for name in names)] for each in rows]
        return ("model", *names), cells

    def write(self, folder: Path) -> list[Path]:
        """Write document and card into `folder`, and return their files."""
        texts = {RESULTS: json.dumps(self.document, indent=2, sort_keys=True), CARD: self.card}
        files = [folder / name for name, text in texts.items() if text]
        for path in files:
            path.write_text(texts[path.name], encoding="utf-8")
        return files


def record_of(
    document: Mapping[str, Any], bundle: str | Path | None = None, name: str = ""
) -> Record:
    """Return what to tell of an evaluation.

    Args:
        document: As `Evaluation.to_json` returns it, and `read_results` reads it.
        bundle: What was measured, whose card and versions go along.
        name: Of the run; what was measured gives its own.

    Raises:
        ArtifactError: the bundle's manifest is damaged.
    """
    document = _published(document)
    card, versions = ("", {}) if bundle is None else _told_by(Path(bundle))
    subject = document["subject"] or {}
    return Record(
        name=name or subject.get("name") or "evaluation",
        created=document["created"],
        config=dict(sorted({**_settings(document), **versions}.items())),
        metrics=dict(sorted(_metrics(document))),
        document=document,
        card=card,
    )


def _published(document: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out where a model's folder lies, which is nobody's business."""
    source = document["source"]
    if not source or source["kind"] != "folder":
        return dict(document)
    return {**document, "source": {**source, "name": PurePath(source["name"]).name}}


def _told_by(bundle: Path) -> tuple[str, dict[str, str]]:
    """Return the card of a bundle, and the versions that made it."""
    card = bundle / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if not (bundle / MANIFEST).is_file():
        return text, {}
    made = read_manifest(bundle / MANIFEST, checked=False).versions
    return text, {f"versions/{name}": version for name, version in made.items()}


def _settings(document: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    found: dict[str, Any] = {}
    for name, value in (document["source"] or {}).items():
        found[_SOURCE.get(name, f"source_{name}")] = value
    for section in ("export", "machine"):
        found |= document[section] or {}
    for part in ("subject", "tool"):
        found |= {f"{part}_{name}": value for name, value in (document[part] or {}).items()}
    for name in ("text", "text_sha256", "tokens", "window", "mode", "device", "created"):
        found[name] = document[name]
    found["program_sha256"] = document["program_sha256"]
    return {name: _plain(value) for name, value in found.items() if value is not None}


def _plain(value: Any) -> str | int | float | bool:
    return value if isinstance(value, (str, int, float)) else ",".join(map(str, value))


def _metrics(document: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for quality in document["qualities"]:
        yield from _numbers(quality["name"], quality)
        missing = quality.get("not_finite")
        if missing:
            yield f"{quality['name']}/not_finite_rows", float(missing["rows"])
    yield from _numbers("", {name: document[name] for name in ("program_bytes", "bits_per_weight")})
    yield from _numbers("bits_per_weight_parts", document["bits_per_weight_parts"] or {})
    for call in document["latencies"]:
        yield from _numbers(f"call/{call['tokens']}", call, "seconds", "tokens_per_second")
    timed = document["latency"]
    if timed:
        yield from _numbers("latency", timed, "load_seconds", "peak_memory_bytes")
        yield from _numbers("latency/decode", timed["decode"])
        for first in timed["first_token"]:
            yield from _numbers(
                f"latency/first_token/{first['prompt_tokens']}", first, "p50", "p90", "p99"
            )
    for device in document["devices"]:
        yield from _numbers(f"device/{_UNFIT.sub('-', device['name'])}", device)


def _numbers(prefix: str, found: Mapping[str, Any], *wanted: str) -> Iterator[tuple[str, float]]:
    for name, value in found.items():
        number = _number(value)
        if number is not None and (name in wanted or not wanted):
            yield "/".join(filter(None, (prefix, _UNFIT.sub("-", name)))), number


def _number(value: Any) -> float | None:
    """Return a finite number as such, and nothing of all else."""
    counts = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if counts and math.isfinite(value) else None
