"""Publishes a bundle on the Hugging Face hub, with what was measured of it.

    push_to_hub("out", "me/my-model-coreml")

The card gets a table of the results beside it, and results of lm-eval's tasks become files of
`.eval_results/`, written by the hub's own client.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from llm_coreml.bundle.folder import CARD, RESULTS, open_bundle
from llm_coreml.errors import ConfigError
from llm_coreml.eval.results_file import latest_result
from llm_coreml.eval.trackers.record import Record, record_of
from llm_coreml.pretrained import MESSAGE, open_repository, published_files, writing
from llm_coreml.printable import CELL, printable
from llm_coreml.quiet import quiet

# More than that, no results of tasks have.
_LARGEST = 1 << 28
# What the hub shows of a task that has several.
_PREFERRED = ("acc_norm", "acc", "exact_match", "word_perplexity")
_FIGURES = ("perplexity", "mean_kl", "p99_kl", "top1_agreement", "bits_per_byte")


@quiet()
def push_to_hub(
    bundle: str | Path,
    repo_id: str,
    *,
    tasks: Sequence[str | Path] = (),
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = MESSAGE,
    create_pr: bool = False,
) -> str:
    """Upload a bundle to a repository of the hub, in one commit.

    Args:
        bundle: Folder that an export wrote; it is left as it is. Its results, if it was evaluated,
            go along, and into the card.
        repo_id: `name` or `owner/name`; it is made if it is not there.
        tasks: Files that `llm-coreml lm-eval` wrote, whose figures become `.eval_results`.
        token: Token of the hub; None takes the one that is logged in.
        private: Make the repository private, if it is made.
        revision: Branch to commit to; it must be there.
        commit_message: What the commit says.
        create_pr: Open a pull request instead.

    Returns:
        The address of the commit or of the pull request.

    Raises:
        ArtifactError: the bundle is damaged, or was changed since it was written.
        ConfigError: results that cannot be read, or a name that no repository has.
        OutputError: the hub refuses, or cannot be reached.
    """
    opened = open_bundle(Path(bundle))
    found = (opened.folder / RESULTS).is_file()
    record = record_of(latest_result(opened.folder / RESULTS)) if found else None
    entries = {name: text for path in tasks for name, text in eval_results(Path(path)).items()}
    with writing(repo_id) as done:
        repository = open_repository(repo_id, token, private, done)
        own = repository.name.rpartition("/")[2]
        files = published_files(opened, own)
        files |= {name: text.encode() for name, text in entries.items()}
        if record is not None:
            card = files[CARD]
            text = card if isinstance(card, bytes) else card.read_bytes()
            files[CARD] = text.rstrip() + b"\n\n" + evaluation_section(record).encode()
            source = dict(record.document["source"] or {})
            if source and opened.manifest.source.kind not in ("hub", "bundled"):
                source["name"] = own
            files[RESULTS] = json.dumps(
                {**record.document, "source": source or None}, indent=2, sort_keys=True
            ).encode()
        return repository.commit(files, revision, commit_message, create_pr)


def evaluation_section(record: Record) -> str:
    """Return what a card says of an evaluation: a table with a row for each model."""
    columns, rows = record.models
    shown = [name for name in _FIGURES if name in columns]
    cells: list[list[str | float | None]] = [
        ["model", *(name.replace("_", " ") for name in shown)],
        ["---"] * (1 + len(shown)),
        *([row[0], *(row[columns.index(name)] for name in shown)] for row in rows),
    ]
    table = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in cells)
    runtime = printable(str(record.document["qualities"][-1]["runtime"]), CELL)
    return f"""## Evaluation

{record.document["tokens"]:,} tokens of {_cell(str(record.document["text"]))}, measured by
llm-coreml {_cell(str(record.config["tool_version"]))}; the artifact by the {runtime}.

{table}
"""


def _cell(value: str | float | None) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return printable(value or "", CELL).replace("|", "\\|").replace("<", "&lt;")


def eval_results(path: Path) -> dict[str, str]:
    """Return the files of `.eval_results/` that tell of lm-eval's tasks, by their paths.

    Args:
        path: `results_DATE.json`, as lm-eval writes it.

    Raises:
        ConfigError: it cannot be read, or no task of it has a dataset of the hub.
    """
    found = _lm_eval_results(path)
    files = {}
    for task, measured in found["results"].items():
        settings = found["configs"].get(task, {})
        dataset, metric = settings.get("dataset_path"), _metric(measured)
        if not isinstance(dataset, str) or "/" not in dataset or metric is None:
            continue
        name, value = metric
        entry = EvalResultEntry(
            dataset_id=dataset,
            task_id=str(settings.get("dataset_name") or "default"),
            value=value,
            notes=f"{task}, {name}, {settings.get('num_fewshot') or 0}-shot, by llm-coreml lm-eval",
        )
        plain = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in task)
        files[f".eval_results/{plain}.yaml"] = yaml.safe_dump(
            eval_result_entries_to_yaml([entry]), sort_keys=False
        )
    if not files:
        raise ConfigError(
            f"'{path}' tells of no task whose dataset is one of the hub's; leave it out."
        )
    return files


def _lm_eval_results(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST:
            raise ConfigError(f"'{path}' has more than {_LARGEST:,} bytes; it is no result.")
        found = json.loads(path.read_bytes())
        whole = isinstance(found["results"], dict) and isinstance(found["configs"], dict)
    except OSError as error:
        raise ConfigError(
            f"'{path}' cannot be read: {error.strerror}. Give a file of llm-coreml lm-eval."
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole or not all(isinstance(each, dict) for each in found["results"].values()):
        raise ConfigError(f"'{path}' is no file of results; give one of llm-coreml lm-eval.")
    results: dict[str, Any] = found
    return results


def _metric(measured: Mapping[str, Any]) -> tuple[str, float] | None:
    """Return the figure of a task that stands for it, and its name."""
    figures = {
        name.partition(",")[0]: value
        for name, value in measured.items()
        if isinstance(value, float) and "stderr" not in name
    }
    names = [name for name in _PREFERRED if name in figures] or sorted(figures)
    return (names[0], figures[names[0]]) if names else None
