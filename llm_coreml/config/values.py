"""The rules that single values keep, and how texts are read as values."""

from __future__ import annotations

import re

from llm_coreml.config.setting import brief
from llm_coreml.errors import ConfigError, UnsupportedError, nearest
from llm_coreml.systems import opset_of
from llm_coreml.targets import get_target

WHOLE_BITS = (1, 2, 3, 4, 6, 8, 16)
# State dimensions that are no multiple of 32 are refused by the Neural Engine compiler
# (coremltools issue 2631).
CONTEXT_MULTIPLE = 32
# Positions and sizes are int32 in programs; bytes of files are int64.
MOST_POSITIONS = 2**31 - 1
MOST_BYTES = 2**63 - 1
MOST_STEPS = 1_000_000
# Beyond it, more bits cost less than more of a product.
MOST_RANK = 256
# More weights are cut into partitions, whether or not that is asked for.
MOST_WEIGHTS = 2_000_000_000
# What can have a partition of its own.
SPLIT = ("embedding", "head")
# What ExecuTorch's kernels can run in the place of Core ML, and all that decoders are made of.
SKIP_TABLE = "aten.embedding.default"
SKIP_HEAD = "lm_head:aten.linear.default"
SKIPPED = (SKIP_TABLE, SKIP_HEAD)
OPERATIONS = frozenset(
    f"aten.{name}"
    for name in (
        *("_softmax.default", "_to_copy.default", "abs.default", "add.tensor", "amax.default"),
        *("arange.default", "bmm.default", "cat.default", "clamp.default", "div.tensor"),
        *("embedding.default", "expand_copy.default", "gelu.default", "gt.tensor", "le.tensor"),
        *("index_select.default", "linear.default", "lt.scalar", "matmul.default"),
        *("maximum.default", "mean.dim", "minimum.default", "mul.tensor", "neg.default"),
        *("permute_copy.default", "pow.tensor_scalar", "relu.default", "rsqrt.default"),
        *("scaled_dot_product_attention.default", "select_copy.int", "sigmoid.default"),
        *("silu.default", "slice_copy.tensor", "softmax.int", "split_with_sizes_copy.default"),
        *("squeeze_copy.dims", "sub.tensor", "sum.dim_intlist", "tanh.default"),
        *("unsqueeze_copy.default", "view_copy.default"),
    )
)
# What None comes to.
DEFAULT_CODEBOOK_ROWS = 16
DEFAULT_CONTEXT = 2048
DEFAULT_TABLE = "int8-channel"
DEFAULT_SEQ_LENGTHS = (1, 8, 64, 512)
_RANGE = re.compile(r"[0-9]{1,10}\.\.[0-9]{1,10}")
_FUNCTION = re.compile(r"[a-z][a-z0-9_]{0,30}:[1-9][0-9]{0,9}")
# What the names of a program's constant methods begin with, which lie beside its functions.
_CONSTANT = ("get_", "use_", "enable_")
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


def read_lengths(text: str) -> tuple[int, ...] | str:
    """Return the numbers of a list such as `1,8,64`, or the text of a range such as `1..512`.

    Raises:
        ValueError: it is neither.
    """
    if _RANGE.fullmatch(text.strip()):
        return text.strip()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"'{text}' is no list of numbers such as 1,8,64, and no range such as 1..512."
        ) from None


def range_of(text: str) -> tuple[int, int]:
    """Return the first and the last number of a range that `read_lengths` gave."""
    first, last = text.split("..")
    return int(first), int(last)


def read_names(text: str) -> tuple[str, ...]:
    """Return the names of a list such as `a,b`."""
    return tuple(part.strip() for part in text.split(","))


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


def checked_lengths(lengths: tuple[int, ...] | str) -> tuple[int, ...] | str:
    """Return chunk lengths, or a range of them.

    Raises:
        ConfigError: a range that begins elsewhere than at 1 or ends there, several numbers that are
            not different or lack 1, or a single one that is no length.
    """
    if isinstance(lengths, str):
        first, last = range_of(lengths)
        if first != 1 or not 1 < last <= MOST_POSITIONS:
            raise ConfigError(
                f"--seq-lengths {lengths} must be a range from 1, for single tokens, to more, such "
                "as 1..512."
            )
        return f"{first}..{last}"
    if 1 not in lengths and len(lengths) != 1:
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


def functions_of(text: str) -> dict[str, int]:
    """Return the length of each function that `checked_functions` has checked, by name."""
    pairs = (part.split(":") for part in text.split(","))
    return {name: int(length) for name, length in pairs}


