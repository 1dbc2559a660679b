"""The fastest reader of a program's logits that is proved to give what the program gives.

reader = whole_rows(open_runner(bundle), window, progress.note)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llm_coreml.errors import ArtifactError
from llm_coreml.runtime.every_row import CannotWidenError, EveryRow, prove
from llm_coreml.runtime.reference import ReferenceRunner
from llm_coreml.runtime.runner import Runner

# Reading fewer one at a time costs less than the proof.
_FEW = 16


def whole_rows(
    runner: Runner, window: Sequence[int], note: Callable[[str], None] = lambda _: None
) -> Runner:
    """Return what reads a text in chunks, or the runner itself where that is not proved.

    Args:
        runner: What runs the program.
        window: A text to prove it with.
        note: Told why a text is read one token at a time.
    """
    if not isinstance(runner, ReferenceRunner) or runner.seq_lengths[-1] == 1:
        if not runner.every_row and runner.seq_lengths[-1] > 1:
            note(_slow(f"{runner.label} gives its last rows alone"))
        return runner
    if not runner.every_row and len(window) <= _FEW:
        return runner
    try:
        reader = EveryRow(runner)
        wrong = None if runner.every_row else prove(reader, runner, window[:-1])
    except (CannotWidenError, ArtifactError) as error:
        wrong = str(error).rstrip(".")
    if wrong is None:
        return reader
    note(_slow(wrong))
    return runner


def _slow(reason: str) -> str:
    return (
        f"The text is read one token at a time, which is slow: {reason}. --logits all reads it all."
    )
