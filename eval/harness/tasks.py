"""Run lm-eval's tasks on a bundle: its evaluator, its schema of results, its layout of files.

results = run_tasks(Path("out"), TaskSettings(tasks=("wikitext", "arc_easy"), limit=100))
results["results"]["arc_easy"]["acc,none"]
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_coreml.config.values import checked_count
from llm_coreml.errors import ConfigError, LlmCoreMLError, nearest
from llm_coreml.eval.harness.saved import check_place, save
from llm_coreml.eval.harness.subject import open_subject
from llm_coreml.progress import Progress, Silent
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.reference import DECLARED

INSTALL = "pip install 'llm-coreml[lm-eval]'"


@dataclass(frozen=True)
class TaskSettings:
    """Which tasks to run, and how.

    Attributes:
        tasks: Names of tasks, groups and tags; `*` stands for any letters.
        include: Folder with further tasks as YAML files, which may name functions to run.
        few_shots: Examples before each question; None is what the tasks say.
        limit: Most documents of each task, below 1 a share of them; None takes all.
        chat: Put questions into the model's chat template.
        system: The system message; None without one.
        generation: Settings of generation that replace the tasks' own.
        cache: Where answers are kept, to go on after an interruption; None keeps none.
        max_length: Most tokens to read at once; None is the program's context.

    Raises:
        ConfigError: a value out of range.
    """

    tasks: tuple[str, ...]
    include: Path | None = None
    few_shots: int | None = None
    limit: float | None = None
    chat: bool = False
    system: str | None = None
    generation: str | None = None
    cache: Path | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        """Check every value."""
        if not self.tasks or not all(name.strip() for name in self.tasks):
            raise ConfigError("--tasks names no task; give some, such as wikitext,arc_easy.")
        if self.few_shots is not None and not 0 <= self.few_shots <= 1000:
            raise ConfigError(f"--num-fewshot is {self.few_shots}; give 0 to 1000.")
        if self.max_length is not None:
            checked_count("--max-length", self.max_length)
        limit = self.limit
        if limit is not None and not (math.isfinite(limit) and limit > 0):
            raise ConfigError(
                f"--limit is {limit}; give a number of documents, or a share below 1."
            )
        if limit is not None and limit > 1 and limit != int(limit):
            raise ConfigError(f"--limit is {limit}; above 1 it is a whole number of documents.")
        if self.include is not None and not self.include.is_dir():
            raise ConfigError(f"--include-path '{self.include}' is no folder; give one with YAML.")


def run_tasks(
    model: Path,
    settings: TaskSettings,
    *,
    output: Path | None = None,
    samples: bool = False,
    execution: Execution = DECLARED,
    checked: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run tasks on the program of a bundle, or on a model.

    Args:
        model: Folder that an export wrote; or a model's folder or hub id.
        settings: Which tasks, and how.
        output: Folder for `MODEL/results_DATE.json`, as lm-eval lays it out; None writes nothing.
        samples: Write what was asked and answered beside it, a file for each task.
        execution: Numerics, device and memory of the reference runtime.
        checked: Refuse files that have changed since the export wrote them.
        progress: Told of stages and shares.

    Returns:
        lm-eval's results, without the samples.

    Raises:
        ArtifactError: the bundle is damaged, or lacks what the tasks need.
        ConfigError: lm-eval is not installed, a task is not known or its data not at hand.
        OutputError: the results cannot be written.
    """
    progress = progress or Silent()
    if output is not None:
        check_place(output)
    _check_installed()
    from llm_coreml.eval.harness.adapter import SubjectModel

    progress.stage("open")
    subject = open_subject(model, execution, checked, progress.note)
    language_model = SubjectModel(
        subject, max_length=settings.max_length, on_progress=progress.advance
    )
    if settings.chat and subject.template is None:
        language_model.apply_chat_template([])
    progress.stage("tasks")
    manager, names = _manager(settings)
    progress.stage("score")
    arguments = {"pretrained": str(model), "mode": execution.mode, "device": execution.device}
    results = _evaluate(language_model, manager, names, arguments, settings)
    kept = results.pop("samples")
    if output is not None:
        save(output, results, kept if samples else {})
    return results


