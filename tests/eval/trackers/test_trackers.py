"""Each tracker's own package, told of an evaluation in a process of its own, and read back."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llm_coreml
from exported import in_process
from llm_coreml.cli.process import INTERRUPTION
from llm_coreml.errors import ConfigError, TrackerError
from llm_coreml.eval.results_file import append_result
from llm_coreml.eval.trackers.record import Record, record_of
from llm_coreml.eval.trackers.sink import KINDS, Kind, Tracker
from llm_coreml.eval.trackers.tracking import send, track, without_secrets
from llm_coreml.eval.trackers.wandb_sinks import WandbSink
from result_documents import document

SECRET = "s3cret-of-the-team"
BLOCK = 32768


@pytest.fixture
def found() -> dict[str, Any]:
    """Results of two models, of which one was read from a folder that is nobody's business."""
    made = document("out", model="/home/me/secret-run")
    made["qualities"].insert(0, {"name": "original", "runtime": "eager", "perplexity": 8.5})
    return made


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every tracker keeps what it is told in the test's folder."""
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_API_KEY": SECRET,
        "MLFLOW_TRACKING_URI": f"file:{tmp_path}/mlruns",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }.items():
        monkeypatch.setenv(name, value)


def test_a_record_has_names_that_stay_and_no_place(found: dict[str, Any]) -> None:
    found["qualities"][-1]["not_finite"] = {"rows": 3, "window": 0, "position": 1, "token": 2}
    found["qualities"][0]["perplexity"] = float("inf")
    found["devices"] = [{"name": "my phone (2)", "tokens_per_second": 9.0, "runs_agree": True}]
    record = record_of(found)
    assert list(record.metrics) == [
        "artifact/mean_kl",
        "artifact/not_finite_rows",
        "artifact/perplexity",
        "artifact/top1_agreement",
        "bits_per_weight",
        "call/1/seconds",
        "call/1/tokens_per_second",
        "call/8/seconds",
        "call/8/tokens_per_second",
        "device/my-phone-2-/tokens_per_second",
        "program_bytes",
    ]
    settings = ("model", "format", "target", "bits", "seq_lengths", "tool_version", "text")
    values = ("secret-run", "int4 group 32", "gpu", 4, "1,8", "0.1.0", "a text")
    assert tuple(record.config[name] for name in settings) == values
    assert "/home/me" not in repr(vars(record))


def read_tensorboard(where: Path) -> tuple[dict[str, float], str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(where)).Reload()
    figures = {name: events.Scalars(name)[0].value for name in events.Tags()["scalars"]}
    texts = events.Tags()["tensors"]
    assert {"models/text_summary", "results/text_summary"} <= set(texts)
    plugins = events.summary_metadata["_hparams_/session_start_info"].plugin_data
    return figures, plugins.content.decode(errors="replace")


def read_mlflow(where: Path) -> tuple[dict[str, float], str]:
    from mlflow import MlflowClient

    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    run = client.get_run(where.name)
    assert run.info.status == "FINISHED" and run.info.run_name == "out"
    assert {each.path for each in client.list_artifacts(where.name)} == {
        "results.json",
        "models.json",
    }
    assert "mlflow.user" not in run.data.tags
    return run.data.metrics, json.dumps(run.data.params)


def read_trackio(where: Path) -> tuple[dict[str, float], str]:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = trackio.Api().runs("mine")
    (logged,) = SQLiteStorage.get_logs("mine", run.name, run_id=run.id)
    assert logged["models"]["_type"] == "trackio.table"
    assert [each["type"] for each in SQLiteStorage.get_artifacts("mine")] == ["evaluation"]
    numbers = {name: value for name, value in logged.items() if isinstance(value, float)}
    return numbers, json.dumps(run.config)


def read_wandb(where: Path) -> tuple[dict[str, float], str]:
    from wandb.proto import wandb_internal_pb2

    (path,) = where.glob("run-*.wandb")
    figures, config, kinds = {}, {}, set()
    for content in wandb_records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(content)
        kinds.add(record.WhichOneof("record_type"))
        for item in record.history.item:
            value = json.loads(item.value_json)
            if isinstance(value, (int, float)):
                figures["/".join(item.nested_key) or item.key] = value
        config |= {each.key: each.value_json for each in record.run.config.update}
    assert "artifact" in kinds and list(where.rglob("*.table.json"))
    return figures, json.dumps(config)


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a log in LevelDB's format, whose header takes seven bytes."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        parts, at = parts + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):
            yield parts
            parts = b""


