"""lm-eval's tasks on a bundle, offline: results equal to its own model's, files, refusals."""

from __future__ import annotations

import builtins
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from exported import TEXT, Run, files_of, in_process
from llm_coreml.errors import ArtifactError, ConfigError, OutputError
from llm_coreml.eval.harness.tasks import TaskSettings, run_tasks
from llm_coreml.reference.program.execution import Execution

CHOICES = [
    {"question": "What is read more often?", "choices": ["a program", "a tool"], "answer": 0},
    {"question": "What is measured?", "choices": ["the thing", "the reader", "it"], "answer": 0},
    {"question": "Who jumps?", "choices": ["the fox", "the dog"], "answer": 1},
]
TASKS = {
    "choices": """
task: local_choices
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choices.json}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
num_fewshot: 0
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 1.0}
""",
    "pages": """
task: local_pages
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/pages.json}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: page
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
metadata: {version: 1.0}
""",
    "answers": """
task: local_answers
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choices.json}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
metadata: {version: 1.0}
""",
    "group": """
group: local_all
task: [local_choices, local_pages]
""",
    "odd": """
task: local_odd
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/pages.json}}
test_split: test
output_type: guess
""",
    "gone": """
task: local_gone
dataset_path: nobody/has-this-data
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: page
""",
}
NAMES = ("local_choices", "local_pages", "local_answers")


