"""The schemes that settings name: for all linear layers, for tables, for what patterns fit.

linear_scheme(job)                                      # IntGroup(4, 32)
table_scheme("codebook:6:rows8", job, "--lm-head")      # Codebook(6, 8)
named_schemes(job, names)["lm_head"].scheme
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llm_coreml.config import Job
from llm_coreml.config.scheme_text import (
    FormatOptions,
    FormatText,
    SchemeText,
    fits,
    read_format,
    read_scheme,
)
from llm_coreml.config.values import DEFAULT_CODEBOOK_ROWS
from llm_coreml.errors import ConfigError, UnsupportedError, nearest
from llm_coreml.quantize.formats.schemes import (
    CODEBOOK_BITS,
    SCHEMES,
    Codebook,
    IntChannel,
    IntGroup,
    Mxfp4,
    Scheme,
    Unquantized,
)

_OF_CODEBOOKS = ("rows", "columns", "whole", "vector", "scaled")


@dataclass(frozen=True)
class Named:
    """A scheme that a pattern chose.

    Attributes:
        scheme: The scheme.
        flag: What chose it, before the format: `--scheme lm_head=`.
    """

    scheme: Scheme
    flag: str


def linear_scheme(job: Job) -> Scheme:
    """Resolve `--bits`, `--scheme`, `--pt2e` and the target's default into one scheme."""
    if job.weights.pt2e != "none":
        return IntChannel(8, job.precision.bits)
    plain, bits = read_scheme(job.weights.scheme).plain, job.weights.bits
    if bits is not None and not float(bits).is_integer():
        raise ValueError("mixed bits are no single scheme")
    if plain is None:
        plain = FormatText("", _scheme_for_bits(bits, job.target.default_scheme), None, ())
    if plain.name not in SCHEMES:
        raise ConfigError(
            f"There is no scheme '{plain.name}'; the schemes are {', '.join(SCHEMES)}."
            + nearest(plain.name, SCHEMES)
        )
    if bits is not None and plain.bits not in (None, bits):
        raise ConfigError(
            f"--bits is {bits}, and --scheme is {plain.text}; each says how many bits the "
            "weights have, so drop one."
        )
    own, flag = (bits, "--bits") if plain.bits is None else (plain.bits, "--scheme")
    return _build(plain, own, job, flag)


def table_scheme(text: str, job: Job, flag: str) -> Scheme:
    """Return what `--embedding` or `--lm-head` names: a scheme, its bits, its options.

    Raises:
        ConfigError: there is no such scheme, or it has no such option.
        UnsupportedError: Core ML does not have it with as many bits.
    """
    try:
        form = read_format(text)
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error}") from None
    return _named(form, job, f"{flag} ")


def named_schemes(job: Job, names: Iterable[str]) -> dict[str, Named]:
    """Return the schemes of matrices that patterns of `--scheme` fit, the first one first.

    Args:
        job: Settings.
        names: All matrices, as the decoder names them.

    Raises:
        ConfigError: a pattern decides nothing, or a format is unknown.
        UnsupportedError: Core ML does not have a format.
    """
    text, known = read_scheme(job.weights.scheme), list(names)
    schemes = {
        pattern: _named(form, job, f"--scheme {pattern}=")
        for pattern, form in text.patterns.items()
    }
    found = {name: text.pattern_of(name) for name in known}
    for pattern in schemes:
        if pattern not in found.values():
            raise ConfigError(_why_nothing(pattern, text, known))
    return {
        name: Named(schemes[pattern], f"--scheme {pattern}=")
        for name, pattern in found.items()
        if pattern is not None
    }


