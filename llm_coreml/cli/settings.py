"""The options of an export, made from the fields of its settings, and which of them were given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from llm_coreml.cli.options import Command
from llm_coreml.config.sections import SECTIONS
from llm_coreml.config.setting import Setting, settings_of


def settings_options(command: Command) -> Command:
    """Give a command an option for every setting, in the order of the sections."""
    for setting in reversed(_all()):
        command = _option(setting)(command)
    return command


def given_settings(context: click.Context) -> dict[str, Any]:
    """Return the settings that stand on the command line, and not those that were left out."""
    source = click.core.ParameterSource.DEFAULT
    return {
        setting.name: context.params[setting.name]
        for setting in _all()
        if context.get_parameter_source(setting.name) is not source
    }


def _all() -> list[Setting]:
    return [setting for section in SECTIONS.values() for setting in settings_of(section)]


def _option(setting: Setting) -> Callable[[Command], Command]:
    shown = "" if setting.shown is None else f"  [default: {setting.shown}]"
    text = setting.about + shown
    if setting.kind is bool:
        # The second form switches off what a recipe switches on.
        both = f"{setting.flag}/{setting.flag.replace('--', '--no-', 1)}"
        return click.option(both, default=setting.default, help=text)
    return click.option(
        setting.flag,
        type=_type(setting),
        default=setting.default,
        show_default=True,
        metavar=setting.metavar,
        help=text,
    )


def _type(setting: Setting) -> Any:
    """Return what click reads a word as."""
    if setting.choices:
        return click.Choice(setting.choices)
    return setting.kind if setting.read is None else _reader(setting.read)


def _reader(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a reader whose complaints click shows."""

    def reading(value: str) -> Any:
        try:
            return read(value)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None

    return reading
