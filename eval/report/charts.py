"""The pictures of a report as Vega-Lite (https://vega.github.io/vega-lite), data apart.

charts = charts_of(found.rows)
charts[0].spec, charts[0].data

Colours and lines are named by the page's own variables, so that one picture is light and dark; a
format has its own shape as well as its own colour (Okabe and Ito's, which all eyes tell apart).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_coreml.eval.report.rows import Row

_COLOURS = [f"var(--mark{at})" for at in range(8)]
_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "stroke")
# A picture is read by eye; more lines than this are none.
_LINES = 24
# Beyond this, the largest perplexity by the smallest leaves no room for all others on one scale.
_WIDE = 20.0
# Points that are drawn where nothing can be filtered.
_POINTS = 600

Datum = Mapping[str, Any]


@dataclass(frozen=True)
class Chart:
    """A picture.

    Attributes:
        name: Its place in the page.
        title: What it shows.
        about: What one sees in it, a sentence.
        needs: The figure that a result has to have to be in it; empty where it draws something
            else than results.
        spec: Vega-Lite without data.
        data: What it draws, the fields `model`, `format` and `target` among them.
    """

    name: str
    title: str
    about: str
    needs: str
    spec: Mapping[str, Any]
    data: Sequence[Datum]

    def whole(self) -> dict[str, Any]:
        """Return Vega-Lite with data, thinned to what one can see."""
        data = self.data
        if len(data) > _POINTS:
            kept = [each for each in data if each.get("front") or each.get("regression")]
            data = [*kept[:_POINTS], *data[: _POINTS - min(len(kept), _POINTS)]]
        return {**self.spec, "data": {"name": "rows", "values": list(data)}}


def charts_of(rows: Sequence[Row]) -> tuple[Chart, ...]:
    """Return those charts of which there is something to draw.

    Args:
        rows: Results, the newest first.
    """
    points = [_datum(row) for row in rows if row.perplexity is not None]
    sized = [each for each in points if each["megabytes"] is not None]
    timed = [each for each in points if each["speed"] is not None]
    quality = _quality([each["perplexity"] for each in points])
    charts = (
        Chart(
            "size",
            "Quality against size",
            "Down is better, left is smaller; the line is the front, which nothing beats in both.",
            "megabytes",
            _scatter("megabytes", "program, MB", quality, front=True),
            sized,
        ),
        Chart(
            "speed",
            "Quality against speed",
            "Down is better, right is faster. Tokens per second of decoding, on the machine and by "
            "the runtime that the table names: no prediction for a device.",
            "speed",
            _scatter("speed", "tokens per second", quality, front=False),
            timed,
        ),
        Chart(
            "latency",
            "Latency by length",
            "Seconds of one call by how many tokens it reads, of the newest results.",
            "",
            _latency(),
            _calls(rows),
        ),
        Chart(
            "history",
            "History",
            "Perplexity over time; a ring marks a result that is more than 1 % worse than the one "
            "before it, of the same model, format, target and text.",
            "perplexity",
            _history(quality),
            points,
        ),
    )
    return tuple(chart for chart in charts if chart.data)


def _datum(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "model": row.model,
        "format": row.format,
        "target": row.target,
        "created": row.created,
        "perplexity": row.perplexity,
        "megabytes": None if row.bytes is None else row.bytes / 1e6,
        "speed": row.speed,
        "front": row.front,
        "regression": row.regression is not None,
        "series": f"{row.model} {row.format} {row.target} {row.text_sha256[:6]}",
    }


def _calls(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the timed calls of the newest result of each series."""
    newest: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row.latencies:
            newest.setdefault(row.series, row)
    return [
        {**_datum(row), "tokens": tokens, "seconds": seconds}
        for row in list(newest.values())[:_LINES]
        for tokens, seconds in row.latencies
    ]


