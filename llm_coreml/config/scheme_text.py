"""What `--scheme`, `--embedding` and `--lm-head` say, as data: formats, options, patterns of names.

    text = read_scheme("int4-group,lm_head=codebook:6:rows8,layers.0.*=int8-channel")
    text.plain                      # FormatText("int4-group", None, None)
    text.patterns["lm_head"]        # FormatText("codebook", 6, FormatOptions(rows=8, ...))

A format is `NAME[:BITS][:OPTION]...`. One that has options of its own takes none from the flags.
A pattern is a name of the decoder's, in which `*`, `?` and `[...]` stand for others as in a shell;
before it may stand the `model.` that transformers' names have. The first pattern that fits a name
decides.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from llm_coreml.config.setting import brief
from llm_coreml.errors import ConfigError

ZeroPointText = Literal["none", "int", "float"]
_SIZE = re.compile(r"(group|rows|columns|vector)([1-9]\d{0,8})")
_OPTIONS = "groupN, zero-int, zero-float, rowsN, columnsN, whole, vectorN and scaled"


@dataclass(frozen=True)
class FormatOptions:
    """The options of a format, those that it does not have left out of account.

    Attributes:
        group: Inputs per scale.
        zero_point: What is subtracted from codes.
        rows: Rows per table; None is all of them.
        columns: Inputs per table; None is all of them.
        vector: Rows per entry of a table.
        scaled: Whether rows have a factor.
    """

    group: int = 32
    zero_point: ZeroPointText = "none"
    rows: int | None = None
    columns: int | None = None
    vector: int = 1
    scaled: bool = False


@dataclass(frozen=True)
class FormatText:
    """One format, as it was written.

    Attributes:
        text: All of it.
        name: Of a scheme, which there may not be.
        bits: None where they are not given.
        words: Options, as written.
    """

    text: str
    name: str
    bits: int | None
    words: tuple[str, ...]

    def options(self, default_rows: int) -> FormatOptions | None:
        """Return the options; None where there are none, so that the flags' count.

        Args:
            default_rows: Rows per table where a table's block is not given.

        Raises:
            ConfigError: one of them is unknown.
        """
        if not self.words:
            return None
        found = FormatOptions()
        for word in self.words:
            found = _with(found, word, self.text)
        kinds = [re.split(r"[-\d]", word)[0] for word in self.words]
        blocks = {"rows", "columns", "whole"} & set(kinds)
        if len(set(kinds)) != len(kinds) or ("whole" in blocks and len(blocks) > 1):
            raise ConfigError(f"{brief(self.text)} gives one thing twice; drop one of its options.")
        return found if blocks else replace(found, rows=default_rows)


@dataclass(frozen=True)
class SchemeText:
    """What `--scheme` says.

    Attributes:
        plain: The format of linear layers of the blocks that no pattern fits; None is what
            `--bits` and the target say.
        patterns: Formats by patterns of names, in their order.
    """

    plain: FormatText | None = None
    patterns: Mapping[str, FormatText] = field(default_factory=dict)

    def pattern_of(self, name: str) -> str | None:
        """Return the pattern that decides a matrix's format, by its name in the decoder."""
        return next((each for each in self.patterns if fits(each, name)), None)


def fits(pattern: str, name: str) -> bool:
    """Return whether a pattern fits a name, or transformers' form of it."""
    return any(fnmatch.fnmatchcase(each, pattern) for each in (name, f"model.{name}"))


def read_format(text: str) -> FormatText:
    """Take a format apart.

    Raises:
        ConfigError: an option is unknown.
    """
    name, *words = (part.strip() for part in text.split(":"))
    bits = int(words.pop(0)) if words and words[0].isdecimal() and len(words[0]) < 4 else None
    found = FormatText(text, name, bits, tuple(words))
    found.options(default_rows=1)
    return found


