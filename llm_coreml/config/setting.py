"""One setting: a field of a frozen dataclass that knows its help, its flag and what it may hold.

@dataclass(frozen=True)
class ProgramSettings(Section):
    context: int | None = setting(None, "Positions of the KV cache.", shown="up to 2048")

(context,) = settings_of(ProgramSettings)
context.flag, context.kind, context.about      # ('--context', int, 'Positions of ...')
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from llm_coreml.errors import ConfigError
from llm_coreml.printable import whole

# What a setting's value must be, in words.
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True)
class Setting:
    """A field, as the command line and the recipes' schema see it.

    Attributes:
        name: Of the field; a recipe's key.
        kind: Type of the value, or of its elements.
        optional: It may be None, which leaves the choice to others.
        many: The value is a tuple.
        texts: It may be a text too, which `read` reads: as a tuple, or as a text that is kept.
        choices: All values that there are; empty where any of `kind` will do.
        default: Value that nobody asked for.
        about: One sentence.
        metavar: What stands for the value in the help.
        shown: What None comes to, in words.
        check: Returns the value as it is kept; raises ConfigError or UnsupportedError.
        read: Returns the value that a text means; raises ValueError.
        spelled: Returns the text that a mapping or an object of a library means; raises ConfigError
            or UnsupportedError.
        mapping: A file may give a mapping, too.
        least: The smallest number that it, or any of its parts, may be.
        most: The largest.
    """

    name: str
    kind: type
    optional: bool
    many: bool
    texts: bool
    choices: tuple[str, ...]
    default: Any
    about: str
    metavar: str | None
    shown: str | None
    check: Callable[[Any], Any] | None
    read: Callable[[str], Any] | None
    spelled: Callable[[Any], str] | None
    mapping: bool
    least: int | None
    most: int | None

    @property
    def flag(self) -> str:
        """The option of the command line."""
        return "--" + self.name.replace("_", "-")

    def words(self, value: Any) -> list[str]:
        """Return what gives `value` on the command line, nothing for the default."""
        if value == self.default:
            return []
        if self.kind is bool:
            return [self.flag]
        listed = self.many and not isinstance(value, str)
        return [self.flag, ",".join(map(str, value)) if listed else str(value)]

    def parsed(self, value: Any) -> Any:
        """Return the value that a recipe or a manifest means. Raises ValueError if it has none."""
        return self.read(value) if self.read is not None and isinstance(value, str) else value

    def in_words(self, value: Any) -> Any:
        """Return the text that a mapping or an object means, any other value as it is.

        Raises:
            ConfigError: it means none.
            UnsupportedError: it means what Core ML does not have.
        """
        if self.spelled is None or value is None or isinstance(value, str):
            return value
        return self.spelled(value)

    def checked(self, value: Any) -> Any:
        """Return `value` as it is kept.

        Raises:
            ConfigError: it is of another kind, or breaks the setting's rule.
            UnsupportedError: it is understood, and nothing can be done with it.
        """
        if value is None and self.optional:
            return None
        value = self.in_words(value)
        if self.choices and value not in self.choices:
            allowed = " or ".join(self.choices)
            raise ConfigError(f"{self.name} is '{value}'; it must be {allowed}.")
        if self.texts and isinstance(value, str):
            value = self._read(value)
        value = value if self.texts and isinstance(value, str) else self._of_kind(value)
        if isinstance(value, str) and "\0" in value:
            raise ConfigError(f"{self.flag} is {brief(value)}; no name holds a NUL character.")
        self._check_range(value)
        return value if self.check is None else self.check(value)

    def _read(self, text: str) -> Any:
        """Return what a text means."""
        try:
            return self.parsed(text)
        except ValueError as error:
            raise ConfigError(f"{self.name} is {brief(text)}: {error}") from None

    def _of_kind(self, value: Any) -> Any:
        """Return `value` as its kind has it: a tuple where it is many, 8.0 as 8."""
        wanted = f"a list, each part {KINDS[self.kind]}" if self.many else KINDS[self.kind]
        listed = isinstance(value, Iterable) and not isinstance(value, str)
        parts = list(value) if self.many and listed else [value]
        if listed != self.many or not all(_is_a(self.kind, part) for part in parts):
            other = " or None" if self.optional else ""
            raise ConfigError(f"{self.name} is {brief(value)}; it must be {wanted}{other}.")
        parts = [int(part) for part in parts] if self.kind is int else parts
        return tuple(parts) if self.many else parts[0]

    def _check_range(self, value: Any) -> None:
        parts = value if isinstance(value, tuple) else [value]
        for part in [] if isinstance(value, str) else parts:
            if self.least is not None and part < self.least:
                raise ConfigError(
                    f"{self.flag} is {brief(part)}; it must be at least {self.least}."
                )
            if self.most is not None and part > self.most:
                raise ConfigError(f"{self.flag} is {brief(part)}; it must be at most {self.most}.")


def setting(
    default: Any,
    about: str,
    *,
    metavar: str | None = None,
    shown: str | None = None,
    check: Callable[[Any], Any] | None = None,
    read: Callable[[str], Any] | None = None,
    spelled: Callable[[Any], str] | None = None,
    mapping: bool = False,
    least: int | None = None,
    most: int | None = None,
) -> Any:
    """Return a dataclass field; type and choices (a `Literal`) are those of its annotation.

    Args:
        default: Value that nobody asked for.
        about: One sentence for help, schema and documents.
        metavar: What stands for the value in the help, where its type says too little.
        shown: What a default of None comes to, in words.
        check: Returns the value as it is kept; raises ConfigError or UnsupportedError.
        read: Returns the value that a text means, for types that a text does not say; raises
            ValueError.
        spelled: Returns the text that a mapping or an object of a library means; raises ConfigError
            or UnsupportedError.
        mapping: A file may give a mapping, too.
        least: The smallest number that it, or any of its parts, may be.
        most: The largest; beyond it nothing fits a tensor, or ends in a lifetime.
    """
    told: dict[str, Any] = {"about": about, "metavar": metavar, "shown": shown}
    told |= {"check": check, "read": read, "spelled": spelled, "mapping": mapping}
    told |= {"least": least, "most": most}
    return dataclasses.field(default=default, metadata={"setting": told})


def _is_a(kind: type, value: object) -> bool:
    """Return whether a value is of a kind: 8.0 is whole, and True is no number."""
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is int and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, (int, float) if kind is float else kind)


def brief(value: object) -> str:
    """Return a value as an error can show it; what a file nests may be of any size."""
    if isinstance(value, (dict, list)):
        return "a list" if isinstance(value, list) else "a section"
    if isinstance(value, int) and not isinstance(value, bool):
        return whole(value)
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


class Section:
    """Base of frozen dataclasses whose fields are settings: each is checked by its own rule."""

    def __post_init__(self) -> None:
        for each in settings_of(type(self)):
            object.__setattr__(self, each.name, each.checked(getattr(self, each.name)))


def settings_of(section: Any) -> tuple[Setting, ...]:
    """Return the settings of a section, in their order."""
    hints = get_type_hints(section)
    return tuple(
        _described(field, hints[field.name])
        for field in dataclasses.fields(section)
        if "setting" in field.metadata
    )


def _described(field: dataclasses.Field[Any], hint: Any) -> Setting:
    """Return a setting: what its annotation says of it, and what `setting` was told."""
    optional = type(None) in get_args(hint)
    kinds = [part for part in get_args(hint) if part is not type(None)] if optional else [hint]
    plain, *rest = kinds
    many = get_origin(plain) is tuple
    choices = get_args(plain) if get_origin(plain) is Literal else ()
    kind = str if choices else get_args(plain)[0] if many else plain
    told = field.metadata["setting"]
    texts = rest == [str]
    return Setting(field.name, kind, optional, many, texts, choices, field.default, **told)