def _base(layers: Sequence[Any]) -> dict[str, Any]:
    axis = {
        "labelColor": "var(--ink)",
        "titleColor": "var(--ink)",
        "gridColor": "var(--rule)",
        "domainColor": "var(--ink)",
        "tickColor": "var(--ink)",
        "labelFontSize": 12,
        "titleFontSize": 13,
        "titleFontWeight": "normal",
    }
    legend = {"labelColor": "var(--ink)", "titleColor": "var(--ink)", "labelLimit": 260}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": 560,
        "height": 300,
        "background": "transparent",
        "layer": list(layers),
        "config": {
            "axis": axis,
            "legend": {**legend, "orient": "bottom", "columns": 3, "symbolLimit": 12},
            "view": {"stroke": "var(--rule)"},
            "range": {"category": _COLOURS, "symbol": list(_SHAPES)},
            "font": "system-ui, sans-serif",
        },
    }


def _quantity(field: str, title: str, **scale: Any) -> dict[str, Any]:
    return {
        "field": field,
        "type": "quantitative",
        "title": title,
        "scale": scale or {"zero": False, "nice": True},
    }


def _quality(values: Sequence[float]) -> dict[str, Any]:
    """Return how perplexities are drawn: few bits give hundreds of times those of many."""
    wide = bool(values) and max(values) > _WIDE * min(values) > 0
    return _quantity("perplexity", "perplexity", **({"type": "log"} if wide else {}))


_TOLD = [{"field": each} for each in ("name", "model", "created")]
_FORMAT = {"field": "format", "type": "nominal", "title": "format"}
_NO_LEGEND: dict[str, Any] = {**_FORMAT, "legend": None}


def _scatter(field: str, title: str, quality: Datum, front: bool) -> dict[str, Any]:
    place = {"x": _quantity(field, title), "y": quality}
    points = {
        "mark": {"type": "point", "size": 70, "filled": True, "opacity": 0.85},
        "encoding": {
            **place,
            "color": _FORMAT,
            "shape": _FORMAT,
            "tooltip": [
                *_TOLD,
                {"field": field, "title": title, "format": ".2f"},
                {"field": "perplexity", "format": ".4f"},
            ],
        },
    }
    line = {
        "transform": [{"filter": "datum.front"}],
        "mark": {"type": "line", "color": "var(--ink)", "opacity": 0.6, "strokeDash": [4, 3]},
        "encoding": {**place, "detail": {"field": "model"}},
    }
    return _base([line, points] if front else [points])


def _latency() -> dict[str, Any]:
    place = {
        "x": _quantity("tokens", "tokens of a call", type="log"),
        "y": _quantity("seconds", "seconds", type="log"),
    }
    line = {
        "mark": {"type": "line", "opacity": 0.7},
        "encoding": {**place, "color": _FORMAT, "detail": {"field": "series"}},
    }
    points = {
        "mark": {"type": "point", "size": 50, "filled": True},
        "encoding": {
            **place,
            "color": _FORMAT,
            "shape": _NO_LEGEND,
            "tooltip": [*_TOLD, {"field": "tokens"}, {"field": "seconds", "format": ".4f"}],
        },
    }
    return _base([line, points])


def _history(quality: Datum) -> dict[str, Any]:
    place = {
        "x": {"field": "created", "type": "temporal", "title": "when"},
        "y": quality,
    }
    line = {
        "mark": {"type": "line", "opacity": 0.5},
        "encoding": {**place, "color": _FORMAT, "detail": {"field": "series"}},
    }
    points = {
        "mark": {"type": "point", "size": 45, "filled": True},
        "encoding": {
            **place,
            "color": _FORMAT,
            "shape": _NO_LEGEND,
            "tooltip": [*_TOLD, {"field": "perplexity", "format": ".4f"}],
        },
    }
    ring = {
        "transform": [{"filter": "datum.regression"}],
        "mark": {
            "type": "point",
            "size": 260,
            "filled": False,
            "strokeWidth": 2.5,
            "color": "var(--alarm)",
        },
        "encoding": {**place, "tooltip": [{"value": "a regression"}]},
    }
    return _base([line, points, ring])
