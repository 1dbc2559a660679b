"""Exports at chosen moments of a training by `transformers.Trainer`, or by TRL's trainers.

    export = CoreMLExportCallback("exports", when="best", text="heldout.txt")
    trainer = SFTTrainer(model, args=args, train_dataset=data, callbacks=[export])

Each moment's weights are exported and measured by a process of its own; `exports/best` is the best
bundle so far, `exports/results.jsonl` has all figures, and the trainer's trackers get them. What
goes wrong is a warning in the log: the training goes on.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import ProcessorMixin, Trainer, TrainerCallback

from llm_coreml.checkpoint.live_tokenizer import check_live_tokenizer
from llm_coreml.config import ExportConfig
from llm_coreml.config.values import checked_count
from llm_coreml.errors import ConfigError, LlmCoreMLError
from llm_coreml.eval.evaluate import DEFAULT_TOKENS
from llm_coreml.eval.gates import Gates
from llm_coreml.machine import machine_memory
from llm_coreml.output import check_name
from llm_coreml.printable import MESSAGE, printable
from llm_coreml.training.best import Best, checked_rank
from llm_coreml.training.export_process import Bounds
from llm_coreml.training.exporter import Exporter, Finished, Moment, Task
from llm_coreml.training.moments import moments_of
from llm_coreml.training.trainer_log import log_figures, trainer_of

# Trackers show it as `eval/coreml_...`.
PREFIX = "eval_coreml_"
_LOG = logging.getLogger(__name__)
# An export that says nothing else, as `save_pretrained_coreml` makes it.
_USUAL = ExportConfig(bits=4, target="ane")

Event = Callable[..., None]


def _survived(event: Event) -> Event:
    """Make a warning of whatever an event raises; only the main process has events."""

    @functools.wraps(event)
    def guarded(
        self: CoreMLExportCallback, args: Any, state: Any, control: Any, **given: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        try:
            event(self, args, state, **given)
        except LlmCoreMLError as error:
            self.warn(state, str(error))
        # A training may have run for days: nothing that is wrong here is worth its end.
        except Exception as error:
            first = next(iter(str(error).splitlines()), "")
            self.warn(state, printable(f"{type(error).__name__}: {first}", MESSAGE))

    return guarded


class CoreMLExportCallback(TrainerCallback):  # type: ignore[misc]
    """Exports and measures a model while it is trained, and keeps the best bundle.

    In its folder there is `best`, a bundle, and the figures of all as lines of JSON.

    Args:
        output: Folder, made when it is needed.
        when: `evaluate`, after every evaluation; `save`, of every checkpoint; `best`, whenever
            the trainer has a new best; `end`; a number of steps between two exports; or steps.
        tokenizer: As `export` takes it; None takes the trainer's.
        bits: Bits per weight, 4 if neither `config` nor this says other.
        target: Compute unit, the Neural Engine if nothing else is said.
        config: All other settings.
        text: UTF-8 file to measure on; None takes the held-out text that ships in the package.
        tokens: Most tokens to score.
        best_by: `perplexity` or `mean_kl` from the model of that step, the least; `gate`, the
            newest that holds the gates.
        gates: What is not held is not kept.
        blocking: Let the training wait for each export. Otherwise one runs beside it, one
            waits, and a third takes the place of the one that waits.
        memory: Bytes that the process of an export may allocate; None is half of the machine's.
        timeout: Seconds that it may take.

    Raises:
        ConfigError: a value that cannot be; all else is told in the midst of the training.
        OutputError: no folder can have this name.
    """

    def __init__(
        self,
        output: str | Path,
        *,
        when: str | int | Sequence[int] = "evaluate",
        tokenizer: Any = None,
        bits: float | None = None,
        target: str | None = None,
        config: ExportConfig | None = None,
        text: str | Path | None = None,
        tokens: int = DEFAULT_TOKENS,
        best_by: str = "perplexity",
        gates: Gates | None = None,
        blocking: bool = False,
        memory: int | None = None,
        timeout: float = 3600.0,
    ) -> None:
        """Take the arguments; what is wrong with them is told now."""
        super().__init__()
        check_name(Path(output))
        if tokenizer is not None:
            check_live_tokenizer(tokenizer)
        if not (isinstance(timeout, (int, float)) and 1 <= timeout < math.inf):
            raise ConfigError(f"timeout is {timeout!r}; give seconds, 1 or more.")
        given = {"bits": bits, "target": target}
        changes = {name: value for name, value in given.items() if value is not None}
        most = machine_memory()
        self._moments, self._tokenizer, self._blocking = moments_of(when), tokenizer, blocking
        self._best = Best(Path(output), checked_rank(best_by, gates or Gates()), gates or Gates())
        task = Task(
            config=(config or _USUAL).under(changes),
            text=None if text is None else str(Path(text).absolute()),
            tokens=checked_count("tokens", tokens),
            bounds=Bounds(
                checked_count("memory", most // 2 if memory is None else memory, 1 << 20, most),
                timeout,
                nice=not blocking,
            ),
        )
        self._exporter = Exporter(Path(output), task, self._best)
        self._in_training, self._failures = False, 0
        self._last_step, self._best_step, self._saved_step = -1, -1, -1
        self._trainer: Trainer | None = None

    @property
    def best(self) -> Path:
        """Folder of the best bundle, which is there once one was kept."""
        return self._best.folder

    @_survived
    def on_train_begin(self, args: Any, state: Any, **_: Any) -> None:
        """Begin, or go on where a training was that is resumed."""
        self._exporter.abandon()
        self._in_training, self._failures = True, 0
        self._last_step, self._saved_step = -1, -1
        self._best_step, self._trainer = state.best_global_step or -1, None
        never = self._moments.never(args)
        if never is not None:
            self.warn(state, f"Nothing will be exported during the training, for {never}.")
        if state.global_step:
            self._best.resume()

    @_survived
    def on_step_begin(self, args: Any, state: Any, **given: Any) -> None:
        """Export a new best, whose weights the step has not changed yet."""
        if self._moments.event == "best":
            self._export_best(args, state, given)

    @_survived
    def on_step_end(self, args: Any, state: Any, **given: Any) -> None:
        """Tell of what has ended, and export at chosen steps."""
        self._collect(state, wait=False)
        if self._moments.due_at_step(state.global_step):
            self._export(args, state, given)

    @_survived
    def on_evaluate(self, args: Any, state: Any, **given: Any) -> None:
        """Export after an evaluation; where it is waited for, the figures join its metrics."""
        if self._moments.event != "evaluate" or not self._in_training:
            return
        found = self._export(args, state, given)
        if self._blocking and args.world_size == 1 and given.get("metrics") is not None:
            given["metrics"].update(found)
            wanted = str(args.metric_for_best_model)
            wanted = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
            if wanted.startswith(PREFIX):
                # Which is never the best, where a metric that is not there ends the training.
                given["metrics"].setdefault(wanted, math.nan)

    @_survived
    def on_save(self, args: Any, state: Any, **given: Any) -> None:
        """Export what the trainer saves."""
        self._saved_step = state.global_step
        if self._moments.event == "save":
            self._export(args, state, given)

    @_survived
    def on_log(self, args: Any, state: Any, **given: Any) -> None:
        """Wait for what runs when the last figures come: some trackers end before callbacks do."""
        if not self._in_training or "train_runtime" not in (given.get("logs") or {}):
            return
        if self._moments.event == "best":
            self._export_best(args, state, given)
        # The best may be loaded after this, and is what is exported then.
        if self._moments.event == "end" and not args.load_best_model_at_end:
            self._export(args, state, given)
        self._collect(state, wait=True)

    @_survived
    def on_train_end(self, args: Any, state: Any, **given: Any) -> None:
        """Export at the end, and wait for all that runs."""
        if self._moments.event == "end":
            self._export(args, state, given)
        self._collect(state, wait=True)
        self._in_training, self._trainer = False, None

    def _export_best(self, args: Any, state: Any, given: dict[str, Any]) -> None:
        step = state.best_global_step
        if step and step not in (self._best_step, 0) and step == state.global_step:
            self._best_step = step
            self._export(args, state, given)

    def _export(self, args: Any, state: Any, given: dict[str, Any]) -> dict[str, float]:
        """Export the weights of this step; return the figures if they were waited for."""
        if not self._in_training or state.global_step == self._last_step:
            return {}
        self._last_step = state.global_step
        tokenizer = given.get("processing_class") if self._tokenizer is None else self._tokenizer
        if isinstance(tokenizer, ProcessorMixin):
            tokenizer = tokenizer.tokenizer
        saved = Path(args.output_dir, f"checkpoint-{state.global_step}")
        # One that is not saved yet may be there all the same, of an earlier training.
        ours = saved if self._saved_step == state.global_step else None
        moment = Moment(state.global_step, given["model"], tokenizer, ours)
        try:
            left_out = self._exporter.submit(moment)
        except LlmCoreMLError as error:
            self._tell(state, Finished(state.global_step, 0.0, None, str(error)))
            return {}
        if left_out is not None:
            self.warn(
                state,
                f"The export of step {left_out} is left out: another one ran until step "
                f"{moment.step} was to be exported. Export less often, or with blocking=True.",
            )
        return self._collect(state, wait=True) if self._blocking else {}

    def _collect(self, state: Any, wait: bool) -> dict[str, float]:
        found: dict[str, float] = {}
        for each in self._exporter.collect(wait):
            found = self._tell(state, each)
        return found

    def _tell(self, state: Any, finished: Finished) -> dict[str, float]:
        """Tell trackers and log of an export that has ended, and return what trackers are told."""
        name, offered = f"The export of step {finished.step}", finished.offered
        if offered is None:
            self._failures += 1
            self.warn(state, f"{name} failed, and the training goes on: {finished.failure}")
            figures = {"failures": float(self._failures)}
        else:
            if offered.failed:
                self.warn(state, f"{name} is not kept: {offered.failed}.")
            figures = {**offered.figures, "kept": float(offered.kept), "seconds": finished.seconds}
        told = {f"{PREFIX}{key}": value for key, value in figures.items()}
        told[f"{PREFIX}step"] = float(finished.step)
        self._trainer = self._trainer or trainer_of(self)
        if self._trainer is None:  # another loop calls this
            state.log_history.append({**told, "step": state.global_step})
        else:
            log_figures(self._trainer, told)
        return told

    def warn(self, state: Any, sentence: str) -> None:
        """Write a sentence into the process's log and the trainer's history."""
        _LOG.warning("%s", sentence)
        # Trackers take numbers alone.
        state.log_history.append({f"{PREFIX}warning": sentence, "step": state.global_step})