def checked_skips(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the operations that Core ML is not to run.

    Raises:
        ConfigError: no decoder is made of such an operation, or none is named.
        UnsupportedError: it is in the midst of a Core ML program.
    """
    if not names:
        raise ConfigError(
            f"--skip-ops names nothing; give {' or '.join(SKIPPED)}, or leave it out."
        )
    for name in names:
        if name not in OPERATIONS and name not in SKIPPED:
            raise ConfigError(
                f"--skip-ops names {brief(name)}, and no decoder has such an operation."
                f"{nearest(name, [*OPERATIONS, *SKIPPED])}"
            )
        if name not in SKIPPED:
            raise UnsupportedError(
                f"--skip-ops {name}: what can be skipped stands at the ends of a program, "
                f"{SKIP_TABLE}, the token table, and {SKIP_HEAD}, the head's matrix. Layers are "
                "converted as a whole; to leave an operation in their midst out would cut each of "
                "them in pieces. Name one of these, or both."
            )
    return tuple(name for name in SKIPPED if name in names)


def checked_split(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return what has a partition of its own, in the order in which it runs.

    Raises:
        ConfigError: there is no such part, or none is named.
    """
    for name in names:
        if name not in SPLIT:
            raise ConfigError(
                f"--split names {brief(name)}; what can have a partition of its own is "
                f"{' and '.join(SPLIT)}.{nearest(name, SPLIT)}"
            )
    if not names:
        raise ConfigError(f"--split names nothing; give {', '.join(SPLIT)}, or leave it out.")
    return tuple(name for name in SPLIT if name in names)


def recovery_rank(text: str) -> int:
    """Return the rank that `lora:RANK` gives.

    Raises:
        ConfigError: it is none.
    """
    kind, _, digits = text.partition(":")
    rank = int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 5 else 0
    if kind != "lora" or not 1 <= rank <= MOST_RANK:
        raise ConfigError(
            f"--recover is {brief(text)}; give lora:RANK, with a rank from 1 to {MOST_RANK}."
        )
    return rank


def checked_functions(text: str) -> str:
    """Return functions as they are kept.

    Raises:
        ConfigError: they are no names with lengths, two have a name or a length, or none reads
            single tokens.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(_FUNCTION.fullmatch(part) for part in parts):
        raise ConfigError(
            f"--functions {brief(text)} is no list of names and lengths such as "
            "prefill:512,decode:1."
        )
    lengths = functions_of(",".join(parts))
    taken = [name for name in lengths if name.startswith(_CONSTANT)]
    if taken:
        raise ConfigError(
            f"--functions names '{taken[0]}', and names that begin with {', '.join(_CONSTANT)} are "
            "those of constants that runners read; give another, such as prefill."
        )
    if len(lengths) < len(parts) or len(set(lengths.values())) < len(parts):
        raise ConfigError(f"--functions {text} must have different names and different lengths.")
    if len(parts) < 2 or 1 not in lengths.values():
        raise ConfigError(
            f"--functions {text} must be several, one of them of length 1, without which no single "
            "token can be generated: prefill:512,decode:1."
        )
    return ",".join(f"{name}:{length}" for name, length in lengths.items())


def checked_passes(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return names of passes: all that are to run, or those to leave out, each with a hyphen.

    Raises:
        ConfigError: some of each, none, or one twice.
    """
    left_out = [name for name in names if name.startswith("-")]
    if left_out and len(left_out) < len(names):
        raise ConfigError(
            f"--passes {brief(','.join(names))} names passes to run and passes to leave out; give "
            "either all that are to run, or -NAME of those that are not."
        )
    if not names or not all(name.removeprefix("-") for name in names):
        raise ConfigError("--passes holds no name; give one such as common::fuse_gelu_exact.")
    if wrong := [name for name in names if name.startswith("--")]:
        raise ConfigError(
            f"--passes holds {brief(wrong[0])}; one hyphen leaves a pass out: "
            f"{brief('-' + wrong[0].lstrip('-'))}."
        )
    if twice := [name for at, name in enumerate(names) if name in names[:at]]:
        raise ConfigError(f"--passes names {brief(twice[0])} twice; name each pass once.")
    return names


# What ExecuTorch's Core ML backend is told by settings of ours.
_SPEC_FLAGS = {
    "compute_units": "--target",
    "min_deployment_target": "--minimum-os",
    "model_compute_precision": "--compute-precision",
    "model_type": "--model-type",
    "pass_pipeline": "--passes",
    "enumerated_shapes": "--seq-lengths",
}
_REQUANTIZER = "op_linear_quantizer_config"


def checked_specs(specs: tuple[str, ...]) -> tuple[str, ...]:
    """Return compile specs, each a key and a value.

    Raises:
        ConfigError: one has no key, a key is there twice, or another setting decides it.
    """
    keys: set[str] = set()
    for spec in specs:
        key, mark, _ = spec.partition("=")
        if not mark or not re.fullmatch(r"\w+", key) or key in keys:
            raise ConfigError(
                f"--compile-specs holds {brief(spec)}; give KEY=VALUE, each key once, and its name "
                "of letters, digits and underscores."
            )
        if key in _SPEC_FLAGS:
            raise ConfigError(
                f"--compile-specs {key} is decided by {_SPEC_FLAGS[key]}, which the graph, the "
                "checks and the manifest follow; give that."
            )
        if key == _REQUANTIZER:
            raise ConfigError(
                f"--compile-specs {key} would quantize once more what is left in fp16 of the "
                "converted program, after the model that the file is held against was made; "
                "--scheme int8-channel, int4-channel or int4-group stores what it would, verified."
            )
        keys.add(key)
    return specs


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
