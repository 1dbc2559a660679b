"""What `generate` does: shows text as it is made, and holds a conversation.

Conversation(model, screen, Asked(), "human", system=None).run(prompt=None)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from llm_coreml.bundle.language_model import LanguageModel
from llm_coreml.bundle.text_stream import TextStream
from llm_coreml.cli.options import print_json
from llm_coreml.cli.process import INTERRUPTION
from llm_coreml.cli.terminal import Screen
from llm_coreml.errors import ConfigError
from llm_coreml.printable import harmless
from llm_coreml.runtime.sampling import GREEDY, Sampling

TOKENS = 64
_HELP = "/reset forgets the conversation; /exit or Ctrl-D ends it, Ctrl-C an answer."


@dataclass(frozen=True)
class Asked:
    """How text is to be made.

    Attributes:
        max_new_tokens: Most tokens of a text; None leaves it to what is asked.
        sampling: How tokens are chosen.
        stop: Texts that end one.
    """

    max_new_tokens: int | None = None
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()


def continue_text(
    model: LanguageModel, screen: Screen, asked: Asked, form: str, prompt: str
) -> None:
    """Show the text that continues `prompt`; arguments as `Conversation`."""
    stream = model.stream(
        prompt,
        TOKENS if asked.max_new_tokens is None else asked.max_new_tokens,
        sampling=asked.sampling,
        stop=asked.stop,
    )
    text = tell(screen, stream, form, model.runner.context)
    if form == "json":
        print_json(screen.result.file, {"prompt": prompt, **facts(stream, text)})


class Conversation:
    """Messages of a user and the model's answers, over one cache.

    Args:
        model: Answers.
        screen: Where answers are shown as they come.
        asked: How they are made.
        form: `human`, or `json` for one object at the end.
        system: What the model is told first, None for nothing.
    """

    def __init__(
        self, model: LanguageModel, screen: Screen, asked: Asked, form: str, system: str | None
    ) -> None:
        self._model, self._screen, self._asked, self._form = model, screen, asked, form
        self._system = system
        self._messages: list[dict[str, str]] = []
        self._turns: list[dict[str, Any]] = []
        self._forget()

    def run(self, prompt: str | None) -> None:
        """Answer `prompt`, or what is typed until its end, or every line of a pipe.

        Raises:
            LlmCoreMLError: as `LanguageModel.chat`; somebody who types is told, and goes on.
        """
        self._model.template  # noqa: B018, raises before anybody has typed
        if prompt is not None:
            self._answer(prompt)
        elif sys.stdin is not None and sys.stdin.isatty():
            self._converse()
        else:
            for line in _lines():
                self._answer(line)
        if self._form == "json":
            found = {"messages": self._messages, "turns": self._turns}
            print_json(self._screen.result.file, found)

    def _converse(self) -> None:
        """Answer what is typed, and do what is asked by a command, until an end."""
        file, progress = self._screen.result.file, self._screen.progress
        progress.close()
        progress.note(_HELP)
        while True:
            file.write("> ")
            file.flush()
            line = _read_line(1)
            if line is None or line == "/exit":
                file.write("\n" if line is None else "")
                return
            if line == "/reset":
                self._forget()
            elif line.startswith("/"):
                progress.note(_HELP)
            elif line:
                try:
                    self._answer(line, typed=True)
                except ConfigError as error:
                    progress.note(str(error))

    def _forget(self) -> None:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        self._messages = system

    def _answer(self, message: str, typed: bool = False) -> None:
        asked = self._asked
        messages = [*self._messages, {"role": "user", "content": message}]
        stream = self._model.stream_chat(
            messages, asked.max_new_tokens, sampling=asked.sampling, stop=asked.stop
        )
        text = tell(self._screen, stream, self._form, self._model.runner.context, typed)
        self._messages = [*messages, {"role": "assistant", "content": text}]
        self._turns.append(facts(stream, text))


def _lines() -> Iterator[str]:
    """Yield every line of stdin that is not empty."""
    number = 1
    while (line := _read_line(number)) is not None:
        if line:
            yield line
        number += 1


def _read_line(number: int) -> str | None:
    """Return a line of stdin without spaces around it, None at its end."""
    line = b"" if sys.stdin is None else sys.stdin.buffer.readline()
    if not line:
        return None
    try:
        return line.decode().strip()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"Line {number} of stdin is not UTF-8 at byte {error.start}; save it as UTF-8."
        ) from None


def facts(stream: TextStream, text: str) -> dict[str, Any]:
    """Return what is told of a text that was made, for machines."""
    return {
        "text": text,
        "finish": stream.finish,
        "prompt_tokens": stream.prompt_tokens,
        "new_tokens": stream.new_tokens,
    }


def tell(screen: Screen, stream: TextStream, form: str, context: int, typed: bool = False) -> str:
    """Show a text as it is made, say if the context of so many positions ended it, and return it.

    Where somebody types, Ctrl-C ends the text and not the program.
    """
    parts: list[str] = []
    # A bar that is drawn again would overwrite the line.
    screen.progress.close()
    try:
        for piece in stream:
            parts.append(piece)
            if form != "json":
                _show(screen.result.file, piece)
    except KeyboardInterrupt:
        if not typed or not INTERRUPTION.pardon():
            raise
    if form != "json":
        _show(screen.result.file, "\n")
    if stream.finish == "context":
        screen.progress.note(
            f"Stopped: all {context} positions of the context are used. Export with "
            "a larger --context for longer texts."
        )
    return "".join(parts)


def _show(file: IO[str], piece: str) -> None:
    """Write a piece of text: what a terminal would obey as escapes, a pipe gets it as it is."""
    file.write(harmless(piece) if file.isatty() else piece)
    file.flush()
