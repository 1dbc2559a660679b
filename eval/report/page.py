"""One page of results: tables and pictures in the page itself, redrawn as one filters.

write_report(Path("results"), Path("report.html"))

Nothing is fetched. Without JavaScript all tables and pictures are there; with it, the filters work
and pictures tell of each point.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from llm_coreml.errors import ConfigError
from llm_coreml.eval.report.charts import Chart, charts_of
from llm_coreml.eval.report.rows import Collected, collect, facts_of
from llm_coreml.output import file_beside, output_error

INSTALL = "pip install 'llm-coreml[report]'"
# Rows of which all is told in the page, those of which the figures are; more are in pictures alone.
_CLOSE = 400
_ROWS = 2500
_PROBLEMS = 20


@dataclass(frozen=True)
class Sample:
    """What an export answers.

    Attributes:
        name: Of the export.
        text: Its answer.
    """

    name: str
    text: str


def write_report(
    place: Path, output: Path, prompt: str = "", samples: Sequence[Sample] = ()
) -> Collected:
    """Write the page of the results in `place`, and return what it shows.

    Args:
        place: A folder of results, or a file.
        output: The page.
        prompt: What the samples answer.
        samples: Answers to show side by side.

    Raises:
        ConfigError: there are no results, or the extra is not installed.
        OutputError: the page cannot be written.
    """
    check_installed()
    found = collect(place)
    page = render(found, place.resolve().name, prompt, samples)
    try:
        with file_beside(output) as draft:
            draft.write_text(page, encoding="utf-8")
    except OSError as error:
        raise output_error(output, error) from None
    return found


def check_installed() -> None:
    """Refuse to go on without what draws.

    Raises:
        ConfigError: as said.
    """
    try:
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"What draws the pictures of a report is not installed ({error}); get it by {INSTALL}."
        ) from None


def render(
    found: Collected,
    title: str,
    prompt: str = "",
    samples: Sequence[Sample] = (),
    live: bool = False,
) -> str:
    """Return the page.

    Args:
        found: What it shows.
        title: Its name.
        prompt: What the samples answer.
        samples: Answers to show side by side.
        live: It asks its server for new results.
    """
    import vl_convert

    charts = charts_of(found.rows)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"number": _number, "share": _share, "facts": facts_of}
    return environment.from_string(_part("page.html")).render(
        title=title,
        rows=found.rows[:_ROWS],
        close=_CLOSE,
        total=len(found.rows),
        failures=found.failures[:_CLOSE],
        failed=len(found.failures),
        problems=found.problems[:_PROBLEMS],
        further=max(0, len(found.problems) - _PROBLEMS),
        choices={
            "model": sorted({row.model for row in found.rows}),
            "format": sorted({row.format for row in found.rows}),
            "target": sorted({row.target for row in found.rows}),
        },
        pictures=[(chart, vl_convert.vegalite_to_svg(chart.whole())) for chart in charts],
        data=_data(charts),
        style=_part("page.css"),
        script=_part("page.js"),
        library=vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed; window.vega = vega;"),
        prompt=prompt,
        samples=samples,
        live=live,
    )


def _part(name: str) -> str:
    return importlib.resources.files("llm_coreml.eval.report").joinpath(name).read_text("utf-8")


def _data(charts: Sequence[Chart]) -> str:
    """Return what the pictures are drawn from, as JSON that no page takes for its own end."""
    # All but the calls are drawn from the same results, which are told once.
    points = max((chart.data for chart in charts if chart.needs), key=len, default=())
    told: dict[str, Any] = {
        "points": list(points),
        "charts": {
            chart.name: {
                "spec": chart.spec,
                "needs": chart.needs,
                "data": [] if chart.needs else list(chart.data),
            }
            for chart in charts
        },
    }
    return json.dumps(told).replace("<", "\\u003c")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"
