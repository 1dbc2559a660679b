"""The best export of a training, kept in one folder; all others are measured and gone.

    best = Best(Path("exports"), "perplexity", Gates())
    told = best.offer(Path("exports/step-20"))

What takes its place is moved there, so that the folder is a whole bundle at any time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llm_coreml.bundle.folder import RESULTS, check_output
from llm_coreml.errors import ConfigError
from llm_coreml.eval.compared import FIGURES, Document
from llm_coreml.eval.gates import Gates, judge
from llm_coreml.eval.results_file import append_result, latest_result
from llm_coreml.output import folder_beside

FOLDER = "best"
# By what the best is told, the least first; by a gate it is the newest that holds.
RANKED = ("perplexity", "mean_kl")
_OF = {figure.name: figure.of for figure in FIGURES}
_TOLD = ("perplexity", "mean_kl", "top1_agreement", "program_bytes")


@dataclass(frozen=True)
class Offered:
    """What became of an export.

    Attributes:
        figures: What was measured, by name; what was not is left out.
        kept: It is the best now.
        failed: Gates that it does not hold, as a clause; empty if it holds them all.
    """

    figures: Mapping[str, float]
    kept: bool
    failed: str


class Best:
    """The folder of the best, and what the next one has to beat."""

    def __init__(self, output: Path, by: str, gates: Gates) -> None:
        """Keep the best in `output`, told `by` a figure of `RANKED` or by `gate`."""
        self._output, self._by, self._gates = output, by, gates
        self._least = math.inf

    @property
    def folder(self) -> Path:
        """Where the best is."""
        return self._output / FOLDER

    def resume(self) -> None:
        """Take what an earlier part of the same training kept as what is to be beaten."""
        results = self.folder / RESULTS
        if results.is_file():
            self._least = self._rank(latest_result(results))

    def offer(self, bundle: Path) -> Offered:
        """Keep `bundle` if it is the best, and its figures in any case.

        Raises:
            LlmCoreMLError: its results cannot be read, or it cannot be moved.
        """
        document = latest_result(bundle / RESULTS)
        append_result(self._output, document)
        verdicts = judge(self._gates, document)
        failed = "; ".join(each.text for each in verdicts if each.state != "held")
        rank = self._rank(document)
        kept = not failed and (rank < self._least or self._by not in RANKED)
        if kept:
            check_output(self.folder, overwrite=True)
            with folder_beside(self.folder, lambda path: check_output(path, True)) as draft:
                for path in bundle.iterdir():
                    path.rename(draft / path.name)
            self._least = rank
        return Offered(_figures(document), kept, failed)

    def _rank(self, document: Document) -> float:
        value = _OF[self._by](document) if self._by in RANKED else None
        return math.inf if value is None or math.isnan(value) else value


def checked_rank(by: str, gates: Gates) -> str:
    """Return by what the best is told, if it can be.

    Raises:
        ConfigError: no such figure, or a gate that asks for nothing.
    """
    if by not in (*RANKED, "gate"):
        raise ConfigError(f"best_by is '{by}'; give perplexity, mean_kl or gate.")
    if by == "gate" and not gates.any:
        raise ConfigError("best_by is 'gate', and no gate asks for anything; give gates.")
    return by


def _figures(document: Document) -> dict[str, float]:
    found = {name: _OF[name](document) for name in _TOLD}
    return {name: value for name, value in found.items() if value is not None}
