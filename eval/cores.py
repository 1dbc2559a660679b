"""How an evaluation shares the cores of a machine among the windows of a text.

shared = share(runners, windows, jobs=None, device="cpu")
shared.jobs, shared.threads
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from llm_coreml.eval.workers import can_fork
from llm_coreml.machine import machine_memory
from llm_coreml.runtime.eager import EagerRunner
from llm_coreml.runtime.package_runner import PackageRunner
from llm_coreml.runtime.reference import ReferenceRunner
from llm_coreml.runtime.runner import Runner

# Logits of a window that a process holds at once: the original's, a model's, and a copy of them.
_HELD = 4


@dataclass(frozen=True)
class Share:
    """How windows are read.

    Attributes:
        jobs: Windows at a time, each in a process of its own if there are several.
        threads: Of torch, for each window. They decide the order of sums, and so follow from the
            text and the machine alone: figures are the same bits whatever `jobs` is.
    """

    jobs: int
    threads: int


def share(
    runners: Iterable[Runner],
    windows: Sequence[Sequence[int]],
    jobs: int | None = None,
    device: str = "cpu",
) -> Share:
    """Return how windows are shared out.

    Args:
        runners: Who will read them.
        windows: The text.
        jobs: How many at a time; None takes as many as cores and memory allow.
        device: Where the runners compute.
    """
    runners, threads = list(runners), torch.get_num_threads()
    if device != "cpu" or not can_fork() or not all(map(_forks, runners)):
        return Share(1, threads)
    each = max(1, threads // len(windows))
    if jobs is None:
        row = 4 * max(runner.vocab_size for runner in runners)
        held = _HELD * row * max(map(len, windows))
        jobs = max(1, min(threads // each, machine_memory() // 2 // held))
    return Share(min(jobs, len(windows)), each)


def _forks(runner: Runner) -> bool:
    """Return whether a runner works in a process that was forked: ExecuTorch has threads."""
    return isinstance(runner, (EagerRunner, PackageRunner, ReferenceRunner))
