"""The callback in trainings by `transformers.Trainer`, a real one and some with exports made up."""

from __future__ import annotations

import copy
import gc
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import llm_coreml
from caller_state import state_of
from exported import TEXT, make_model, make_tokenizer
from llm_coreml import CoreMLExportCallback
from llm_coreml.bundle.folder import open_bundle
from llm_coreml.errors import ConfigError, OutputError
from llm_coreml.eval.gates import Gates
from llm_coreml.eval.results_file import read_results
from llm_coreml.model import open_model
from llm_coreml.training import exporter
from llm_coreml.training.export_process import Bounds, ExportProcess, Order
from result_documents import document

SETTINGS = llm_coreml.ExportConfig(bits=4, context=64, seq_lengths=(1,))
# Trainer's own words about a machine without an accelerator.
pytestmark = pytest.mark.filterwarnings(
    "ignore:'pin_memory' argument is set as true:UserWarning:torch"
)


@pytest.fixture(autouse=True)
def quick_collections() -> Iterator[None]:
    """Each training begins with a collection of garbage among all that tests have loaded."""
    gc.freeze()
    yield
    gc.unfreeze()


class Tracker(TrainerCallback):  # type: ignore[misc]
    """What `report_to` brings is a callback as well: it hears what the others hear."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.heard.append((state.global_step, dict(logs)))

    def of_exports(self) -> list[dict[str, float]]:
        return [logs for _, logs in self.heard if any("coreml" in key for key in logs)]


class Does(TrainerCallback):  # type: ignore[misc]
    """Calls a function before the callbacks after it end a step."""

    def __init__(self, act: Callable[[int], None]) -> None:
        self.act = act

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.act(state.global_step)


def rows() -> list[dict[str, list[int]]]:
    ids = make_tokenizer()(TEXT).input_ids
    return [{"input_ids": ids[at : at + 24], "labels": ids[at : at + 24]} for at in range(0, 96, 8)]


def trainer(folder: Path, callbacks: list[Any], model: Any = None, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": 6,
        "logging_steps": 2,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = TrainingArguments(str(folder / "trained"), **{**settings, **options})
    return Trainer(
        make_model() if model is None else model,
        args,
        train_dataset=rows(),
        eval_dataset=rows()[:2],
        processing_class=make_tokenizer(),
        callbacks=callbacks,
    )


def test_sixty_steps_with_a_failing_export_in_the_middle(
    tmp_path: Path, text_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every export in a process of its own; the one that fails is given no memory."""
    export = CoreMLExportCallback(
        tmp_path / "exports", when=30, config=SETTINGS, text=text_file, tokens=48, blocking=True
    )
    task = export._exporter._task

    def starve(step: int) -> None:
        memory = 1 << 20 if step == 30 else task.bounds.memory
        bounds = Bounds(memory, task.bounds.seconds, nice=True)
        export._exporter._task = exporter.Task(task.config, task.text, task.tokens, bounds)

    tracker = Tracker()
    made = trainer(tmp_path, [tracker, Does(starve), export], max_steps=60, logging_steps=10)
    with caplog.at_level(logging.WARNING, "llm_coreml"):
        made.train()
    assert made.state.global_step == 60
    [told] = [each.getMessage() for each in caplog.records if "llm_coreml" in each.name]
    assert told.startswith("The export of step 30 failed, and the training goes on: ")
    assert told.endswith("memory ran out: it may allocate 1,048,576 bytes, as memory= says")
    history = made.state.log_history
    assert [each["eval_coreml_warning"] for each in history if "eval_coreml_warning" in each] == [
        told
    ]
    failed, last = tracker.of_exports()
    assert failed == {"eval_coreml_failures": 1, "eval_coreml_step": 30, "epoch": failed["epoch"]}
    assert last["eval_coreml_step"] == 60 and 1 < last["eval_coreml_perplexity"] < 1000
    assert 0 < last["eval_coreml_mean_kl"] < 0.1 and last["eval_coreml_kept"] == 1
    # The trainer's own figures are all there, at the steps of the exports, too.
    assert [step for step, logs in tracker.heard if "loss" in logs] == [10, 20, 30, 40, 50, 60]
    best = open_bundle(export.best)
    assert best.manifest.source.name == "LlamaForCausalLM-step-60"
    assert best.manifest.source.sha256 == open_model(made.model).sha256()
    results = read_results(tmp_path / "exports")
    assert {each["subject"]["name"] for each in results} == {"step-60"}
    assert sorted(each.name for each in (tmp_path / "exports").iterdir()) == [
        "best",
        "results.jsonl",
    ]


