"""What settings come to for one model: everything decided and checked, once.

job = resolve(ExportConfig(bits=4, target="ane"), spec)
job.target.compute_unit, job.opset, job.precision.bits, job.shapes.context, job.attention
job.weights.group_size                  # a section, where there is nothing left to decide
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from llm_coreml.config.calibration_settings import CalibrationSettings
from llm_coreml.config.contradictions import check_together
from llm_coreml.config.export_config import ExportConfig
from llm_coreml.config.profiles import PROFILES, Profile
from llm_coreml.config.sections import WeightSettings
from llm_coreml.config.values import (
    CONTEXT_MULTIPLE,
    DEFAULT_CONTEXT,
    DEFAULT_SEQ_LENGTHS,
    SKIP_HEAD,
    functions_of,
    range_of,
)
from llm_coreml.cuts import Cuts
from llm_coreml.errors import ConfigError
from llm_coreml.heads import Head
from llm_coreml.machine import machine_memory
from llm_coreml.systems import STATE_SYSTEM, older, opset_of
from llm_coreml.targets import (
    BACKENDS,
    PRECISIONS,
    Layout,
    NormForm,
    Operations,
    Precision,
    Target,
    get_target,
)

if TYPE_CHECKING:  # the decoder's package would bring torch
    from llm_coreml.decoder.spec import DecoderSpec, Extent


@dataclass(frozen=True)
class Shapes:
    """The sequence shapes of one artifact.

    Attributes:
        context: Positions of the KV cache.
        seq_lengths: Accepted chunk lengths, ascending, beginning with 1 if there are several.
        ranged: Those between the first and the last are accepted, too.
        apart: Each has a method of its own, and a runner chooses among them.
        multiple: What the widths of states are multiples of.
    """

    context: int
    seq_lengths: tuple[int, ...]
    ranged: bool = False
    apart: bool = False
    multiple: int = 1

    @property
    def longest(self) -> int:
        """The most tokens of a call."""
        return self.seq_lengths[-1]

    @property
    def spare(self) -> int:
        """Positions beyond the context that pads may reach.

        A call of S tokens is padded to the next length, and its last token may be the last of the
        context. Where methods stand apart, a runner may pad whatever is longer than the shortest to
        the longest. Rounded up as contexts are.
        """
        if self.ranged:
            return 0
        lengths = (self.seq_lengths[0], self.longest) if self.apart else self.seq_lengths
        gaps = (after - before for before, after in pairwise((0, *lengths)))
        pads = max(gaps, default=1) - 1
        return -(-pads // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE

    @property
    def extent(self) -> Extent:
        """How far calls reach, by which a decoder's states are sized."""
        from llm_coreml.decoder import spec  # with torch, which shapes alone do without

        return spec.Extent(self.context, self.spare, self.longest, self.multiple)


@dataclass(frozen=True)
class Job:
    """An export of one model, all of its settings resolved.

    Attributes:
        config: The settings as they were given, for the record alone.
        weights: What the weights are stored as.
        calibration: What the codes are chosen on.
        target: Compute unit.
        minimum_os: Oldest system that must run the artifact.
        opset: coremltools' name of what that system brings, `iOS16` to `iOS26`.
        precision: Of activations, scales, tables and what is not quantized.
        backend: `coreml`, or `xnnpack` for a twin that runs on Linux.
        attention: `fused` or `decomposed`, see `decoder.self_attention`.
        logits: `last` row of each chunk, or `all` rows.
        head: What a row gives.
        cuts: Which matrices are cut.
        layout: What linear layers are.
        norm: How norms are computed.
        operations: Whether they are as few as are known.
        kv_cache: It is a `state`, or `inputs` and outputs of the method.
        functions: The length of each method by name, where there are several.
        shapes: Context and chunk lengths.
        partition_size: Bytes of weights that a partition may have; None leaves it to their sum.
        split: Parts that have a partition of their own, of `values.SPLIT`.
        skip_ops: What ExecuTorch's kernels run, of `values.SKIPPED`.
        constants: Where the weights lie: in the programs, or in the method, which hands them over.
        passes: What coremltools is to run, or to leave out, see `checked_passes`; None is as usual.
        compile_specs: Further compile specs, each `key=value`.
        model_type: `model`, or `compiled_model`.
        force: Take formats that the target is known to refuse.
    """

    config: ExportConfig
    weights: WeightSettings
    calibration: CalibrationSettings
    target: Target
    minimum_os: str
    opset: str
    precision: Precision
    backend: Literal["coreml", "xnnpack"]
    attention: Literal["fused", "decomposed"]
    logits: Literal["last", "all"]
    head: Head
    cuts: Cuts
    layout: Layout
    norm: NormForm
    operations: Operations
    kv_cache: Literal["state", "inputs"]
    functions: Mapping[str, int]
    shapes: Shapes
    partition_size: int | None
    split: tuple[str, ...]
    skip_ops: tuple[str, ...]
    constants: Literal["delegate", "inputs"]
    passes: tuple[str, ...] | None
    compile_specs: tuple[str, ...]
    model_type: Literal["model", "compiled_model"]
    force: bool


