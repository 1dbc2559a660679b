"""A bundle and its results on the hub, by the real client: what arrives, and what goes wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from exported import in_process
from hub_server import COMMIT, Hub
from llm_coreml.bundle.folder import open_bundle
from llm_coreml.errors import ConfigError
from llm_coreml.eval.publish import eval_results
from result_documents import document

TASKS = {
    "results": {
        "arc_easy": {"alias": "arc_easy", "acc,none": 0.5, "acc_norm,none": 0.25},
        "mine": {"acc,none": 1.0},
    },
    "configs": {
        "arc_easy": {"dataset_path": "allenai/ai2_arc", "dataset_name": "ARC-Easy"},
        "mine": {"dataset_path": "json"},
    },
}


@pytest.fixture
def own(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle that was evaluated, and results of tasks beside it."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret_token")
    monkeypatch.chdir(tmp_path)
    Path("tasks.json").write_text(json.dumps(TASKS))
    folder = Path(shutil.copytree(bundle, tmp_path / "own"))
    found = document("own", model="/home/me/secret-run", text="a | <b>")
    (folder / "results.json").write_text(json.dumps(found))
    return folder


def test_bundle_card_results_and_tasks_arrive_in_one_commit(
    hub: type[Hub],
    own: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = ("push", own, "me/mine", "--private", "--revision", "next", "--tasks", "tasks.json")
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    done = in_process(capfd, monkeypatch, *words, "--format", "json")
    assert done.code == 0, done.err
    assert json.loads(done.out) == {"repository": "me/mine", "address": COMMIT}
    assert hub.made[0]["visibility"] == "private" and hub.asked[-1].endswith("/commit/next")
    assert [each for each in hub.asked if "/commit/" in each] == hub.asked[-1:]
    assert hub.tokens == {"Bearer hf_secret_token"} and len(hub.stored) == 1
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before
    arrived = tmp_path / "arrived"
    for name, content in hub.files.items():
        path = arrived / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        assert b"secret" not in content and str(tmp_path).encode() not in content, name
    assert open_bundle(arrived).manifest.source.name == "mine"
    card = (arrived / "README.md").read_text()
    assert "# mine for ExecuTorch" in card and card.count("## Evaluation") == 1
    assert "a \\| &lt;b>, measured by" in card
    assert "| model | perplexity | mean kl | top1 agreement |\n| --- |" in card
    assert "| artifact | 8.8022 | 0.02 | 0.9 |" in card
    (path,) = (arrived / ".eval_results").iterdir()
    (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    told = (entry.dataset_id, entry.task_id, entry.value, entry.notes)
    assert told == (
        "allenai/ai2_arc",
        "ARC-Easy",
        0.25,
        "arc_easy, acc_norm, 0-shot, by llm-coreml lm-eval",
    )


@pytest.mark.parametrize(
    ("refuses", "status", "words"),
    [
        ("/create", 401, "Nothing was committed. Log in with a token that may write"),
        ("/create", 403, "Nothing was committed. Log in with a token that may write"),
        ("/commit/", 403, "Nothing was committed. The repository was made, and is empty. Log in"),
        ("/put/", 403, "Nothing was committed. The repository was made, and is empty. Log in"),
        ("/commit/", 500, "The repository was made, and is empty. The hub has trouble of its own"),
    ],
)
def test_a_hub_that_refuses_is_told_with_what_is_left_of_it(
    refuses: str,
    status: int,
    words: str,
    hub: type[Hub],
    own: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    hub.refuses, hub.status = refuses, status
    done = in_process(capfd, monkeypatch, "push", own, "me/mine")
    assert done.code == 6 and words in done.err, done.err
    assert done.err.count("\n") == 2 and "hf_secret" not in done.err and not hub.files


def test_no_network_and_no_such_name_are_sentences(
    own: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    done = in_process(capfd, monkeypatch, "push", own, "me/mine")
    assert done.code == 6 and "Nothing was committed. Look at the network" in done.err, done.err
    done = in_process(capfd, monkeypatch, "push", own, "a/b/c")
    assert done.code == 2 and "'a/b/c' is no repository id" in done.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is no file of results"),
        ("[" * 9999, "is no file of results"),
        ('{"results": {"a": 1}, "configs": {}}', "is no file of results"),
        ('{"results": {}, "configs": {}}', "no task whose dataset is one of the hub's"),
    ],
)
def test_results_of_tasks_that_are_none_are_refused(
    content: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "tasks.json").write_text(content)
    with pytest.raises(ConfigError, match=words):
        eval_results(tmp_path / "tasks.json")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        eval_results(tmp_path / "gone.json")
