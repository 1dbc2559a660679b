"""Runs a sweep: what is missing is tried, what was found is kept, and all of it is told.

swept = sweep("sweep.yaml", results="results", jobs=2)
print(swept)
swept.failures
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from llm_coreml.config.values import checked_count
from llm_coreml.eval.compared import FIGURES
from llm_coreml.eval.results_file import check_results_folder
from llm_coreml.eval.sweep.grid import cells_of
from llm_coreml.eval.sweep.identity import tasks_of
from llm_coreml.eval.sweep.local_engine import Found, run_here
from llm_coreml.eval.sweep.ray_engine import check_installed, run_on_ray
from llm_coreml.eval.sweep.store import Store
from llm_coreml.eval.sweep.sweep_file import Sweep, read_sweep
from llm_coreml.eval.sweep.swept import Swept, SweptCell
from llm_coreml.eval.sweep.task import Outcome, Task
from llm_coreml.progress import Progress
from llm_coreml.progress_bar import Step, listening

RESULTS_FOLDER = "results"
_MOST_JOBS = 256
# Which share of a sweep is done when a stage begins.
_STAGES = {"open": 0.0, "sweep": 0.01}


def sweep(
    file: str | Path | Sweep,
    *,
    results: str | Path = RESULTS_FOLDER,
    jobs: int = 1,
    ray: str | None = None,
    keep: bool = False,
    retry_failed: bool = False,
    limit: int | None = None,
    plan: bool = False,
    cache: str | Path | bool = True,
    progress: Progress | bool | Callable[[Step], object] | None = None,
) -> Swept:
    """Export and evaluate every cell of a sweep that is missing in `results`.

    A cell that fails, for whatever reason, is kept beside the others with its sentence, and is not
    tried again unless that is asked for. Whatever ends the sweep, cells that have ended are kept.

    Args:
        file: The file of the sweep, see `sweep_file`, or what it says.
        results: Folder of the results; reports and dashboards read it.
        jobs: Cells that run at once on this machine.
        ray: Address of a Ray cluster on which cells run instead, `auto`, or `local`.
        keep: Keep the bundles, too; cells without one are missing then.
        retry_failed: Try cells again that have failed.
        limit: Most cells to try now; None tries all that are missing.
        plan: Try none, and tell how all stand.
        cache: Folder of quantized weights, as `export` takes it.
        progress: Told of the share that is done, and in a note of each cell that ends: True draws a
            bar, a function is called with each `progress_bar.Step`, None and False are silent.

    Raises:
        ConfigError: the file is wrong, or settings contradict each other.
        LlmCoreMLError: a model or a text cannot be read, or the results cannot be written.
    """
    checked_count("--jobs", jobs, most=_MOST_JOBS)
    if limit is not None:
        checked_count("--limit", limit)
    asked = file if isinstance(file, Sweep) else read_sweep(Path(file))
    store, cells = Store(Path(results)), cells_of(asked)
    if not plan:
        check_results_folder(store.folder)
    if ray is not None:
        check_installed()
    with listening(progress, _STAGES) as listener:
        listener.stage("open")
        tasks = tasks_of(asked, cells, store.folder, listener.advance)
        found = {task.key: store.load(task) for task in tasks}
        missing = [] if plan else _missing(tasks, found, store, keep, retry_failed)
        told = _Told(listener, missing[:limit], len(found) - len(missing), len(found))
        chosen = cache if isinstance(cache, bool) else str(Path(cache).absolute())
        listener.stage("sweep")
        placed = [_placed(task, store, keep, chosen) for task in missing[:limit]]
        if placed:
            store.make()
        for task, outcome in _run(placed, jobs, ray, told):
            store.save(task, outcome)
            found[task.key] = outcome
            told.ended(task, outcome)
    return _swept(asked.name, tasks, found, {task.key for task in placed}, store)


def _swept(
    name: str,
    tasks: Sequence[Task],
    found: Mapping[str, Outcome | None],
    new: Collection[str],
    store: Store,
) -> Swept:
    def cell(task: Task) -> SweptCell:
        place = str(store.place(task))
        return SweptCell(task.label, task.key, place, task.key in new, found[task.key])

    return Swept(name, tuple(map(cell, tasks)))


def _missing(
    tasks: Sequence[Task],
    found: dict[str, Outcome | None],
    store: Store,
    keep: bool,
    retry_failed: bool,
) -> list[Task]:
    """Return the cells to try, of several with the same key the first."""
    missing: dict[str, Task] = {}
    for task in tasks:
        outcome = found[task.key]
        again = outcome is None or (retry_failed and outcome.state == "failed")
        unkept = keep and outcome is not None and outcome.state == "done"
        if again or (unkept and not store.holds_bundle(task)):
            missing.setdefault(task.key, task)
    return list(missing.values())


def _placed(task: Task, store: Store, keep: bool, cache: str | bool) -> Task:
    place = str(store.place(task).absolute()) if keep else None
    return replace(task, keep=place, cache=cache)


def _run(tasks: Sequence[Task], jobs: int, ray: str | None, told: _Told) -> Iterator[Found]:
    """Yield each cell with what came of it, from the engine that was asked for."""
    if not tasks:
        return
    heard = told.heard
    engine = run_here(tasks, jobs, heard) if ray is None else run_on_ray(tasks, ray, heard)
    with closing(engine):
        for found in engine:
            if found is None:
                told.go_on()
            else:
                yield found


class _Told:
    """Tells how far a sweep is, from what its cells tell."""

    def __init__(self, progress: Progress, tasks: Sequence[Task], before: int, total: int) -> None:
        self._progress, self._total = progress, total
        self._shares = dict.fromkeys((task.key for task in tasks), 0.0)
        self._before, self._ended = before, 0

    def heard(self, task: Task, share: float) -> None:
        """Remember which share of a cell is done; called from any thread."""
        self._shares[task.key] = max(share, self._shares[task.key])

    def ended(self, task: Task, outcome: Outcome) -> None:
        """Tell what came of a cell."""
        self._shares[task.key] = 1.0
        self._ended += 1
        found = SweptCell(task.label, task.key, "", True, outcome).cells()
        figures = [
            f"{each.label} {cell}" for each, cell in zip(FIGURES, found[2:], strict=False) if cell
        ]
        words = ", ".join(figures) if outcome.state == "done" else f"failed: {outcome.sentence}"
        at = f"{self._before + self._ended}/{self._total}"
        self._progress.note(f"{at} {task.label}: {words} ({outcome.seconds:.0f} s)")
        self.go_on()

    def go_on(self) -> None:
        """Tell how far all cells are together."""
        self._progress.advance(sum(self._shares.values()) / len(self._shares))
