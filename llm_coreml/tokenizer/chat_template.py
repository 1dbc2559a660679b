"""Chat templates: Jinja that makes one prompt of messages, from a tokenizer's files.

template = find_template(Path("out"))
prompt = template.render([{"role": "user", "content": "Hello"}])

A template is code of whoever wrote the checkpoint, so it runs sandboxed in a process of its own.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_coreml.errors import ArtifactError, ConfigError
from llm_coreml.tokenizer.apart import ApartError, run_apart

TEMPLATE = "chat_template.jinja"
_SETTINGS = "tokenizer_config.json"
_LEGACY_SETTINGS = "special_tokens_map.json"
# Settings of these names are special tokens, which transformers hands to a template.
_NAMED = "_token"
# Where further ones of a model stand by name; of lists of them no template knows.
_FURTHER = ("extra_special_tokens", "model_specific_special_tokens")
_SECONDS = 10.0
_SENTINEL = "a1b2c3d4"

Message = Mapping[str, Any]


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the special tokens that it may name.

    Attributes:
        text: The Jinja.
        tokens: Texts of special tokens: `{"bos_token": "<s>"}`.
    """

    text: str
    tokens: Mapping[str, str]

    def render(self, messages: Sequence[Message], answer: bool = True) -> str:
        """Return the prompt for `messages`, as transformers' `apply_chat_template` does.

        Args:
            messages: Each with a `role` and a `content`.
            answer: End with what begins the assistant's answer.

        Raises:
            ConfigError: the messages are no such, or the template refuses them.
            ArtifactError: the template is damaged, or takes too much time or memory.
        """
        request = {
            "template": self.text,
            "messages": _checked(messages),
            "answer": answer,
            "tokens": dict(self.tokens),
        }
        try:
            reply = run_apart("rendering", request, _SECONDS)
        except ApartError as error:
            raise ArtifactError(f"The chat template cannot be used: {error}. Mend it.") from None
        if reply["refused"] is not None:
            raise ConfigError(f"The chat template refuses these messages: {reply['refused']}")
        if reply["damaged"] is not None:
            raise ArtifactError(f"The chat template cannot be used: {reply['damaged']}. Mend it.")
        return str(reply["text"])

    def end_of_turn(self, special: Collection[str]) -> str | None:
        """Return the special token that follows an assistant's answer, if one does.

        Raises:
            ConfigError, ArtifactError: as `render`.
        """
        question = {"role": "user", "content": "?"}
        answer = {"role": "assistant", "content": _SENTINEL}
        _, found, rest = self.render([question, answer], answer=False).rpartition(_SENTINEL)
        ends = [token for token in special if found and rest.lstrip().startswith(token)]
        return max(ends, key=len, default=None)


def find_template(folder: Path) -> ChatTemplate | None:
    """Return the chat template that a tokenizer's files in `folder` hold, None without one.

    A file chat_template.jinja wins over tokenizer_config.json; of several templates there, the one
    called `default` is taken.
    """
    path = folder / TEMPLATE
    if path.is_file():
        text: object = path.read_text(encoding="utf-8", errors="replace")
    else:
        text = _read(folder / _SETTINGS).get("chat_template")
    if isinstance(text, list):
        named = {
            entry.get("name"): entry.get("template") for entry in text if isinstance(entry, dict)
        }
        text = named.get("default")
    if not isinstance(text, str) or not text:
        return None
    return ChatTemplate(text, named_tokens(folder))


def named_tokens(folder: Path) -> dict[str, str]:
    """Return the texts of special tokens by name, as a tokenizer's files in `folder` give them."""
    settings = {**_read(folder / _LEGACY_SETTINGS), **_read(folder / _SETTINGS)}
    for part in (settings.get(key) for key in _FURTHER):
        settings |= part if isinstance(part, dict) else {}
    texts = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in settings.items()
        if name.endswith(_NAMED)
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _read(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; what is none holds nothing."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _checked(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Return messages as JSON values. Raises ConfigError if they are none."""
    checked = [dict(message) if isinstance(message, Mapping) else None for message in messages]
    for message in checked:
        if message is None or not isinstance(message.get("role"), str) or "content" not in message:
            raise ConfigError(
                "A message is a mapping such as {'role': 'user', 'content': 'Hello'}; "
                f"{str(message)[:60]!r} is none."
            )
    if not checked:
        raise ConfigError("There are no messages; give at least one.")
    try:
        copied: list[dict[str, Any]] = json.loads(json.dumps(checked))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"A message holds what is no JSON: {error}.") from None
    return copied