def read_scheme(text: str | None) -> SchemeText:
    """Take the value of `--scheme` apart.

    Raises:
        ConfigError: a part is empty, given twice or no pattern, or an option is unknown.
    """
    if text is None:
        return SchemeText()
    plain: FormatText | None = None
    patterns: dict[str, FormatText] = {}
    for part in text.split(","):
        pattern, equals, given = (each.strip() for each in part.rpartition("="))
        if not given or (equals and not pattern):
            raise ConfigError(
                f"--scheme {brief(text)} has an empty part; give a format such as int4-group, or "
                "patterns and formats such as lm_head=codebook:6,layers.0.*=int8-channel."
            )
        if not equals:
            if plain is not None:
                raise ConfigError(
                    f"--scheme names two formats for all linear layers, {plain.text} and {given}; "
                    "keep one, or put a pattern before the other, such as layers.0.*="
                    f"{given}."
                )
            plain = _format_in(given)
        elif pattern in patterns:
            raise ConfigError(f"--scheme gives the pattern '{pattern}' twice; drop one of them.")
        else:
            patterns[pattern] = _format_in(given)
    if plain is not None and "*" in patterns:
        raise ConfigError(
            f"--scheme says what * has, so nothing is left for {plain.text}; drop one of them."
        )
    return SchemeText(plain, patterns)


def _format_in(text: str) -> FormatText:
    try:
        return read_format(text)
    except ConfigError as error:
        raise ConfigError(f"--scheme: {error}") from None


def checked_scheme(text: str) -> str:
    """Return what `--scheme` says. Raises ConfigError as `read_scheme` does."""
    read_scheme(text)
    return text


def patterns_alone(text: str | None) -> str | None:
    """Return `text` without its plain format, None if nothing is left."""
    if text is None:
        return None
    return ",".join(part for part in text.split(",") if "=" in part) or None


def plain_name(text: str | None) -> str | None:
    """Return the name of the plain format and its bits, `codebook:6`; None if there is none."""
    plain = read_scheme(text).plain
    if plain is None:
        return None
    return plain.name if plain.bits is None else f"{plain.name}:{plain.bits}"


def spelled_scheme(value: Any) -> str:
    """Return the text for a mapping of patterns to formats, or for a configuration of torchao's.

    Raises:
        ConfigError: it is neither.
        UnsupportedError: Core ML has no such format.
    """
    if not isinstance(value, Mapping):
        found = _of_torchao(value)
        if isinstance(found, str):
            return found
        value = found
    return ",".join(f"{_key(each)}={_spelled_value(each, value[each])}" for each in value)


def spelled_format(value: Any) -> str:
    """Return the text for the format that a configuration of torchao's means.

    Raises:
        ConfigError: it is none, or one of several formats.
        UnsupportedError: Core ML has no such format.
    """
    found = _of_torchao(value)
    if not isinstance(found, str):
        raise ConfigError("A token table or a head has one format; give patterns in scheme.")
    return found


def _of_torchao(value: Any) -> str | dict[str, Any]:
    """Return what torchao's object says; loads the library only for what is no text."""
    from llm_coreml.config.torchao_configs import spelled

    return spelled(value)


def _key(pattern: Any) -> str:
    if not isinstance(pattern, str) or not pattern.strip() or {",", "="} & set(pattern):
        raise ConfigError(
            f"{brief(pattern)} is no pattern of names; give a text without ',' and '=', such as "
            "'lm_head' or 'layers.0.*'."
        )
    return pattern


def _spelled_value(pattern: str, value: Any) -> str:
    """Return a format of a mapping; None leaves weights as they are, as in torchao's mappings."""
    if value is None:
        return "none"
    text = value if isinstance(value, str) else spelled_format(value)
    if {",", "="} & set(text):
        raise ConfigError(f"'{pattern}' has the format {brief(text)}; give one format.")
    return text


def _with(options: FormatOptions, word: str, text: str) -> FormatOptions:
    """Return options with one more."""
    size = _SIZE.fullmatch(word)
    if size is not None:
        count = int(size[2])
        return {
            "group": replace(options, group=count),
            "rows": replace(options, rows=count),
            "columns": replace(options, columns=count),
            "vector": replace(options, vector=count),
        }[size[1]]
    for kind in get_args(ZeroPointText):
        if word == f"zero-{kind}":
            return replace(options, zero_point=kind)
    if word not in ("scaled", "whole"):
        raise ConfigError(
            f"{brief(text)} holds {brief(word)}, which is no option of a format; they are "
            f"{_OPTIONS}."
        )
    return replace(options, scaled=True) if word == "scaled" else options
