"""The models of an evaluation on its text: who reads, what is remembered, and how cores are shared.

scoring = Scoring(read_heldout(...), METRICS, Kept(folder), jobs=None, execution=Execution())
qualities = scoring.measure(opened, progress)
scoring.forget()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from llm_coreml.eval.by_layer import layer_errors, noise_floor
from llm_coreml.eval.cores import Share, share
from llm_coreml.eval.finished import FinishedWindows
from llm_coreml.eval.heldout import HeldOut
from llm_coreml.eval.kept import Kept
from llm_coreml.eval.measurable import Measurable
from llm_coreml.eval.metrics import METRICS, Metric
from llm_coreml.eval.quality import measure_quality
from llm_coreml.eval.remembered import RememberedReader
from llm_coreml.eval.results import Quality
from llm_coreml.eval.whole_rows import whole_rows
from llm_coreml.eval.window_scores import Reader
from llm_coreml.progress import Progress
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.eager import EagerRunner

# A few tokens have a program expand its weights, before there are processes that each would.
_FEW = 2
# The noise floor changes little with the text, and takes as long as reading it twice.
_FLOOR_WINDOWS = 2


class Scoring:
    """The figures of models on one text.

    Args:
        read: The text.
        metrics: What to measure of each model.
        kept: Where is kept what need not be made again; None is nowhere.
        jobs: Windows at a time; None takes as many as cores and memory allow.
        execution: How the program is executed.
    """

    def __init__(
        self,
        read: HeldOut,
        metrics: Sequence[Metric],
        kept: Kept | None,
        jobs: int | None,
        execution: Execution,
    ) -> None:
        self._read, self._metrics, self._kept = read, metrics, kept
        self._jobs, self._execution = jobs, execution
        self._finished: FinishedWindows | None = None

    def measure(self, opened: Measurable, progress: Progress) -> tuple[Quality, ...]:
        """Score the text by every model, what is measured last.

        Args:
            opened: What is measured, and the models that it is compared to.
            progress: Told of the share of windows that are read.
        """
        windows, artifact = self._read.windows, opened.runner
        originals, source = opened.originals()
        facts = {**opened.facts, "source": source}
        progress.stage("score")
        shared = share((*originals.values(), artifact), windows, self._jobs, self._execution.device)
        if self._jobs is not None and shared.jobs < min(self._jobs, len(windows)):
            progress.note(
                "Windows are read one after the other: in parallel the reference runtime reads "
                "them on a CPU, under Linux."
            )
        readers: dict[str, Reader] = dict(originals)
        if self._kept is not None and "original" in originals:
            readers["original"] = RememberedReader(
                originals["original"], source, self._kept, shared.threads
            )
        readers["artifact"] = whole_rows(artifact, windows[0], progress.note)
        if shared.jobs > 1:
            artifact.logits(windows[0][:_FEW])
        self._finished = self._before(readers, facts, shared)
        found = measure_quality(
            readers,
            windows,
            progress.advance,
            self._metrics,
            self._read.sizes,
            share=shared,
            finished=self._finished,
            note=progress.note,
        )
        progress.stage("layers")
        return tuple(self._deeper(quality, originals) for quality in found)

    def _deeper(self, quality: Quality, originals: Mapping[str, EagerRunner]) -> Quality:
        """Return a model's figures with what happens inside of it, where that can be seen."""
        measures, windows = quality.measures, self._read.windows
        original = originals.get("original")
        if measures is None or measures.not_finite is not None or original is None:
            return quality
        if quality.name == "original":
            floor = noise_floor(original, windows[:_FLOOR_WINDOWS])
            return replace(quality, measures=replace(measures, noise_floor=floor))
        if quality.name in originals:
            layers = layer_errors(original, originals[quality.name], windows[0])
            return replace(quality, measures=replace(measures, layers=layers))
        return quality

    def forget(self) -> None:
        """Remove what was kept for going on after an interruption: the results are written."""
        if self._finished is not None:
            self._finished.forget()

    def _before(
        self, readers: Mapping[str, Reader], facts: Mapping[str, str], shared: Share
    ) -> FinishedWindows | None:
        """Return the windows that are finished; none where a metric is not one of ours."""
        if self._kept is None or not all(metric in METRICS for metric in self._metrics):
            return None
        return FinishedWindows(
            self._kept,
            {
                **facts,
                "what": "scores",
                "models": repr([(name, each.label) for name, each in readers.items()]),
                "metrics": repr([metric.name for metric in self._metrics]),
                "execution": repr(self._execution),
                "threads": str(shared.threads),
                "processor": torch.backends.cpu.get_cpu_capability(),
            },
        )