def _why_nothing(pattern: str, text: SchemeText, names: list[str]) -> str:
    """Say why a pattern decides nothing, and what would help."""
    fitting = [name for name in names if fits(pattern, name)]
    if fitting:
        earlier = text.pattern_of(fitting[0])
        return (
            f"--scheme: '{pattern}' decides nothing, since '{earlier}' stands before it and the "
            "first pattern that fits a matrix decides; put the narrower one first."
        )
    plain = pattern.removeprefix("model.").removesuffix(".weight")
    if any(name.startswith(f"{plain}.") for name in names):
        advice = f" Did you mean '{plain}.*'?"
    else:
        advice = nearest(plain, names)
    blocks = [name for name in names if name.startswith("layers.")]
    return (
        f"--scheme: no matrix fits '{pattern}'; their names are embed_tokens, {blocks[0]} to "
        f"{blocks[-1]} and lm_head.{advice}"
    )


def _scheme_for_bits(bits: float | None, default: str) -> str:
    if bits is None or bits == 4:
        return default
    if bits == 8:
        return "int8-channel"
    return "none" if bits == 16 else "codebook"


def _named(form: FormatText, job: Job, flag: str) -> Scheme:
    """Build a format that its name, bits and options say alone; `flag` is what stands before."""
    if form.name not in SCHEMES:
        raise ConfigError(
            f"{flag}{form.text} is not known; give one of {', '.join(SCHEMES)}, codebooks as "
            "codebook:4." + nearest(form.name, SCHEMES)
        )
    return _build(form, form.bits, job, flag.rstrip())


def _build(form: FormatText, bits: float | None, job: Job, flag: str) -> Scheme:
    name, full = form.name, job.precision.bits
    options = _options(form, job)
    if name == "codebook":
        bits = 4 if bits is None else bits
        if bits not in CODEBOOK_BITS:
            raise UnsupportedError(
                f"{flag} asks for a {bits} bit codebook; Core ML holds 1, 2, 3, 4, 6 and 8 bits."
            )
        rows, columns = options.rows, options.columns
        return Codebook(int(bits), rows, full, columns, options.vector, options.scaled)
    schemes: dict[str, Scheme] = {
        "int4-group": IntGroup(4, options.group, full, options.zero_point),
        "int4-channel": IntChannel(4, full, options.zero_point),
        "int8-group": IntGroup(8, options.group, full, options.zero_point),
        "int8-channel": IntChannel(8, full, options.zero_point),
        "int2-group": IntGroup(2, options.group, full, options.zero_point),
        "int3-group": IntGroup(3, options.group, full, options.zero_point),
        "int6-group": IntGroup(6, options.group, full, options.zero_point),
        "mxfp4": Mxfp4(4, full),
        "none": Unquantized(full),
    }
    scheme = schemes[name]
    if bits is not None and bits != scheme.bits and name != "none":
        raise UnsupportedError(
            f"{flag} asks for {bits} bit {name}; Core ML holds integer weights of 4 and 8 bits "
            f"only. Use --scheme codebook for 1, 2, 3, 4, 6 or 8 bits."
        )
    if name == "none" and bits not in (None, 16):
        raise ConfigError(f"--scheme none keeps 16 bits, but --bits is {bits}; drop one of them.")
    return scheme


def _options(form: FormatText, job: Job) -> FormatOptions:
    """Return a format's own options, or those that flags give to all formats."""
    own, weights = form.options(DEFAULT_CODEBOOK_ROWS), job.weights
    if own is not None:
        _refuse_strange(form)
        return own
    rows = weights.codebook_rows
    if rows is None and weights.codebook_columns is None:
        rows = DEFAULT_CODEBOOK_ROWS
    return FormatOptions(
        weights.group_size,
        weights.zero_point,
        rows,
        weights.codebook_columns,
        weights.codebook_vector,
        weights.codebook_scale,
    )


def _refuse_strange(form: FormatText) -> None:
    """Raise ConfigError for an option that the format does not have."""
    allowed: tuple[str, ...] = ()
    if form.name == "codebook":
        allowed = _OF_CODEBOOKS
    elif form.name.startswith("int"):
        allowed = ("zero", "group") if form.name.endswith("group") else ("zero",)
    for word in form.words:
        if not word.startswith(allowed or ("-",)):
            has = ", ".join(allowed) or "none"
            raise ConfigError(
                f"{form.text}: {form.name} has no option '{word}'; its options are {has}."
            )
