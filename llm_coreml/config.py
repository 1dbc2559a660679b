"""What an export is asked to do: one frozen object from the command line to the manifest.

config = ExportConfig(bits=4, target="gpu", context=2048)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from llm_coreml.errors import ConfigError, nearest
from llm_coreml.targets import get_target, opset_of

DEFAULT_SEQ_LENGTHS = (1, 8, 64, 512)
DEFAULT_CONTEXT = 2048
DEFAULT_CODEBOOK_ROWS = 16
DEFAULT_CALIBRATION_TOKENS = 16384
# Chosen by a plan, for every matrix.
_FORMAT_FLAGS = (
    "group_size",
    "zero_point",
    "codebook_rows",
    "codebook_columns",
    "codebook_vector",
    "codebook_scale",
    "embedding",
)
Rotate = Literal["none", "residual", "heads", "both"]
WHOLE_BITS = (1, 2, 3, 4, 6, 8, 16)
# State dimensions that are no multiple of 32 are refused by the Neural Engine compiler
# (coremltools issue 2631).
CONTEXT_MULTIPLE = 32


@dataclass(frozen=True)
class ExportConfig:
    """Every setting of an export.

    Attributes:
        bits: Bits per weight of the linear layers; None takes 4. A fraction is the most that mixed
            formats may take on average over the blocks, scales and tables included.
        size: Bytes that the `.pte` may have, with formats mixed to fit; None sets no limit.
        plan: File with a scheme for every matrix: an earlier export's manifest, or its plan alone.
        scheme: Weight format; None takes the target's.
        group_size: Inputs per scale of `int4-group` and other groups of integers.
        zero_point: What integer formats subtract from a code before it is scaled: nothing, an
            integer of the codes' type or a float, one for every scale.
        codebook_rows: Output rows per table of `codebook`; None takes 16, or all of them where
            `codebook_columns` is given.
        codebook_columns: Inputs per table of `codebook`; None takes all.
        codebook_vector: Rows that an entry of a table has a weight for, 1, 2 or 4.
        codebook_scale: Give each row of `codebook` a factor of its own.
        embedding: Scheme of the token table.
        lm_head: Scheme of the output head; None follows `embedding`.
        rotate: What to rotate by merged Hadamard matrices before quantization: the `residual`
            stream, the values of the attention `heads`, `both` or `none`.
        calibrate: Text on which the linear layers are calibrated: `bundled` or a UTF-8 file; None
            rounds to nearest.
        calibration_tokens: Tokens of that text to read.
        tune: Steps in which scales, tables and norms are tuned on that text, for the logits'
            divergence from the original; 0 leaves them as calibrated.
        target: Compute unit, see `targets.TARGETS`.
        minimum_os: Oldest system that must run the artifact.
        compute_precision: Precision of activations.
        logits: `last` row of each chunk, or `all` rows.
        context: Positions of the KV cache; None takes the smaller of 2048 and the model's own.
        seq_lengths: Chunk lengths that the program accepts; None takes 1, 8, 64, 512.
        backend: `coreml`, or `xnnpack` for a twin that runs on Linux.
        allow_inexact: Take a quantized checkpoint whose weights Core ML cannot hold exactly.
        force: Export a scheme that the target is known to refuse.

    Raises:
        ConfigError: a value breaks a rule of its own; rules between model and flags are checked
            where both are known.
        UnsupportedError: `minimum_os` is too old.
    """

    bits: float | None = None
    size: int | None = None
    plan: str | None = None
    scheme: str | None = None
    group_size: int = 32
    zero_point: Literal["none", "int", "float"] = "none"
    codebook_rows: int | None = None
    codebook_columns: int | None = None
    codebook_vector: int = 1
    codebook_scale: bool = False
    embedding: str = "int8-channel"
    lm_head: str | None = None
    rotate: Rotate = "none"
    calibrate: str | None = None
    calibration_tokens: int = DEFAULT_CALIBRATION_TOKENS
    tune: int = 0
    target: str = "gpu"
    minimum_os: str = "iOS18"
    compute_precision: Literal["fp16", "fp32"] = "fp16"
    logits: Literal["last", "all"] = "last"
    context: int | None = None
    seq_lengths: tuple[int, ...] | None = None
    backend: Literal["coreml", "xnnpack"] = "coreml"
    allow_inexact: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        get_target(self.target)
        opset_of(self.minimum_os)
        for name, allowed in (
            ("zero_point", ("none", "int", "float")),
            ("rotate", get_args(Rotate)),
            ("compute_precision", ("fp16", "fp32")),
            ("logits", ("last", "all")),
            ("backend", ("coreml", "xnnpack")),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"{name} is '{value}'; it must be {' or '.join(allowed)}.")
        if self.bits is not None:
            object.__setattr__(self, "bits", _checked_bits(self.bits))
        self._check_choice()
        if self.calibration_tokens < 1:
            raise ConfigError(
                f"--calibration-tokens is {self.calibration_tokens}; it must be at least 1, and "
                "some thousands to be of use."
            )
        if self.tune < 0 or (self.tune and self.calibrate is None):
            raise ConfigError(
                f"--tune is {self.tune}; it must be a number of steps, some hundreds, and needs a "
                "text to read: --calibrate."
            )
        if self.context is not None:
            _check_context(self.context)
        if self.seq_lengths is not None:
            object.__setattr__(self, "seq_lengths", tuple(self.seq_lengths))
            _check_lengths(tuple(self.seq_lengths))

    @property
    def mixed(self) -> bool:
        """Whether formats are to be chosen by what they cost the model."""
        return self.size is not None or isinstance(self.bits, float)

    def _check_choice(self) -> None:
        """Refuse two settings that both decide the format of the linear layers."""
        if self.size is not None and self.size < 1:
            raise ConfigError(f"--size is {self.size}; give bytes, such as 600MB.")
        decided = "--plan" if self.plan is not None else "--size" if self.size is not None else None
        others: dict[str, object] = {"--scheme": self.scheme}
        if decided is not None:
            others["--bits"] = self.bits
        elif self.mixed:
            decided = f"--bits {self.bits}"
        if decided == "--plan":
            others |= {"--size": self.size, "--lm-head": self.lm_head}
            for field in fields(self):
                value = getattr(self, field.name)
                if field.name in _FORMAT_FLAGS and value != field.default:
                    others["--" + field.name.replace("_", "-")] = value
        for flag, value in others.items():
            if decided is not None and value is not None:
                raise ConfigError(f"{decided} decides what {flag} {value} would; drop one of them.")
        if self.size is not None and self.backend == "xnnpack":
            raise ConfigError(
                "--size counts quantized weights, and --backend xnnpack stores fp32; give --bits."
            )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ExportConfig:
        """Build a config from `to_json` output.

        Raises:
            ConfigError: an unknown key.
        """
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"There is no setting '{key}'.{nearest(key, known)}")
        return cls(**values)


def _checked_bits(bits: float) -> float:
    """Return whole bits as an int; fractions are held against a model's formats later."""
    if bits in WHOLE_BITS:
        return int(bits)
    if not 1 < bits < 16 or bits == int(bits):  # also where it is NaN
        raise ConfigError(
            f"--bits is {bits:g}; Core ML holds weights of 1, 2, 3, 4, 6, 8 and 16 bits."
        )
    return bits