def resolve(config: ExportConfig, spec: DecoderSpec) -> Job:
    """Decide what settings mean for a model, and check them against it.

    Raises:
        ConfigError: a context beyond the model's or beyond this machine's memory, a length beyond
            the context, or settings that contradict each other.
        UnsupportedError: the target does not take what is asked for, or the system has no state.
    """
    target, backend = get_target(config.target), BACKENDS[config.backend]
    kv_cache = config.kv_cache or ("inputs" if config.functions else "state")
    check_together(config, target)
    # The fused operation is as old as states; coremltools takes it apart for older systems, with
    # a scale that fp16 does not hold.
    fused = backend.fused_attention and not older(opset_of(config.minimum_os), STATE_SYSTEM)
    weights, profile = config.section(WeightSettings), PROFILES[config.profile]
    shapes = _fitting(
        resolve_shapes(config, spec.max_position_embeddings, spec.longest_context), spec
    )
    return Job(
        config=config,
        weights=_with_tables(weights, config.skip_ops or ()),
        calibration=config.section(CalibrationSettings),
        target=target,
        minimum_os=config.minimum_os,
        opset=opset_of(config.minimum_os),
        precision=PRECISIONS[config.compute_precision],
        backend=config.backend,
        attention=(profile.attention or target.attention) if fused else "decomposed",
        logits=config.logits,
        head=_fitting_head(Head.of(config.head), spec.vocab_size),
        layout=config.layout,
        cuts=Cuts(
            config.linear_split or profile.cuts.linear,
            config.head_split or profile.cuts.widest,
            config.gather_split or profile.cuts.gather,
        ),
        norm=config.norm or _profile_norm(profile, shapes),
        operations=config.operations or profile.operations,
        kv_cache=kv_cache,
        functions=functions_of(config.functions) if config.functions else {},
        shapes=shapes,
        partition_size=config.partition_size,
        split=config.split or (),
        skip_ops=config.skip_ops or (),
        constants=config.constants,
        passes=config.passes,
        compile_specs=config.compile_specs or (),
        model_type=config.model_type,
        force=config.force,
    )


def _profile_norm(profile: Profile, shapes: Shapes) -> NormForm:
    """Return how norms are computed where nothing is given.

    A layer norm has been reported to keep a program of several lengths off the Neural Engine
    (coremltools issue 1909).
    """
    enumerated = len(shapes.seq_lengths) > 1 and not shapes.ranged and not shapes.apart
    return "l2" if profile.norm == "layer" and enumerated else profile.norm or "scaled"


def _with_tables(weights: WeightSettings, skipped: Sequence[str]) -> WeightSettings:
    """Return the settings with what tables are stored as; a head outside has plain numbers."""
    head = weights.lm_head or ("none" if SKIP_HEAD in skipped else None)
    return replace(weights, embedding=weights.table, lm_head=head)


def _fitting_head(head: Head, vocab_size: int) -> Head:
    """Return a head. Raises ConfigError if it is to give more tokens than there are."""
    if head.count is not None and head.count >= vocab_size:
        raise ConfigError(
            f"--head {head} asks for {head.count} tokens of a vocabulary of {vocab_size}; give "
            "fewer, such as topk:40, or --head logits for all of them."
        )
    return head


def resolve_shapes(
    config: ExportConfig, max_position_embeddings: int, longest_context: int | None = None
) -> Shapes:
    """Fill in the defaults of context and lengths for a model, and check them against it.

    Args:
        config: Settings.
        max_position_embeddings: The longest context that the model is meant for.
        longest_context: The longest that can be asked for, if that is more.

    Raises:
        ConfigError: a context beyond the model's, or a length beyond the context.
    """
    longest = max_position_embeddings - max_position_embeddings % CONTEXT_MULTIPLE
    context = config.context or min(DEFAULT_CONTEXT, longest)
    most = max(max_position_embeddings, longest_context or 0)
    if context > most:
        raise ConfigError(
            f"--context {context} is longer than the {most} positions that the model was trained "
            f"for; use {most - most % CONTEXT_MULTIPLE} or less."
        )
    if context < CONTEXT_MULTIPLE:
        raise ConfigError(
            f"The model has {max_position_embeddings} positions; the KV cache needs "
            f"{CONTEXT_MULTIPLE} at least."
        )
    padded = config.pad_heads or PROFILES[config.profile].pad_heads
    multiple = CONTEXT_MULTIPLE if padded else 1
    if config.seq_lengths is None and config.functions is None:
        usual = tuple(n for n in DEFAULT_SEQ_LENGTHS if n <= context)
        return Shapes(context, usual, multiple=multiple)
    asked, flag = config.seq_lengths, "--seq-lengths"
    lengths = range_of(asked) if isinstance(asked, str) else asked or ()
    if config.functions:
        lengths, flag = tuple(functions_of(config.functions).values()), "--functions"
    for length in lengths:
        if length > context:
            raise ConfigError(
                f"{flag} holds {length}, which is longer than the context of {context}; "
                "drop it or raise --context."
            )
    ranged, apart = isinstance(asked, str), config.functions is not None
    return Shapes(context, tuple(sorted(lengths)), ranged, apart, multiple)


def _fitting(shapes: Shapes, spec: DecoderSpec) -> Shapes:
    """Return shapes. Raises ConfigError if the decoder's cache would not fit this machine."""
    # Keys and values, which the decoder holds in fp32.
    own = [layer.mixer for layer in spec.layers if layer.mixer.shares is None]
    needed = 2 * 4 * sum(mixer.remembers.numbers(shapes.extent) for mixer in own)
    if needed > machine_memory():
        raise ConfigError(
            f"A context of {shapes.context} positions needs {needed / 1e9:,.1f} GB for the cache "
            f"alone, and this machine has {machine_memory() / 1e9:,.1f} GB; give a smaller "
            "--context."
        )
    return shapes
