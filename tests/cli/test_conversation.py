"""`generate` as people use it: chats from a pipe and at a terminal, stop texts, why it ended."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from exported import Run, command, in_process
from llm_coreml import load
from llm_coreml.printable import harmless

TEMPLATE = """{% if messages[-1].content == 'refuse' %}{{ raise_exception('not this') }}{% endif %}\
{% for m in messages %}{{ '<s>' + m.role[0] + ': ' + m.content + '</s>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<s>a: ' }}{% endif %}"""
Talk = Callable[..., Run]


@pytest.fixture
def chatty(bundle: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(bundle, tmp_path / "out"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def talk(chatty: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Run `generate` with bytes on stdin."""

    def run(*words: str, stdin: bytes = b"") -> Run:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        return in_process(
            capfd, monkeypatch, "generate", chatty, "--unchecked", "--max-new-tokens", "4", *words
        )

    return run


def answers(folder: Path, *questions: str, system: str | None = None) -> list[str]:
    """What the library answers."""
    model, found = load(folder, checked=False), []
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question in questions:
        messages.append({"role": "user", "content": question})
        found.append(model.chat(messages, 4))
        messages.append({"role": "assistant", "content": found[-1]})
    return found


def test_every_line_of_a_pipe_is_a_turn(talk: Talk, chatty: Path) -> None:
    done = talk("--chat", stdin="Hé\n\nSo\n".encode())
    assert done.code == 0, done.err
    assert done.out == "".join(f"{text}\n" for text in answers(chatty, "Hé", "So"))


def test_one_message_and_a_system_prompt(talk: Talk, chatty: Path) -> None:
    done = talk("--chat", "--prompt", "Hi", "--system", "Be")
    assert (done.code, done.out) == (0, answers(chatty, "Hi", system="Be")[0] + "\n")


def test_a_chat_as_json(talk: Talk, chatty: Path) -> None:
    done = talk("--chat", "--format", "json", stdin=b"Hi\nSo")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    expected = answers(chatty, "Hi", "So")
    assert [turn["text"] for turn in found["turns"]] == expected
    assert {turn["finish"] for turn in found["turns"]} == {"length"}
    assert [message["role"] for message in found["messages"]] == ["user", "assistant"] * 2
    assert [message["content"] for message in found["messages"]][1::2] == expected


def test_a_continuation_as_json(talk: Talk, chatty: Path) -> None:
    text = load(chatty, checked=False).generate("The quick", 4)
    done = talk("--prompt", "The quick", "--format", "json")
    found = json.loads(done.out)
    assert found.pop("prompt_tokens") > 1
    assert found == {"prompt": "The quick", "text": text, "finish": "length", "new_tokens": 4}
    stopped = talk("-p", "The quick", "--format", "json", "--stop", text[1:2], "--stop", "no")
    assert json.loads(stopped.out)["text"] == text[:1]
    assert json.loads(stopped.out)["finish"] == "stop"


def test_a_full_context_is_told(talk: Talk) -> None:
    done = talk("-p", "The", "--max-new-tokens", "500")
    assert done.code == 0 and "all 64 positions of the context are used" in done.err
    done = talk("-p", "The", "--max-new-tokens", "500", "--format", "json")
    assert json.loads(done.out)["finish"] == "context"


@pytest.mark.parametrize(
    ("words", "stdin", "code", "told"),
    [
        ([], b"", 2, "Give --prompt a text to continue, or --chat"),
        (["-p", "a", "--system", "b"], b"", 2, "--system belongs to --chat"),
        (["-p", "a", "--stop", ""], b"", 2, "A stop text is empty"),
        (["--chat"], b"fine\n\xff\n", 2, "Line 2 of stdin is not UTF-8"),
        (["--chat"], b"refuse\n", 2, "refuses these messages: not this"),
        (["--chat", "-p", "word " * 99], b"", 2, "tokens long, and the context holds 64"),
        (["-p", "a\udcff"], b"", 2, "half of a surrogate pair"),
    ],
)
def test_what_is_refused(words: list[str], stdin: bytes, code: int, told: str, talk: Talk) -> None:
    done = talk(*words, stdin=stdin)
    assert (done.code, "Traceback" in done.err) == (code, False)
    assert told in done.err