# Exports that are made up


class MadeUp:
    """Stands for the other process: it ends when it is told to, with these figures."""

    figures: dict[int, tuple[float, float] | str]
    ended_by_itself = True
    orders: list[Order]
    bundle: Path

    def __init__(self, order: Order, scratch: Path, bounds: Bounds) -> None:
        self.orders.append(order)
        self.order = order
        self.step = int(order.output.name.removeprefix("step-"))
        self.killed = False

    @property
    def ended(self) -> bool:
        return self.ended_by_itself

    def wait(self) -> None:
        pass

    def kill(self) -> None:
        self.killed = True

    def failure(self) -> str | None:
        found = self.figures.get(self.step, (2.0, 0.1))
        if isinstance(found, str):
            return found
        shutil.copytree(self.bundle, self.order.output)
        written = document(f"step-{self.step}", nll=(found[0],) * 4, kl=(found[1],) * 4)
        (self.order.output / "results.json").write_text(json.dumps(written))
        return None


@pytest.fixture
def made_up(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> type[MadeUp]:
    class Fresh(MadeUp):
        figures = {}
        orders = []

    Fresh.bundle = bundle
    monkeypatch.setattr(exporter, "ExportProcess", Fresh)
    return Fresh


def kept(export: CoreMLExportCallback) -> int | None:
    results = export.best / "results.json"
    if not results.is_file():
        return None
    name: str = json.loads(results.read_text())["subject"]["name"]
    return int(name.removeprefix("step-"))


@pytest.mark.parametrize(
    ("options", "best", "warnings"),
    [
        ({}, 4, 0),
        ({"best_by": "mean_kl"}, 2, 0),
        ({"best_by": "gate", "gates": Gates(max_kl=0.25)}, 6, 1),
        ({"gates": Gates(max_kl=0.15)}, 2, 2),
        ({"gates": Gates(max_kl=0.01)}, None, 3),
    ],
)
def test_the_best_is_kept(
    options: dict[str, Any],
    best: int | None,
    warnings: int,
    made_up: type[MadeUp],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made_up.figures = {2: (2.0, 0.1), 4: (1.0, 0.3), 6: (3.0, 0.2)}
    export = CoreMLExportCallback(tmp_path / "exports", when=2, blocking=True, **options)
    tracker = Tracker()
    trainer(tmp_path, [tracker, export]).train()
    assert kept(export) == best
    assert len(read_results(tmp_path / "exports" / "results.jsonl")) == 3
    told = [each.getMessage() for each in caplog.records if "is not kept" in each.getMessage()]
    assert len(told) == warnings
    assert all("mean KL is" in each and "--max-kl asks for" in each for each in told)
    assert [each["eval_coreml_mean_kl"] for each in tracker.of_exports()] == [0.1, 0.3, 0.2]
    assert [step for step, logs in tracker.heard if "loss" in logs] == [2, 4, 6]


@pytest.mark.parametrize(
    ("when", "options", "steps"),
    [
        ((1, 5), {}, [1, 5]),
        ("evaluate", {"eval_strategy": "steps", "eval_steps": 3}, [3, 6]),
        ("save", {"save_strategy": "steps", "save_steps": 4}, [4, 6]),
        ("end", {}, [6]),
        (
            "best",
            {
                "eval_strategy": "steps",
                "eval_steps": 2,
                "save_strategy": "steps",
                "save_steps": 2,
                "metric_for_best_model": "loss",
                "load_best_model_at_end": True,
            },
            [2, 4, 6],
        ),
    ],
)
def test_moments(
    when: Any, options: dict[str, Any], steps: list[int], made_up: type[MadeUp], tmp_path: Path
) -> None:
    export = CoreMLExportCallback(tmp_path / "exports", when=when, blocking=True)
    made = trainer(tmp_path, [export], **options)
    hashes: dict[int, str] = {}
    made.add_callback(Does(lambda step: hashes.update({step: open_model(made.model).sha256()})))
    seen: list[str] = []
    begin = made_up.__init__

    def look(self: Any, order: Order, scratch: Path, bounds: Bounds) -> None:
        seen.append(open_model(order.model).sha256())
        begin(self, order, scratch, bounds)

    made_up.__init__ = look  # type: ignore[method-assign]
    made.train()
    assert [order.output.name for order in made_up.orders] == [f"step-{step}" for step in steps]
    assert seen == [hashes[step] for step in steps]


def test_one_runs_one_waits_and_the_training_goes_on(
    made_up: type[MadeUp], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made_up.ended_by_itself = False
    export = CoreMLExportCallback(tmp_path / "exports", when=1)
    trainer(tmp_path, [export], max_steps=4).train()
    assert [order.output.name for order in made_up.orders] == ["step-1", "step-4"]
    told = " ".join(each.getMessage() for each in caplog.records)
    assert "The export of step 2 is left out: another one ran until step 3" in told
    assert "The export of step 3 is left out: another one ran until step 4" in told
    assert sorted(os.listdir(tmp_path / "exports")) == ["best", "results.jsonl"]


@pytest.mark.parametrize(("when", "taken"), [("save", True), (2, False)])
def test_a_checkpoint_of_an_earlier_training_is_not_taken(
    when: Any,
    taken: bool,
    made_up: type[MadeUp],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = tmp_path / "trained" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    seen, hand_over = [], exporter.hand_over

    def look(*arguments: Any) -> Path:
        seen.append(arguments[-1])
        return hand_over(*arguments)

    monkeypatch.setattr(exporter, "hand_over", look)
    export = CoreMLExportCallback(tmp_path / "exports", when=when)
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, [export], max_steps=2, **saving).train()
    assert seen == [checkpoint if taken else None]


class Broken(TrainerCallback):  # type: ignore[misc]
    """A tracker that fails when it is told of an export."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "eval_coreml_step" in logs:
            raise ConnectionError("nobody is there")


def test_a_tracker_that_fails_holds_up_no_export(
    made_up: type[MadeUp], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made_up.ended_by_itself, made_up.figures = False, {1: (2.0, 0.1), 2: (1.0, 0.1)}
    export = CoreMLExportCallback(tmp_path / "exports", when=(1, 2))

    def end(step: int) -> None:
        made_up.ended_by_itself = step >= 3

    trainer(tmp_path, [Does(end), export, Broken()], max_steps=5).train()
    assert [order.output.name for order in made_up.orders] == ["step-1", "step-2"]
    told = [each.getMessage() for each in caplog.records if "llm_coreml" in each.name]
    assert told == ["ConnectionError: nobody is there"] * 2
    assert kept(export) == 2
    assert sorted(os.listdir(tmp_path / "exports")) == ["best", "results.jsonl"]


def test_an_interrupted_training_leaves_nothing(made_up: type[MadeUp], tmp_path: Path) -> None:
    made_up.ended_by_itself = False
    export = CoreMLExportCallback(tmp_path / "exports", when=1)

    def interrupt(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, [export, Does(interrupt)]).train()
    running = export._exporter._running
    assert running is not None and isinstance(running.process, MadeUp)
    export._exporter.abandon()  # as the interpreter does at its end
    assert running.process.killed and os.listdir(tmp_path / "exports") == []


def test_figures_are_metrics_of_an_evaluation_that_waits(
    made_up: type[MadeUp], tmp_path: Path
) -> None:
    """So that a trainer can choose its best by the file; a failure is never the best."""
    made_up.figures = {2: (2.0, 0.3), 4: "nothing came of it", 6: (3.0, 0.2)}
    export = CoreMLExportCallback(tmp_path / "exports", blocking=True)
    made = trainer(
        tmp_path,
        [export],
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="best",
        metric_for_best_model="eval_coreml_mean_kl",
        greater_is_better=False,
    )
    made.train()
    assert (made.state.best_metric, made.state.best_global_step) == (pytest.approx(0.2), 6)
    metrics = made.evaluate()  # after the training nothing is exported
    assert len(made_up.orders) == 3 and not any("coreml" in key for key in metrics)


def test_a_resumed_training_has_its_best_to_beat(made_up: type[MadeUp], tmp_path: Path) -> None:
    made_up.figures = {2: (1.0, 0.1), 4: (2.0, 0.1), 6: (0.5, 0.1)}
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, [CoreMLExportCallback(tmp_path / "exports", when=2)], max_steps=2,
            **saving).train()  # fmt: skip
    export = CoreMLExportCallback(tmp_path / "exports", when=2, blocking=True)
    tracker = Tracker()
    made = trainer(tmp_path, [tracker, export], **saving)
    made.train(resume_from_checkpoint=str(tmp_path / "trained" / "checkpoint-2"))
    assert [each["eval_coreml_kept"] for each in tracker.of_exports()] == [0, 1]
    # One that begins anew has nothing to beat.
    again = CoreMLExportCallback(tmp_path / "exports", when=2)
    trainer(tmp_path, [again], max_steps=2).train()
    assert kept(again) == 2


class NoProcess(MadeUp):
    def __init__(self, order: Order, scratch: Path, bounds: Bounds) -> None:
        raise OSError("no more processes")


def poisoned(made: Any) -> None:
    made.model.config.quantization_config = {"quant_method": "gptq"}


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda patch, made: patch.setattr(exporter, "ExportProcess", NoProcess), "no process"),
        (lambda patch, made: poisoned(made), "of quantized weights only files are read"),
        (
            lambda patch, made: patch.setattr(
                "llm_coreml.training.handover.shutil.disk_usage",
                lambda _: SimpleNamespace(free=5),
            ),
            "The weights take .* bytes, and .* has 5 free",
        ),
        (
            lambda patch, made: patch.setattr(exporter, "hand_over", lambda *_: 1 / 0),
            "ZeroDivisionError: division by zero",
        ),
    ],
)
def test_what_fails_here_is_a_warning(
    spoil: Callable[[pytest.MonkeyPatch, Trainer], None],
    told: str,
    made_up: type[MadeUp],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    export = CoreMLExportCallback(tmp_path / "exports", when=(2,))
    made = trainer(tmp_path, [export], max_steps=3)
    spoil(monkeypatch, made)
    made.train()
    assert made.state.global_step == 3
    [record] = [each for each in caplog.records if each.name.startswith("llm_coreml")]
    assert re.search(told, record.getMessage()), record.getMessage()
    assert os.listdir(tmp_path / "exports") == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"when": "evalute"}, "Did you mean 'evaluate'"),
        ({"when": 0}, "when is 0"),
        ({"when": ()}, "when names no step"),
        ({"best_by": "loss"}, "best_by is 'loss'"),
        ({"best_by": "gate"}, "no gate asks for anything"),
        ({"timeout": 0}, "timeout is 0"),
        ({"timeout": math.inf}, "timeout is inf"),
        ({"tokens": 0}, "tokens is 0"),
        ({"memory": 5}, "memory is 5"),
        ({"bits": 17}, "17"),
        ({"tokenizer": 3}, "tokenizer is a int"),
    ],
)
def test_what_cannot_be_is_told_before_the_training(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        CoreMLExportCallback("exports", **options)
    with pytest.raises(OutputError, match="NUL"):
        CoreMLExportCallback("ex\0ports")


@pytest.mark.parametrize("when", ["evaluate", "save", "best"])
def test_moments_that_never_come_are_told(
    when: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer(tmp_path, [CoreMLExportCallback(tmp_path / "exports", when=when)], max_steps=1).train()
    assert "Nothing will be exported during the training, for the trainer" in caplog.text
    assert not (tmp_path / "exports").exists()


def test_other_processes_of_a_distributed_run_do_nothing(
    made_up: type[MadeUp], tmp_path: Path
) -> None:
    export = CoreMLExportCallback(tmp_path / "exports", when=1)
    made = trainer(tmp_path, [export], max_steps=1)
    state = copy.copy(made.state)
    state.is_world_process_zero, state.global_step = False, 1
    for event in ("on_train_begin", "on_step_end", "on_train_end"):
        getattr(export, event)(made.args, state, made.control, model=made.model)
    assert not made_up.orders and not (tmp_path / "exports").exists()


def test_the_caller_is_as_before(made_up: type[MadeUp], tmp_path: Path) -> None:
    export = CoreMLExportCallback(tmp_path / "exports", when=1, blocking=True)
    made = trainer(tmp_path, [export], max_steps=1)
    made.train()
    # Once more without the training around it, which changes much.
    made.state.global_step = 2
    export.on_train_begin(made.args, made.state, made.control)
    model = made.model.train()
    before = state_of(model)
    given = {"model": model, "processing_class": made.processing_class}
    export.on_step_end(made.args, made.state, made.control, **given)
    after = state_of(model)
    for key, value in before.items():
        assert after[key] == value, key
    assert [order.output.name for order in made_up.orders] == ["step-1", "step-2"]


# The other process


def started(tmp_path: Path, model: Path, **bounds: Any) -> ExportProcess:
    order = Order(model, tmp_path / "out", SETTINGS, None, 16)
    return ExportProcess(order, tmp_path, Bounds(**{"memory": 1 << 34, "seconds": 600, **bounds}))


def test_time_is_bounded_and_the_process_can_be_ended(tmp_path: Path) -> None:
    late = started(tmp_path, tmp_path, seconds=1, nice=False)
    late.wait()
    assert late.ended and late.failure() == "it was not done after 1 s, which timeout= allows"
    running = started(tmp_path, tmp_path, nice=True)
    assert not running.ended
    running.kill()
    assert running.ended and "was ended by signal 9" in (running.failure() or "")
    assert torch.get_num_threads() == 1