def _check_installed() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"lm-eval, which brings the tasks, is not installed ({error}); get it by {INSTALL}."
        ) from None


def _manager(settings: TaskSettings) -> tuple[Any, list[str]]:
    """Return what knows the tasks, and the names of those that are asked for."""
    manager = None
    if settings.include is not None:
        manager = _made(settings.include, defaults=False)
        if not all(manager.match_tasks([name]) for name in settings.tasks):
            manager = None  # some are lm-eval's own, of which there are many to list
    manager = manager or _made(settings.include, defaults=True)
    for name in settings.tasks:
        if not manager.match_tasks([name]):
            raise ConfigError(
                f"--tasks names '{name}', which lm-eval does not know."
                f"{nearest(name, manager.all_tasks)} Its `lm-eval ls tasks` lists all; "
                "--include-path adds a folder of your own."
            )
    return manager, manager.match_tasks(list(settings.tasks))


def _made(include: Path | None, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    class Tasks(TaskManager):  # type: ignore[misc]
        """lm-eval's tasks; what goes wrong with their files and data is told in a sentence."""

        def load(self, task_list: Any) -> Any:
            try:
                return super().load(task_list)
            except Exception as error:
                raise _unloadable(task_list, error) from None

    try:
        return Tasks(
            include_path=None if include is None else str(include), include_defaults=defaults
        )
    except Exception as error:
        raise ConfigError(
            f"The tasks in '{include}' cannot be listed: {_words(error)}. Mend the YAML."
        ) from None


def _unloadable(names: Any, error: Exception) -> ConfigError:
    """Return what to say of tasks whose definition or data cannot be loaded."""
    listed = ", ".join(map(str, names))
    return ConfigError(
        f"The data of {listed} cannot be loaded: {_words(error)}. Without a network only what the "
        "hub's cache or local files hold is at hand: load it once with one, or give tasks on local "
        "files with --include-path."
    )


def _words(error: Exception) -> str:
    return f"{str(error) or type(error).__name__}".rstrip(".")


def _evaluate(
    model: Any, manager: Any, names: list[str], arguments: dict[str, Any], settings: TaskSettings
) -> dict[str, Any]:
    """Have lm-eval evaluate, and add what it adds when it saves results."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.utils import hash_string

    from llm_coreml.eval.harness.adapter import MODEL

    tracker = EvaluationTracker()
    limit = settings.limit
    try:
        results: dict[str, Any] = simple_evaluate(
            model=model,
            model_args=arguments,
            tasks=names,
            num_fewshot=settings.few_shots,
            batch_size=1,
            device=arguments["device"],
            use_cache=None if settings.cache is None else str(settings.cache),
            limit=limit if limit is None or limit < 1 else int(limit),
            evaluation_tracker=tracker,
            system_instruction=settings.system,
            apply_chat_template=settings.chat,
            gen_kwargs=settings.generation,
            task_manager=manager,
        )
    except (LlmCoreMLError, MemoryError):
        raise
    except (KeyError, LookupError, SyntaxError, TypeError, ValueError, OSError) as error:
        raise ConfigError(
            f"lm-eval cannot run {', '.join(names)} as asked: {type(error).__name__}: "
            f"{_words(error)}. Run again with -v to see where."
        ) from error
    tracker.general_config_tracker.log_end_time()
    results |= asdict(tracker.general_config_tracker)
    results["model_source"] = results["config"]["model"] = MODEL
    results["task_hashes"] = {
        name: hash_string(
            "".join(each["doc_hash"] + each["prompt_hash"] + each["target_hash"] for each in kept)
        )
        for name, kept in results["samples"].items()
    }
    return results
