"""Exports as fine-tuning libraries name them, published to a stand-in for the hub; their bar."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import llm_coreml
from exported import make_tokenizer
from hub_server import COMMIT, Hub
from llm_coreml import ExportConfig, pipeline
from llm_coreml.bundle.folder import open_bundle
from llm_coreml.errors import CheckpointError, ConfigError, OutputError
from llm_coreml.plain_table import PlainTable
from llm_coreml.progress_bar import Step, listening

SETTINGS = ExportConfig(context=64, seq_lengths=(1,))


def test_what_is_pushed_is_the_bundle_and_tells_of_no_folder(
    hub: type[Hub], checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Other tests read the shared folder meanwhile.
    secret = shutil.copytree(checkpoint, tmp_path / "secret-run")
    address = llm_coreml.push_to_hub_coreml(
        secret, "mine", bits=4, target="gpu", config=SETTINGS, token="hf_x", cache=False
    )
    assert address == COMMIT
    assert capfd.readouterr() == ("", "")
    assert hub.asked[-1].startswith("/api/models/me/mine/commit/main")
    pushed = tmp_path / "pushed"
    pushed.mkdir()
    for name, content in hub.files.items():
        (pushed / name).write_bytes(content)
        assert b"secret-run" not in content, name
    made = open_bundle(pushed)
    assert made.manifest.source.name == "mine" and "./mine" in made.manifest.rebuild
    assert (pushed / "README.md").read_text().count("# mine for ExecuTorch") == 1
    assert llm_coreml.load(pushed).generate("The", 1)


def test_a_hub_that_refuses_costs_no_export(
    hub: type[Hub], live_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "open_model", lambda *_, **__: pytest.fail("work was done"))
    hub.refuses = "/create"
    with pytest.raises(OutputError, match=r"'mine' cannot be written \(HfHubHTTPError.*hf auth"):
        llm_coreml.push_to_hub_coreml(live_model, "mine", token="hf_x")
    with pytest.raises(ConfigError, match=r"'a/b/c' is no repository id"):
        llm_coreml.push_to_hub_coreml(live_model, "a/b/c", token="hf_x")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, live_model: Any) -> tuple[Any, list[Step]]:
    """The tiny model, exported with a function that listens."""
    steps: list[Step] = []
    live_model.config._name_or_path = "/home/me/secret-run"
    try:
        made = llm_coreml.save_pretrained_coreml(
            live_model,
            tmp_path_factory.mktemp("saved") / "out",
            make_tokenizer(),
            target="gpu",
            config=SETTINGS,
            progress=steps.append,
        )
    finally:
        live_model.config._name_or_path = ""
    return made, steps


def test_a_function_is_told_of_every_stage(saved: tuple[Any, list[Step]]) -> None:
    _, steps = saved
    assert list(dict.fromkeys(step.stage for step in steps)) == [
        "open", "quantize", "read", "lower", "verify",
    ]  # fmt: skip
    assert all(0 <= step.share <= 1 for step in steps)
    assert max(step.share for step in steps) > 0.5


def test_a_bundle_is_shown_as_a_table(saved: tuple[Any, list[Step]]) -> None:
    made, _ = saved
    assert made.manifest.source.name == "LlamaForCausalLM"
    title, *rows = str(made).splitlines()
    assert title == f"{made.folder}: LlamaForCausalLM"
    assert [row.split()[0] for row in rows] == ["program", "weights", "runs", "context", "verified"]
    assert made._repr_html_().count("<tr>") == 5
    for path in made.folder.iterdir():
        assert b"secret-run" not in path.read_bytes(), path


def test_an_evaluation_is_shown_as_a_table(
    saved: tuple[Any, list[Step]], text_file: Path, live_model: Any
) -> None:
    result = llm_coreml.evaluate(saved[0].folder, text=text_file, model=live_model, tokens=40)
    shown = str(result).splitlines()
    assert shown[0].startswith("40 tokens of ") and "perplexity" in shown[1]
    assert [row.split()[0] for row in shown[2:]] == ["original", "quantized", "artifact"]
    assert f"{result.artifact.perplexity:.2f}" in shown[4]
    assert result._repr_html_().startswith("<table><caption>40 tokens")


def test_html_of_strangers_is_escaped() -> None:
    table = PlainTable("<b>", ("", ""), (("<script>", "\x1b[31m"),))
    assert "<b>" not in table.html() and "<script>" not in table.html()
    assert "\x1b" not in table.html() + str(table)


# The bar


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_through(asked: Any) -> None:
    with listening(asked) as listener:
        for stage in ("open", "quantize", "of another name", "verify"):
            listener.stage(stage)
            listener.advance(0.5)
            listener.advance(1.0)
        listener.note("a note\x1b[31m")


def test_a_log_has_a_line_for_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    run_through(True)
    told = ["open", "quantize", "of another name", "verify", "a note\\x1b[31m"]
    assert log.getvalue().splitlines() == [f"llm-coreml: {each}" for each in told]


def test_a_terminal_has_one_bar_that_never_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    run_through(True)
    shares = [
        int(part.split("%")[0].split()[-1]) for part in screen.getvalue().split("\r") if "%" in part
    ]
    assert shares == sorted(shares) and shares[0] == 0
    assert "a note" in screen.getvalue() and "\x1b[31m" not in screen.getvalue()


@pytest.mark.parametrize("stream", [None, "closed"])
def test_no_terminal_at_all_is_no_trouble(
    stream: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", None if stream is None else closed)
    run_through(True)


def test_silence(capfd: pytest.CaptureFixture[str]) -> None:
    for asked in (None, False):
        run_through(asked)
    assert capfd.readouterr() == ("", "")


def test_the_bar_ends_with_an_export_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with pytest.raises(CheckpointError):
        llm_coreml.export(tmp_path, output=tmp_path / "out", progress=True)
    assert screen.getvalue().endswith("\r")
