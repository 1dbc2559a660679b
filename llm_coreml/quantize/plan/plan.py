"""From flags to one scheme per kind of matrix, refusing what cannot work before any work is done.

plan = make_plan(job, spec)                               # one format for all linear layers
plan = make_plan(job, spec, {"layers.0.mlp.down_proj": ...})    # or one for each
plan.linear.label, plan.embedding.label, plan.lm_head.label, plan.tied
plan.scheme_of("layers.0.mlp.down_proj")
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import nn

from llm_coreml.config import Job
from llm_coreml.config.values import DEFAULT_CODEBOOK_ROWS
from llm_coreml.decoder import DecoderSpec, skeleton
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
from llm_coreml.rules import Use, refused, remedy


@dataclass(frozen=True)
class QuantizationPlan:
    """Which scheme each matrix gets.

    Attributes:
        linear: The matrices of the blocks, where `exceptions` says nothing else.
        embedding: The token table, and whatever else is read before the first block.
        lm_head: The output projection.
        tied: The head is the token table, stored once.
        untied_bytes: What storing a tied table twice costs, when the two schemes or rotations
            differ.
        exceptions: Schemes of single projections, by module name: `layers.0.mlp.down_proj`.
    """

    linear: Scheme
    embedding: Scheme
    lm_head: Scheme
    tied: bool
    untied_bytes: int = 0
    exceptions: Mapping[str, Scheme] = field(default_factory=lambda: MappingProxyType({}))

    def scheme_of(self, module: str) -> Scheme:
        """Return the scheme of a linear layer or of a token table, by its name in the decoder."""
        if module == "lm_head":
            return self.lm_head
        usual = self.linear if module.startswith("layers.") else self.embedding
        return self.exceptions.get(module, usual)


def beside_blocks(spec: DecoderSpec) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield name and shape of what is read before the blocks, but for the token table."""
    for name, module in skeleton(spec).named_modules():
        if name.startswith("layers.") or name in ("embed_tokens", "lm_head"):
            continue
        if isinstance(module, (nn.Linear, nn.Embedding)):
            rows, columns = module.weight.shape
            yield name, (rows, columns)


