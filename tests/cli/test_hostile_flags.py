"""Absurd values of every flag of every verb: a sentence and a code of its own, before any work.

The model and the bundle do not exist, so that a value which is taken ends there.
`benchmarks/hostile_flags.py` gives the same values to calls that run.
"""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from exported import in_process
from llm_coreml.cli.main import cli

HUGE = "1" + 30 * "0"
VALUES = (
    *(
        "",
        " ",
        "0",
        "-1",
        HUGE,
        "-" + HUGE,
        "1" + 5000 * "0",
        "nan",
        "inf",
        "1e999",
        "1,1",
        "1,," + HUGE,
    ),
    *(
        "x",
        "\u0967",
        "\x1b[31mred",
        "\u202eabc",
        "a\nb",
        "a\0b",
        3000 * "x",
        "codebook:" + 30 * "9",
        "8e99GB",
    ),
)
REQUIRED = {
    "apply": ("gone", "gone", "-o", "out"),
    "delta": ("gone", "gone", "-o", "out"),
    "export": ("gone-model", "-o", "out"),
    "extract": ("gone", "-o", "out"),
    "generate": ("gone", "-p", "The"),
    "diff": ("gone", "gone"),
    "inspect": ("gone", "--numerics"),
    "lm-eval": ("-m", "gone", "-t", "gone"),
    "ls": (),
    "push": ("gone", "me/mine"),
    "report": ("gone", "-o", "page.html"),
    "track": ("gone", "--to", "wandb"),
}
CODES = {0, 2, 4, 5, 6, 7}


def flags(verb: str) -> list[str]:
    """Return the options of a verb that take a value."""
    options = [each for each in cli.commands[verb].params if isinstance(each, click.Option)]
    return [max(each.opts, key=len) for each in options if not each.is_flag]


@pytest.mark.parametrize(
    ("verb", "flag"), [(verb, flag) for verb in cli.commands for flag in flags(verb)]
)
def test_absurd_values_end_in_a_sentence(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    verb: str,
    flag: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for value in VALUES:
        words = (verb, *REQUIRED.get(verb, ("gone",)), flag, value)
        done = in_process(capfd, monkeypatch, *words)
        assert done.code in CODES, (words, done.err)
        assert "Traceback" not in done.err and "unexpected" not in done.err, (words, done.err)
        assert all(letter.isprintable() or letter == "\n" for letter in done.err), words
        assert len(done.err) < 8000, words
        assert not any(tmp_path.iterdir()), words


@pytest.mark.parametrize("name", ["a\0b", 300 * "n", 300 * "n" + ".yaml", "./" + 300 * "n"])
@pytest.mark.parametrize("verb", [verb for verb in cli.commands if verb != "ls"])
def test_names_that_no_file_can_have_end_in_a_sentence(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    verb: str,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    rest = {"diff": ("gone",), "export": ("-o", "out"), "generate": ("-p", "The")}
    done = in_process(capfd, monkeypatch, verb, name, *rest.get(verb, ()))
    assert done.code in CODES - {0}, done.err
    assert "Traceback" not in done.err and "unexpected" not in done.err, done.err
