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
from llm_coreml.config.scheme_text import read_scheme
from llm_coreml.decoder import DecoderSpec, skeleton
from llm_coreml.errors import ConfigError, UnsupportedError
from llm_coreml.quantize.formats.schemes import Scheme, Unquantized
from llm_coreml.quantize.plan.flags import Named, linear_scheme, named_schemes, table_scheme
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
        exceptions: Schemes of single matrices, by module name: `layers.0.mlp.down_proj`.
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


def recovery_bits(rank: int, shape: tuple[int, int]) -> int:
    """Return what a product of a rank takes beside a matrix of a shape, see `low_rank`."""
    return 16 * min(rank, *shape) * sum(shape)


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
    named = schemes_by_pattern(job, spec)
    given = {**(chosen or {}), **{name: each.scheme for name, each in named.items()}}
    plain = linear_scheme(job) if chosen is None else None
    linears = {name: given[name] if plain is None else given.get(name, plain) for name in shapes}
    linear = plain if plain is not None and not named else _prevalent(linears, shapes)
    exceptions = {name: scheme for name, scheme in linears.items() if scheme != linear}
    _check_calibration(job, {linear, *exceptions.values()})
    embedding, lm_head, beside = _tables(job, spec, given, named)
    # Mixed formats are chosen for the target; what is wrong with them are flags of their own.
    planned = chosen is not None and not job.weights.mixed
    flags = {name: "--plan" if planned else "--scheme" for name in shapes}
    flags |= {name: "--plan" if name in given else "--embedding" for name in beside}
    flags["embed_tokens"] = "--plan" if "embed_tokens" in given else "--embedding"
    flags["lm_head"] = "--plan" if "lm_head" in given else "--lm-head"
    flags |= {name: each.flag for name, each in named.items()}
    exceptions |= {name: scheme for name, scheme in beside.items() if scheme != embedding}
    table = (spec.vocab_size, spec.hidden_size)
    # A rotated head holds the gain of the last norm, which the table must not.
    same = embedding == lm_head and job.weights.rotate not in ("residual", "both")
    tied = spec.tie_word_embeddings and same
    cost = 0
    if spec.tie_word_embeddings and not tied:
        cost = round(lm_head.stored_bits(table) / 8)
    plan = QuantizationPlan(linear, embedding, lm_head, tied, cost, MappingProxyType(exceptions))
    _check_targets(job, plan, flags)
    for name, shape in shapes.items():
        plan.scheme_of(name).check(name, shape)
    embedding.check("the token table", table)
    for name, shape in beside_blocks(spec):
        plan.scheme_of(name).check(name, shape)
    lm_head.check("the output head", table)
    return plan


def schemes_by_pattern(job: Job, spec: DecoderSpec) -> dict[str, Named]:
    """Return the schemes of matrices that patterns of `--scheme` fit, by the decoder's names.

    Raises:
        ConfigError: a pattern decides nothing, or a format is unknown.
        UnsupportedError: Core ML does not have a format.
    """
    if not read_scheme(job.weights.scheme).patterns:
        return {}
    blocks, beside = dict(matrices(spec)), dict(beside_blocks(spec))
    return named_schemes(job, ["embed_tokens", *beside, *blocks, "lm_head"])


def _tables(
    job: Job, spec: DecoderSpec, given: Mapping[str, Scheme], named: Mapping[str, Named]
) -> tuple[Scheme, Scheme, dict[str, Scheme]]:
    """Return the schemes of token table and head, and of what else is read before the blocks."""
    usual = table_scheme(job.weights.table, job, "--embedding")
    embedding = given.get("embed_tokens", usual)
    head = job.weights.lm_head
    # A pattern means what it fits alone, and a tied head with it, which is the same table; else
    # all of these are stored as the token table is.
    others = usual if "embed_tokens" in named else embedding
    untold = embedding if spec.tie_word_embeddings else others
    lm_head = untold if head is None else table_scheme(head, job, "--lm-head")
    beside = {name: given.get(name, others) for name, _ in beside_blocks(spec)}
    return embedding, given.get("lm_head", lm_head), beside


def _check_calibration(job: Job, schemes: set[Scheme]) -> None:
    """Refuse schemes whose codes cannot be chosen for a text, if one is to be read."""
    if job.calibration.calibrate is None:
        return
    if any(isinstance(scheme, Unquantized) for scheme in schemes):
        raise ConfigError(
            "--calibrate chooses codes, and unquantized linear layers have none; drop it, or give "
            "--bits 1 to 8."
        )
    for scheme in schemes:
        if not scheme.calibrated:
            raise ConfigError(
                f"--calibrate cannot choose the codes of '{scheme.label}'; drop it, or give "
                "integers, or a codebook without --codebook-vector and --codebook-scale."
            )


def _check_targets(job: Job, plan: QuantizationPlan, flags: Mapping[str, str]) -> None:
    """Hold every scheme against the target once, with what chose it."""
    uses = dict.fromkeys((plan.scheme_of(name), flag) for name, flag in flags.items())
    for scheme, flag in uses:
        _check_target(job, flag, scheme)


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