@dataclass(frozen=True)
class Shapes:
    """The sequence shapes of one artifact.

    Attributes:
        context: Positions of the KV cache.
        seq_lengths: Accepted chunk lengths, ascending, beginning with 1.
    """

    context: int
    seq_lengths: tuple[int, ...]


def resolve_shapes(config: ExportConfig, max_position_embeddings: int) -> Shapes:
    """Fill in the defaults of context and lengths for a model, and check them against it.

    Raises:
        ConfigError: a context beyond the model's, or a length beyond the context.
    """
    longest = max_position_embeddings - max_position_embeddings % CONTEXT_MULTIPLE
    context = config.context or min(DEFAULT_CONTEXT, longest)
    if context > max_position_embeddings:
        raise ConfigError(
            f"--context {context} is longer than the {max_position_embeddings} positions that "
            f"the model was trained for; use {longest} or less."
        )
    if context < CONTEXT_MULTIPLE:
        raise ConfigError(
            f"The model has {max_position_embeddings} positions; the KV cache needs "
            f"{CONTEXT_MULTIPLE} at least."
        )
    if config.seq_lengths is None:
        return Shapes(context, tuple(n for n in DEFAULT_SEQ_LENGTHS if n <= context))
    for length in config.seq_lengths:
        if length > context:
            raise ConfigError(
                f"--seq-lengths holds {length}, which is longer than the context of {context}; "
                "drop it or raise --context."
            )
    return Shapes(context, tuple(sorted(config.seq_lengths)))


def _check_context(context: int) -> None:
    if context < 1 or context % CONTEXT_MULTIPLE:
        below = max(CONTEXT_MULTIPLE, context - context % CONTEXT_MULTIPLE)
        raise ConfigError(
            f"--context is {context}; it must be a multiple of {CONTEXT_MULTIPLE}, such as {below}."
        )


def _check_lengths(lengths: tuple[int, ...]) -> None:
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
