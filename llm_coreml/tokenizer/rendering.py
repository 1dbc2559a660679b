"""Renders a chat template as transformers does; runs in a process of its own, see `apart`.

work({"template": "{{ messages[0].content }}", "messages": [...], "answer": True, "tokens": {}})
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# Longer than any context in letters.
_LONGEST = 8_000_000


class _RefusedError(jinja2.TemplateError):
    """What a template itself raises about the messages."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks an assistant's answer for training; here it is passed over."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the block's content as a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Any) -> str:
        return str(caller())


class _Namespace(Namespace):
    """A namespace without names that lead into Python's own."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"the name {name!r} is reserved")
        super().__setitem__(name, value)


def _raise(message: str) -> None:
    raise _RefusedError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _environment() -> ImmutableSandboxedEnvironment:
    """Return the environment that templates on the hub are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    environment.globals["namespace"] = _Namespace
    return environment


def work(request: dict[str, Any]) -> dict[str, str | None]:
    """Render a template.

    Args:
        request: `template`, `messages`, `answer` (begin the assistant's), and `tokens`, the
            special tokens by name.

    Returns:
        `text`; or `refused`, what the template says of the messages; or `damaged`, what is wrong
        with it.
    """
    try:
        text = (
            _environment()
            .from_string(request["template"])
            .render(
                messages=request["messages"],
                tools=None,
                documents=None,
                add_generation_prompt=request["answer"],
                **request["tokens"],
            )
        )
    except _RefusedError as error:
        return {"text": None, "refused": str(error)[:500], "damaged": None}
    except jinja2.TemplateSyntaxError as error:
        reason = f"line {error.lineno}: {error.message}"
    except Exception as error:  # whatever the template's own expressions raise
        reason = f"{type(error).__name__}: {str(error)[:500]}"
    else:
        if len(text) <= _LONGEST:
            return {"text": text, "refused": None, "damaged": None}
        reason = f"it makes {len(text):,} letters"
    return {"text": None, "refused": None, "damaged": reason}