@pytest.mark.parametrize(
    ("tracker", "read"),
    [
        ("tensorboard:runs", read_tensorboard),
        ("mlflow:mine", read_mlflow),
        ("trackio:mine", read_trackio),
        ("wandb:mine", read_wandb),
    ],
)
def test_what_a_tracker_was_told_is_read_back(
    tracker: str,
    read: Any,
    found: dict[str, Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (where,) = track(found, tracker)
    assert capfd.readouterr() == ("", "")
    told = record_of(found)
    figures, config = read(Path(where.removeprefix("file:")))
    for name, value in told.metrics.items():
        assert figures[name] == pytest.approx(value, rel=1e-6), name
    assert "int4 group 32" in config and "secret-run" in config
    for path in (each for each in tmp_path.rglob("*") if each.is_file()):
        content = path.read_bytes()
        assert b"/home/me" not in content and SECRET.encode() not in content, path


class Mine:
    """A sink of one's own."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.told: list[Record] = []

    def log(self, record: Record) -> str:
        if self.fails:
            raise RuntimeError(f"no route to https://me:{SECRET}@host?api_key=abc&x=1\nat line 3")
        self.told.append(record)
        return "here"


def test_a_sink_of_ones_own_is_told_though_another_fails(found: dict[str, Any]) -> None:
    mine = Mine()
    with pytest.raises(TrackerError) as failed:
        track(found, Mine(fails=True), mine, name="mine")
    assert str(failed.value) == (
        "Mine was told of no evaluation: RuntimeError: no route to https://***@host?***&x=1."
    )
    assert [each.name for each in mine.told] == ["mine"] and failed.value.exit_code == 12
    assert track(found, mine) == ("here",)
    assert llm_coreml.track is track


def test_secrets_of_the_environment_are_in_no_sentence() -> None:
    assert without_secrets(f"401: {SECRET} is wrong") == "401: *** is wrong"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wandbb", "'wandbb' is no tracker; they are .* Did you mean 'wandb'"),
        ("tensorboard", "needs to know where; give it as tensorboard:DIR"),
        ("", "'' is no tracker"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused_before_any_is_told(
    name: str, words: str, found: dict[str, Any]
) -> None:
    mine = Mine()
    with pytest.raises(ConfigError, match=words):
        track(found, mine, name)
    assert not mine.told


def test_a_library_that_hangs_is_ended(found: dict[str, Any]) -> None:
    with pytest.raises(TrackerError, match="trackio was told of no evaluation: it did not answer"):
        send([record_of(found)], Tracker("trackio"), patience=0.01)


def test_a_server_that_is_down_costs_no_results(
    found: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    append_result(Path("results"), found)
    append_result(Path("results"), {**found, "created": "2026-01-02T00:00:00Z"})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:9")
    words = ("track", "results", "--to", "mlflow", "--to", "tensorboard:runs", "--run-name", "a b")
    done = in_process(capfd, monkeypatch, *words, "--format", "json")
    shown = json.loads(done.out)
    assert [each["where"] for each in shown["runs"]] == [
        "runs/a-b-20260101-000000",
        "runs/a-b-20260102-000000",
    ]
    (sentence,) = shown["failures"]
    assert sentence.startswith("mlflow was told of 0 of 2 evaluations: MlflowException: ")
    again = "The results are kept; tell again: llm-coreml track results --to mlflow"
    assert done.code == 12 and SECRET not in done.err + done.out
    assert done.err.endswith(f"{sentence} {again}\n")


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B is not installed."""
    monkeypatch.setitem(KINDS, "wandb", Kind(WandbSink, "wandb_that_is_not_there", "PROJECT"))  # type: ignore[index]


def test_eval_keeps_its_results_and_says_which_tracker_was_not_told(
    bundle: Path,
    absent: None,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import shutil

    own = Path(shutil.copytree(bundle, tmp_path / "own"))
    told: list[Record] = []
    monkeypatch.setattr("llm_coreml.eval.trackers.tracking._run", answering(told))
    words = ("eval", own, "--artifact-only", "--text", text_file, "--tokens", "40", "--track")
    done = in_process(
        capfd, monkeypatch, *words, "wandb", "--track", "trackio:mine", "--format", "json"
    )
    written = json.loads((own / "results.json").read_text())
    assert json.loads(done.out) == written
    absence = "wandb is not installed; get it with pip install 'llm-coreml[wandb]'."
    again = f"The results are kept; tell again: llm-coreml track {own} --to wandb\n"
    # Once before the work, and once at its end.
    assert done.err.count(absence) == 2 and done.err.endswith(f"Error: {absence} {again}")
    assert done.err.index(absence) < done.err.index("scoring text") and "trackio: there" in done.err
    assert done.code == 12
    (record,) = told
    assert record.card == (own / "README.md").read_text()
    assert record.config["versions/torch"] and record.document["created"] == written["created"]
    # A gate that does not hold comes first, and both are told.
    done = in_process(capfd, monkeypatch, *words, "wandb", "--max-bytes", "1")
    assert done.code == 3 and "--max-bytes" in done.err and again in done.err


def answering(told: list[Record]) -> Any:
    def run(tracker: Tracker, given: str, seconds: float) -> tuple[str, str]:
        told.extend(Record(**each) for each in json.loads(given))
        return json.dumps({"where": "there"}), ""

    return run


def test_ctrl_c_ends_the_waiting_for_a_tracker_alone(
    found: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    append_result(Path("results"), found)

    def interrupted(tracker: Tracker, given: str, seconds: float) -> tuple[str, str]:
        if tracker.name == "trackio":
            INTERRUPTION.number = 2
            raise KeyboardInterrupt
        return json.dumps({"where": "there"}), ""

    monkeypatch.setattr(INTERRUPTION, "over", False)
    monkeypatch.setattr("llm_coreml.eval.trackers.tracking._run", interrupted)
    done = in_process(capfd, monkeypatch, "track", "results", "--to", "trackio", "--to", "wandb")
    assert done.code == 12 and "trackio was interrupted." in done.err
    assert "there" in done.out and "--to wandb" not in done.err
