"""The rules that single values keep, and how texts are read as values."""

from __future__ import annotations

import re

from llm_coreml.config.setting import brief
from llm_coreml.errors import ConfigError
from llm_coreml.targets import get_target, opset_of

WHOLE_BITS = (1, 2, 3, 4, 6, 8, 16)
# State dimensions that are no multiple of 32 are refused by the Neural Engine compiler
# (coremltools issue 2631).
CONTEXT_MULTIPLE = 32
# Positions and sizes are int32 in programs; bytes of files are int64.
MOST_POSITIONS = 2**31 - 1
MOST_BYTES = 2**63 - 1
MOST_STEPS = 1_000_000
# What None comes to.
DEFAULT_CODEBOOK_ROWS = 16
DEFAULT_CONTEXT = 2048
DEFAULT_TABLE = "int8-channel"
DEFAULT_SEQ_LENGTHS = (1, 8, 64, 512)
_UNITS = {
    "": 1,
    **{letter: 1000 ** (power + 1) for power, letter in enumerate("kmgt")},
    **{f"{letter}i": 1024 ** (power + 1) for power, letter in enumerate("kmgt")},
}


def read_bytes(text: str) -> int:
    """Return the bytes that a word such as `4GB`, `512MiB` or `4000000` means.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) ?([kmgt]i?)?b?", text.strip().lower())
    if found is None:
        raise ValueError(f"'{text}' is no number of bytes such as 4GB or 512MiB.")
    return int(float(found[1]) * _UNITS[found[2] or ""])


def read_lengths(text: str) -> tuple[int, ...]:
    """Return the numbers of a list such as `1,8,64`.

    Raises:
        ValueError: it is none.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"'{text}' is no list of numbers such as 1,8,64.") from None


def checked_count(name: str, value: object, least: int = 1, most: int = MOST_POSITIONS) -> int:
    """Return a count that a flag or an argument gives.

    Args:
        name: Of the flag or argument.
        value: What was given.
        least: The smallest that has a meaning.
        most: The largest.

    Raises:
        ConfigError: it is no whole number, or out of this range.
    """
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return value
    raise ConfigError(
        f"{name} is {brief(value)}; it must be a whole number from {least} to {most}."
    )


def checked_bits(bits: float) -> float:
    """Return whole bits as an int; fractions are held against a model's formats later.

    Raises:
        ConfigError: Core ML has no such weights.
    """
    if bits in WHOLE_BITS:
        return int(bits)
    if not 1 < bits < 16 or bits == int(bits):  # also where it is NaN
        given = brief(bits) if isinstance(bits, int) else f"{bits:g}"
        raise ConfigError(
            f"--bits is {given}; Core ML holds weights of 1, 2, 3, 4, 6, 8 and 16 bits."
        )
    return bits


def takes_bits(scheme: str, bits: float) -> bool:
    """Return whether a weight format, by its name, can be had with as many whole bits."""
    if scheme == "none":
        return bits == 16
    own = re.search(r"\d+", scheme)
    return bits != 16 if own is None else bits == int(own[0])


def checked_context(context: int) -> int:
    """Return positions of a cache. Raises ConfigError unless they are a multiple of 32."""
    if context < 1 or context % CONTEXT_MULTIPLE:
        below = max(CONTEXT_MULTIPLE, context - context % CONTEXT_MULTIPLE)
        raise ConfigError(
            f"--context is {context}; it must be a multiple of {CONTEXT_MULTIPLE}, such as {below}."
        )
    return context


def checked_lengths(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Return chunk lengths. Raises ConfigError unless they are different and 1 is among them."""
    if 1 not in lengths:
        raise ConfigError(
            f"--seq-lengths {','.join(map(str, lengths))} lacks 1, without which no single token "
            "can be generated; add it."
        )
    if len(set(lengths)) != len(lengths) or min(lengths) < 1:
        raise ConfigError(
            f"--seq-lengths {','.join(map(str, lengths))} must be different numbers of at least 1."
        )
    if len(lengths) > 128:
        raise ConfigError(f"--seq-lengths holds {len(lengths)} lengths; Core ML allows 128.")
    return lengths


def checked_target(name: str) -> str:
    """Return a target's name. Raises ConfigError if there is no such target."""
    return get_target(name).name


def checked_system(name: str) -> str:
    """Return an operating system's name.

    Raises:
        ConfigError: there is no such system.
        UnsupportedError: it is too old.
    """
    opset_of(name)
    return name
