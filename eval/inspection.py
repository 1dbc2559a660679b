"""The numerics of an exported language model on text: overflow, headroom, and what rounding does.

found = inspect_numerics(Path("out"))
found.overflows, found.nearest, found.layers
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llm_coreml.config.setting import brief
from llm_coreml.config.values import checked_count
from llm_coreml.errors import ConfigError
from llm_coreml.eval.pair import chunks, read_in_pairs
from llm_coreml.eval.reading import Opened, open_artifact, read_tokens
from llm_coreml.machine import machine_memory
from llm_coreml.progress import Progress, Silent
from llm_coreml.reference.observe.divergence import Compared, Parting
from llm_coreml.reference.observe.watch import Observed, Watch
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.reference import DECLARED, ReferenceRunner

DEFAULT_TOKENS = 64
DEFAULT_THRESHOLD = 1e-2


@dataclass(frozen=True)
class Difference:
    """An operation that differs between two runs.

    Attributes:
        name: Its first result's name in the program.
        type: Its type.
        layer: How many attention operations come before it.
        error: Largest error, relative to the largest magnitude; None if just one is inf or NaN.
    """

    name: str
    type: str
    layer: int
    error: float | None


@dataclass(frozen=True)
class Result:
    """A value of the run.

    Attributes:
        name: Its name in the program.
        type: The operation that makes it.
        layer: How many attention operations come before it.
        dtype: Declared type.
        largest: Largest finite magnitude.
        begins: `inf` and `nan` if they begin here.
        beside: Largest finite magnitude in the other mode, if one was run.
    """

    name: str
    type: str
    layer: int
    dtype: str
    largest: float
    begins: tuple[str, ...]
    beside: float | None


@dataclass(frozen=True)
class Inspection:
    """What `inspect_numerics` finds.

    Attributes:
        program: The `.pte`.
        text: Name of the text.
        tokens: Tokens read.
        device: Where it was computed.
        operations: Results of floating point that were watched.
        overflows: Where inf or NaN begin, in the order of the program.
        nearest: fp16 results closest to fp16's largest number, the closest first.
        against: The mode that `declared` was compared with, or None.
        threshold: The error that `first` exceeds.
        first: The first operation where the modes part, None if nowhere.
        layers: The operation with the largest error of each layer.
    """

    program: str
    text: str
    tokens: int
    device: str
    operations: int
    overflows: tuple[Result, ...]
    nearest: tuple[Result, ...]
    against: str | None
    threshold: float
    first: Difference | None
    layers: tuple[Difference, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def inspect_numerics(
    path: Path,
    *,
    text: Path | None = None,
    ids: Path | None = None,
    tokens: int = DEFAULT_TOKENS,
    against: str | None = "fp32",
    device: str = "cpu",
    threshold: float = DEFAULT_THRESHOLD,
    top: int = 10,
    checked: bool = True,
    progress: Progress | None = None,
) -> Inspection:
    """Run the program at `path` on text as it declares, and beside it in another mode.

    Args:
        path: A bundle or `.pte`.
        text: UTF-8 file; None takes the held-out text that ships in the package.
        ids: File of tokens, instead of a text.
        tokens: Most tokens to read.
        against: Mode to compare with; None runs the declared one alone.
        device: torch's name of a device.
        threshold: Relative error from which the modes count as parted.
        top: How many results to list as nearest to the limit.
        checked: Refuse a bundle whose files have changed since the export wrote them.
        progress: Told of stages and shares.

    Raises:
        ArtifactError: the artifact is damaged, or no language model for Core ML.
        ConfigError: an argument cannot be used.
    """
    check_threshold(threshold)
    checked_count("--top", top, least=0)
    progress = progress or Silent()
    progress.stage("open")
    opened, other = _open(path, Execution(device=device), against, checked)
    name, windows = read_tokens((opened,), text, ids, tokens)
    progress.stage("watch")
    watch, beside, parting = _read(opened.runner, other, windows, progress.advance)
    first = parting.first(threshold) if parting else None
    found = [_result(item, beside) for item in watch.operations]
    return Inspection(
        program=str(opened.path),
        text=name,
        tokens=sum(len(window) - 1 for window in windows),
        device=device,
        operations=len(found),
        overflows=tuple(item for item in found if item.begins),
        nearest=tuple(_result(item, beside) for item in _nearest(watch, top)),
        against=against,
        threshold=threshold,
        first=difference(first) if first else None,
        layers=tuple(map(difference, parting.by_layer())) if parting else (),
    )


def _open(
    path: Path, execution: Execution, against: str | None, checked: bool
) -> tuple[Opened, ReferenceRunner | None]:
    """Return the program as it declares, and in the mode `against` if there is one."""
    if against is None:
        return open_artifact(path, execution, checked), None
    if against == DECLARED.mode:
        raise ConfigError("--against declared would compare the program with itself.")
    execution = halved(execution)
    other = open_artifact(path, replace(execution, mode=against), checked)
    return open_artifact(path, execution, checked), other.runner


def check_threshold(threshold: float) -> None:
    """Refuse what cannot be exceeded.

    Raises:
        ConfigError: as said.
    """
    if not isinstance(threshold, (int, float)) or not 0 <= threshold < math.inf:
        raise ConfigError(f"--threshold is {brief(threshold)}; give a number of 0 or more.")


def halved(execution: Execution) -> Execution:
    """Return `execution` for one of two programs that share this machine's memory."""
    budget = execution.memory_budget
    return execution if budget is not None else replace(execution, memory_budget=_share())


def _share() -> int:
    # Alone, a program's expanded weights may take half of the memory.
    return machine_memory() // 4


def difference(entry: Compared) -> Difference:
    """Return an operation's error as JSON can hold it."""
    error = entry.error if math.isfinite(entry.error) else None
    return Difference(entry.name, entry.type, entry.layer, error)


def _read(
    runner: ReferenceRunner,
    other: ReferenceRunner | None,
    windows: Sequence[Sequence[int]],
    on_progress: Callable[[float], None],
) -> tuple[Watch, dict[str, float], Parting | None]:
    """Return what was watched, sizes of the other's values, and the errors between modes."""
    if other is None:
        return _watch(runner, windows, on_progress), {}, None
    reading = read_in_pairs(runner, other, windows, on_progress)
    watch, other_watch = reading.watches
    return watch, {item.name: item.largest for item in other_watch.operations}, reading.parting


def _watch(
    runner: ReferenceRunner,
    windows: Sequence[Sequence[int]],
    on_progress: Callable[[float], None],
) -> Watch:
    watch = Watch(runner.program)
    with runner.program.observed(watch):
        for done, window in enumerate(windows):
            runner.reset()
            for chunk in chunks(runner.seq_lengths, window, ranged=runner.ranged):
                runner.step(chunk)
            on_progress((done + 1) / len(windows))
    return watch


def _nearest(watch: Watch, top: int) -> list[Observed]:
    made = [item for item in watch.operations if item.dtype == "fp16" and item.grows]
    return sorted(made, key=lambda item: -item.largest)[:top]


def _result(item: Observed, beside: dict[str, float]) -> Result:
    return Result(
        item.name,
        item.type,
        item.layer,
        item.dtype,
        item.largest,
        item.begins,
        beside.get(item.name),
    )