def matrices(spec: DecoderSpec) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield name and shape of every linear weight in the blocks, as the decoder names them."""
    for name, module in skeleton(spec).layers.named_modules(prefix="layers"):
        if isinstance(module, nn.Linear):
            yield name, (module.out_features, module.in_features)


def make_plan(
    job: Job, spec: DecoderSpec, chosen: Mapping[str, Scheme] | None = None
) -> QuantizationPlan:
    """Choose the schemes and check them against every matrix of the model.

    Args:
        job: Settings.
        spec: Sizes of the model.
        chosen: Schemes of all linear layers of the blocks, where `job` leaves these open; those
            of `embed_tokens` and `lm_head` may be among them, and win.

    Raises:
        ConfigError: bits and scheme contradict each other, or a name is unknown.
        UnsupportedError: Core ML, the target or a tensor's shape does not allow it.
    """
    shapes = dict(matrices(spec))
    if chosen is None:
        linear, exceptions = linear_scheme(job), {}
    else:
        linear = _prevalent(chosen, shapes)
        exceptions = {name: chosen[name] for name in shapes if chosen[name] != linear}
    tables = chosen or {}
    embedding = tables.get("embed_tokens") or _table_scheme(job.weights.table, job, "--embedding")
    lm_head = tables.get("lm_head") or _table_scheme(
        job.weights.lm_head or job.weights.table, job, "--lm-head"
    )
    schemes = {linear, *exceptions.values()}
    calibrated = job.calibration.calibrate is not None
    if calibrated and any(isinstance(s, Unquantized) for s in schemes):
        raise ConfigError(
            "--calibrate chooses codes, and unquantized linear layers have none; drop it, or give "
            "--bits 1 to 8."
        )
    for scheme in schemes:
        if calibrated and not scheme.calibrated:
            raise ConfigError(
                f"--calibrate cannot choose the codes of '{scheme.label}'; drop it, or give "
                "integers, or a codebook without --codebook-vector and --codebook-scale."
            )
    # Mixed formats are chosen for the target; what is wrong with them are flags of their own.
    planned = chosen is not None and not job.weights.mixed
    for scheme in sorted(schemes, key=lambda scheme: scheme.label):
        _check_target(job, "--plan" if planned else "--scheme", scheme)
    _check_target(job, "--plan" if "embed_tokens" in tables else "--embedding", embedding)
    _check_target(job, "--plan" if "lm_head" in tables else "--lm-head", lm_head)
    for name, shape in shapes.items():
        exceptions.get(name, linear).check(name, shape)
    table = (spec.vocab_size, spec.hidden_size)
    embedding.check("the token table", table)
    for name, shape in beside_blocks(spec):
        embedding.check(name, shape)
    lm_head.check("the output head", table)
    # A rotated head holds the gain of the last norm, which the table must not.
    same = embedding == lm_head and job.weights.rotate not in ("residual", "both")
    tied = spec.tie_word_embeddings and same
    cost = 0
    if spec.tie_word_embeddings and not tied:
        cost = round(lm_head.stored_bits(table) / 8)
    return QuantizationPlan(linear, embedding, lm_head, tied, cost, MappingProxyType(exceptions))


def _prevalent(chosen: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]]) -> Scheme:
    """Return the scheme that most weights have; of several the first."""
    weights: Counter[Scheme] = Counter()
    for name, (rows, columns) in shapes.items():
        weights[chosen[name]] += rows * columns
    return weights.most_common(1)[0][0]


def use_of(job: Job, scheme: Scheme, flag: str = "--scheme") -> Use:
    """Return what the rules are held against when a matrix is stored by what `flag` chose."""
    return Use(job.target, job.opset, scheme.traits, scheme.minimum_os, flag)


def _check_target(job: Job, flag: str, scheme: Scheme) -> None:
    """Refuse a scheme that the target, or the oldest system, is known not to take."""
    use = use_of(job, scheme, flag)
    for rule in [] if job.force else refused(use):
        raise UnsupportedError(
            f"{rule.refusal(use, job.minimum_os)}. Use {remedy(rule, [use])}, or --force to export "
            "it all the same."
        )


def linear_scheme(job: Job) -> Scheme:
    """Resolve `--bits`, `--scheme` and the target's default into one scheme."""
    name, bits = job.weights.scheme, job.weights.bits
    if isinstance(bits, float):
        raise ValueError("mixed bits are no single scheme")
    if name is None:
        name = _scheme_for_bits(bits, job.target.default_scheme)
    if name not in SCHEMES:
        raise ConfigError(
            f"There is no scheme '{name}'; the schemes are {', '.join(SCHEMES)}."
            + nearest(name, SCHEMES)
        )
    return _build(name, bits, job, "--bits")


def _scheme_for_bits(bits: int | None, default: str) -> str:
    if bits is None or bits == 4:
        return default
    if bits == 8:
        return "int8-channel"
    return "none" if bits == 16 else "codebook"


def _table_scheme(text: str, job: Job, flag: str) -> Scheme:
    """Parse `--embedding` or `--lm-head`: a scheme name, for codebooks with `:bits`."""
    name, _, suffix = text.partition(":")
    if name not in SCHEMES or (suffix and not suffix.isdigit()):
        raise ConfigError(
            f"{flag} {text} is not known; give one of {', '.join(SCHEMES)}, codebooks as "
            "codebook:4." + nearest(name, SCHEMES)
        )
    return _build(name, int(suffix) if suffix else None, job, flag)


def _build(name: str, bits: int | None, job: Job, flag: str) -> Scheme:
    weights, full = job.weights, job.precision.bits
    if name == "codebook":
        bits = 4 if bits is None else bits
        if bits not in CODEBOOK_BITS:
            raise UnsupportedError(
                f"{flag} asks for a {bits} bit codebook; Core ML holds 1, 2, 3, 4, 6 and 8 bits."
            )
        rows = weights.codebook_rows
        if rows is None and weights.codebook_columns is None:
            rows = DEFAULT_CODEBOOK_ROWS
        columns, vector = weights.codebook_columns, weights.codebook_vector
        return Codebook(bits, rows, full, columns, vector, weights.codebook_scale)
    schemes: dict[str, Scheme] = {
        "int4-group": IntGroup(4, weights.group_size, full, weights.zero_point),
        "int4-channel": IntChannel(4, full, weights.zero_point),
        "int8-group": IntGroup(8, weights.group_size, full, weights.zero_point),
        "int8-channel": IntChannel(8, full, weights.zero_point),
        "int2-group": IntGroup(2, weights.group_size, full, weights.zero_point),
        "int3-group": IntGroup(3, weights.group_size, full, weights.zero_point),
        "int6-group": IntGroup(6, weights.group_size, full, weights.zero_point),
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