@pytest.fixture(scope="module")
def include(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder of tasks on local files, and no network."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    pages = [{"page": TEXT}, {"page": TEXT[:90]}]
    for name, documents in (("choices", CHOICES), ("pages", pages)):
        lines = "".join(json.dumps(each) + "\n" for each in documents)
        (folder / f"{name}.json").write_text(lines)
    import datasets
    import huggingface_hub.constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield folder


@pytest.fixture(scope="module")
def found(bundle: Path, include: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The results of all three tasks, and the folder that they were written to."""
    output = tmp_path_factory.mktemp("results")
    settings = TaskSettings(NAMES, include=include)
    return run_tasks(bundle, settings, output=output, samples=True), output


def test_results_are_those_of_lm_evals_own_model(include: Path, checkpoint: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llm_coreml.eval.harness.adapter import SubjectModel
    from llm_coreml.eval.harness.subject import open_subject

    theirs = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(checkpoint),
        max_length=64,
        device="cpu",
    )
    ours = SubjectModel(open_subject(checkpoint))
    assert (ours.subject.names.bos_token_id, ours.subject.stop) == (0, (1,))
    with pytest.raises(ConfigError, match="leave mode and device out"):
        open_subject(checkpoint, Execution(mode="fp32"))
    both = [
        lm_eval.simple_evaluate(
            model,
            tasks=list(NAMES),
            bootstrap_iters=100,
            task_manager=TaskManager(include_path=str(include), include_defaults=False),
        )
        for model in (ours, theirs)
    ]
    for task in NAMES:
        mine, other = (each["results"][task] for each in both)
        assert mine.keys() == other.keys()
        for key, value in other.items():
            number = isinstance(value, float)
            assert mine[key] == (pytest.approx(value, rel=1e-5) if number else value), key
    assert both[0].keys() == both[1].keys()
    hashes = [[each["prompt_hash"] for each in one["samples"]["local_choices"]] for one in both]
    assert hashes[0] == hashes[1]


def test_files_are_laid_out_as_lm_evals(found: Any, bundle: Path) -> None:
    results, output = found
    (folder,) = output.iterdir()
    assert folder.name == results["model_name_sanitized"] == str(bundle).replace("/", "__")
    files = sorted(path.name for path in folder.iterdir())
    assert [name.split("_2")[0] for name in files] == [
        "results",
        "samples_local_answers",
        "samples_local_choices",
        "samples_local_pages",
    ]
    saved = json.loads((folder / files[0]).read_text())
    assert saved["results"] == results["results"]
    from lm_eval.result_schema import EvalResults

    known = set(EvalResults.__annotations__)
    # What tells one run of a task from another is there, and nothing that lm-eval does not have.
    assert saved.keys() <= known
    told = {"results", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config"}
    assert told | {"date", "git_hash", "lm_eval_version", "task_hashes", "model_name"} <= set(saved)
    assert saved["config"]["model"] == saved["model_source"] == "llm-coreml"
    assert saved["config"]["model_args"]["pretrained"] == str(bundle)
    assert saved["tokenizer_bos_token"] == ["<s>", "0"] and saved["max_length"] == 64
    assert all(len(each) == 64 for each in saved["task_hashes"].values())
    lines = (folder / files[2]).read_text().splitlines()
    assert [json.loads(each)["doc"]["question"] for each in lines] == [
        each["question"] for each in CHOICES
    ]


def test_groups_limits_shots_and_the_cache(bundle: Path, include: Path, tmp_path: Path) -> None:
    settings = TaskSettings(
        ("local_all",), include=include, limit=1, few_shots=0, cache=tmp_path / "answers"
    )
    first = run_tasks(bundle, settings)
    assert first["n-samples"]["local_choices"] == {"original": 3, "effective": 1}
    assert set(first["results"]) >= {"local_choices", "local_pages"}
    assert [path.name for path in tmp_path.iterdir()] == ["answers_rank0.db"]
    assert run_tasks(bundle, settings)["results"] == first["results"]


def test_what_cannot_be_run_is_told_in_a_sentence(bundle: Path, include: Path) -> None:
    def refused(kind: type[Exception], words: str, **changes: Any) -> None:
        settings: dict[str, Any] = {"tasks": NAMES, "include": include, **changes}
        with pytest.raises(kind, match=words):
            run_tasks(bundle, TaskSettings(**settings))

    refused(ConfigError, "The data of local_gone cannot be loaded", tasks=("local_gone",))
    refused(ArtifactError, "no chat template", chat=True)
    refused(ConfigError, "no room", generation="max_gen_toks=64", tasks=("local_answers",))
    refused(ConfigError, "max_length", max_length=65)
    refused(ConfigError, "local_odd", tasks=("local_odd",))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": ()}, "no task"),
        ({"tasks": ("a", " ")}, "no task"),
        ({"few_shots": -1}, "--num-fewshot"),
        ({"limit": 0.0}, "--limit"),
        ({"limit": 1.5}, "whole number"),
        ({"limit": float("nan")}, "--limit"),
        ({"max_length": 0}, "--max-length"),
        ({"include": Path("gone")}, "no folder"),
    ],
)
def test_absurd_settings_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TaskSettings(**{"tasks": NAMES, **changes})


def test_a_place_for_results_is_looked_at_first(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OutputError, match="no folder"):
        run_tasks(bundle, TaskSettings(("local",)), output=file)
    locked = tmp_path / "locked"
    locked.mkdir()
    with pytest.MonkeyPatch.context() as patch:  # root may write anywhere
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(OutputError, match="cannot be written to"):
            run_tasks(bundle, TaskSettings(("local",)), output=locked / "results")


def test_results_that_cannot_be_written_are_told_of(found: Any, tmp_path: Path) -> None:
    from llm_coreml.eval.harness.saved import save

    results, _ = found
    (tmp_path / results["model_name_sanitized"]).write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        save(tmp_path, results, {})


def test_without_lm_eval_a_sentence_says_how_to_get_it(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "lm_eval":
            raise ImportError("No module named 'lm_eval'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'llm-coreml\[lm-eval\]'"):
        run_tasks(bundle, TaskSettings(("wikitext",)))


def command_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str | Path
) -> Run:
    return in_process(capfd, monkeypatch, "lm-eval", *words)


def test_the_command_prints_a_table_or_json(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    bundle: Path,
    include: Path,
    found: Any,
) -> None:
    words = ("--model", bundle, "--tasks", ",".join(NAMES), "--include-path", include)
    table = command_line(capfd, monkeypatch, *words)
    assert table.code == 0, table.err
    for name in (*NAMES, "acc_norm", "word_perplexity", "exact_match"):
        assert name in table.out
    printed = command_line(capfd, monkeypatch, *words, "--limit", "3", "--format", "json")
    assert printed.code == 0, printed.err
    assert json.loads(printed.out)["results"] == found[0]["results"]
    assert "samples" not in json.loads(printed.out)


def test_the_command_refuses_in_a_sentence(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    bundle: Path,
    include: Path,
    tmp_path: Path,
) -> None:
    shutil.copy(include / "pages.yaml", tmp_path)
    words = ("--model", bundle, "--include-path", include, "--tasks")
    gone = command_line(capfd, monkeypatch, *words, "local_gone")
    assert gone.code == 2 and gone.err.count("Error:") == 1 and "Traceback" not in gone.err
    alone = command_line(capfd, monkeypatch, *words, "local_pages", "--log-samples")
    assert alone.code == 2 and "--output" in alone.err
    assert files_of(tmp_path) == {"pages.yaml"}