def test_a_bundle_without_a_template_says_so_before_anybody_types(
    bundle: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = in_process(capfd, monkeypatch, "generate", bundle, "--chat")
    assert done.code == 7 and "no chat template" in done.err


def on_screen(text: str) -> str:
    return harmless(text).replace("\n", "\r\n")


def test_at_a_terminal(chatty: Path) -> None:
    """Commands, an error that does not end the chat, escapes that are made visible, Ctrl-D."""
    ours, theirs = pty.openpty()
    words = command("generate", chatty, "--unchecked", "--chat", "--max-new-tokens", "4")
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "200"}
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=settings)
    os.close(theirs)
    seen = ""

    def expect(text: str) -> str:
        nonlocal seen
        end = time.monotonic() + 120
        while text not in seen:
            assert time.monotonic() < end and select.select([ours], [], [], 5)[0], seen
            seen += os.read(ours, 4096).decode(errors="replace")
        before, _, seen = seen.partition(text)
        return before

    try:
        expect("/exit or Ctrl-D ends it")
        first, second = answers(chatty, "Hi", "So")
        expect("> ")
        os.write(ours, b"Hi\n")
        expect("Hi\r\n")
        assert expect("\r\n> ") == on_screen(first)
        os.write(ours, b"refuse\n")
        assert "refuses these messages: not this" in expect("\n> ")
        os.write(ours, b"So\n")
        expect("So\r\n")
        assert expect("\r\n> ") == on_screen(second)
        os.write(ours, b"/reset\n")
        expect("> ")
        os.write(ours, b"Hi\n")
        expect("Hi\r\n")
        assert expect("\r\n> ") == on_screen(first)
        os.write(ours, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_ctrl_c_ends_an_answer_and_not_the_chat(chatty: Path) -> None:
    from rich.console import Console

    from llm_coreml.cli.conversation import Asked, Conversation
    from llm_coreml.cli.process import Interruption
    from llm_coreml.cli.terminal import Screen, Stages
    from llm_coreml.runtime.runner import Runner

    model, out = load(chatty, checked=False), io.StringIO()
    screen = Screen(Console(file=out), Stages(io.StringIO()))
    talk = Conversation(model, screen, Asked(6), "human", None)
    step, count = Runner.step, 0

    def interrupted(self: Runner, tokens: list[int]) -> object:
        nonlocal count
        count += 1
        if self.position > 12 and count > 3 and len(tokens) == 1:
            raise KeyboardInterrupt
        return step(self, tokens)

    pardoned = Interruption(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "step", interrupted)
        patch.setattr("llm_coreml.cli.conversation.INTERRUPTION", pardoned)
        talk._answer("Hi", typed=True)
        assert pardoned.number is None
        shown = out.getvalue().rstrip("\n")
        assert talk._messages[-1] == {"role": "assistant", "content": shown}
        for told, typed in ((signal.SIGINT, False), (signal.SIGTERM, True)):
            count, pardoned.number = 0, told
            with pytest.raises(KeyboardInterrupt):
                talk._answer("So", typed)
    talk._answer("So", typed=True)
    assert load(chatty, checked=False).chat(talk._messages[:1], 6).startswith(shown)


def test_terminals_obey_nothing_of_a_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from llm_coreml.cli.conversation import _show

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown, piped = Terminal(), io.StringIO()
    for file in (shown, piped):
        _show(file, "a\x1b[31m\u202eb\n")
    assert shown.getvalue() == "a\\x1b[31m\\u202eb\n"
    assert piped.getvalue() == "a\x1b[31m\u202eb\n"
