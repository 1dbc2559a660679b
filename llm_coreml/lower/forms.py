"""The kinds of program that a decoder is lowered to: one class each.

    form = form_for(job, spec, bos_id, eos_ids)
    form.write(decoder, Path("model.pte"))
    form.description                               # what runners, manifest and verification read

A new kind is a class that says which settings it is for, how it describes itself and how it is
written, and a place in `FORMS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, final

from llm_coreml.artifact.description import (
    INPUTS,
    MAIN_FUNCTION,
    MAIN_METHOD,
    RANGE,
    Description,
    MethodForm,
)
from llm_coreml.artifact.method_plan import Constant
from llm_coreml.config import Job, Shapes
from llm_coreml.decoder import Decoder, DecoderSpec
from llm_coreml.decoder.parts import Share
from llm_coreml.decoder.states import state_specs
from llm_coreml.lower.shares import Cut, whole
from llm_coreml.lower.traced import constant_methods
from llm_coreml.machine import uncollected

OnProgress = Callable[[float], None]


@dataclass(frozen=True)
class Lowering(ABC):
    """How a decoder becomes a file.

    Attributes:
        job: Settings.
        description: What the file will offer.
        shares: What each partition has of the decoder, where there are several.
    """

    name: ClassVar[str]
    why: ClassVar[str]
    backend: ClassVar[str]
    functions: ClassVar[tuple[str, ...]]
    state_dtype: ClassVar[str]

    job: Job
    description: Description
    shares: tuple[Share, ...] = ()

    @classmethod
    @abstractmethod
    def fits(cls, job: Job) -> bool:
        """Return whether these settings ask for this form."""

    @classmethod
    def describe(
        cls,
        job: Job,
        spec: DecoderSpec,
        constants: dict[str, Constant],
        cut: Cut,
    ) -> Description:
        """Return what a program offers: one method, or those that were asked for."""
        every_row = job.logits == "all"
        width = job.head.count or spec.vocab_size
        output = f"float32 [1, {'S' if every_row else 1}, {width}]"
        given = job.kv_cache == "inputs"
        caches = _caches(spec, job.shapes, cls.input_dtype(job), cut) if given else {}
        count = len(cut.shares)
        inputs = (*INPUTS, *(f"{name} {text}" for name, text in caches.items()))
        methods = {
            name: MethodForm(inputs, output, (length,), count * (name,))
            for name, length in job.functions.items()
        }
        only = MethodForm(inputs, output, job.shapes.seq_lengths, count * cls.functions)
        cache = "is handed from call to call" if given else "is the program's state"
        kept = f"; {cut.outside} left to ExecuTorch's kernels, as --skip-ops asks"
        outside = kept if cut.outside else ""
        if cut.handed:
            outside += "; its weights are inputs of what Core ML runs, as --constants inputs asks"
        several = f"; in {count} partitions, as {cut.why}" if cut.partitions else ""
        return Description(
            form=cls.name,
            why=f"{cls.why}; the cache {cache}{several}{outside}",
            backend=cls.backend,
            methods=methods or {MAIN_METHOD: only},
            every_row=every_row,
            states={} if given else _caches(spec, job.shapes, cls.state_dtype, cut),
            context=job.shapes.context,
            constant_methods=constants,
            head=job.head,
            partitions=cut.partitions,
        )

    @classmethod
    def input_dtype(cls, job: Job) -> str:
        """Return the element type of caches that are inputs: a state's, but fp32 beside fp32."""
        return "float32" if job.precision.name == "fp32" else cls.state_dtype

    @final
    def write(self, decoder: Decoder, path: Path, on_progress: OnProgress = lambda _: None) -> None:
        """Write the program; equal decoders give equal bytes.

        Args:
            decoder: Quantized decoder; the twin leaves it with dequantized weights.
            path: Where to write the `.pte`.
            on_progress: Called with the share of the usual time that is over, 0 to 1.
        """
        if not self.shares:
            self._write(decoder, path, on_progress)
            return
        from llm_coreml.lower.partitions import lower_partitions

        lower_partitions(decoder, self.job, self.description, self.shares, path, on_progress)

    def _write(self, decoder: Decoder, path: Path, on_progress: OnProgress) -> None:
        """Write a program that is not cut; see `write`."""
        from llm_coreml.lower.coreml import lower_coreml

        lower_coreml(decoder, self.job, self.description, path, on_progress)


# Backends are imported where they are called: they load coremltools and XNNPACK, and an export
# needs one of them.


@final
class Enumerated(Lowering):
    """Core ML, whose tokens have one of several lengths, all of them told beforehand."""

    name = "enumerated"
    why = "several lengths, of which Core ML is told beforehand: every compute unit takes these"
    backend = "coreml"
    functions = (MAIN_FUNCTION,)
    state_dtype = "float16"

    @classmethod
    def fits(cls, job: Job) -> bool:
        """Return whether it is Core ML with several lengths."""
        shapes = job.shapes
        several = len(shapes.seq_lengths) > 1 and not shapes.ranged and not job.functions
        return job.backend == cls.backend and several


@final
class Multifunction(Lowering):
    """Core ML, a method and a function for each length, which share the weights.

    Their caches are inputs and outputs: a state would be each method's own.
    """

    name = "multifunction"
    why = "methods of one length each that share the weights, as --functions asks"
    backend = "coreml"
    functions = ()
    state_dtype = "float16"

    @classmethod
    def fits(cls, job: Job) -> bool:
        """Return whether it is Core ML with several methods."""
        return job.backend == cls.backend and bool(job.functions)

    def _write(self, decoder: Decoder, path: Path, on_progress: OnProgress) -> None:
        """Write the program, see `Lowering.write`."""
        from llm_coreml.lower.multifunction import lower_functions

        lower_functions(decoder, self.job, self.description, path, on_progress)


@final
class Ranged(Lowering):
    """Core ML, whose tokens have any length up to the longest; nothing is padded."""

    name = RANGE
    why = "any length up to the longest, as --seq-lengths asks; no Neural Engine takes it"
    backend = "coreml"
    functions = (MAIN_FUNCTION,)
    state_dtype = "float16"

    @classmethod
    def fits(cls, job: Job) -> bool:
        """Return whether it is Core ML with a range of lengths."""
        return job.backend == cls.backend and job.shapes.ranged


@final
class Static(Lowering):
    """Core ML, whose tokens have one length, to which the method pads."""

    name = "static"
    why = "one length, as --seq-lengths asks"
    backend = "coreml"
    functions = (MAIN_FUNCTION,)
    state_dtype = "float16"

    @classmethod
    def fits(cls, job: Job) -> bool:
        """Return whether it is Core ML with one length."""
        return job.backend == cls.backend and len(job.shapes.seq_lengths) == 1


@final
class Twin(Lowering):
    """XNNPACK, which ExecuTorch's own runner runs on Linux; its weights are fp32."""

    name = "twin"
    why = "every length, in fp32, for ExecuTorch on Linux, as --backend xnnpack asks"
    backend = "xnnpack"
    functions = ()
    state_dtype = "float32"

    @classmethod
    def fits(cls, job: Job) -> bool:
        """Return whether it is XNNPACK."""
        return job.backend == cls.backend

    @classmethod
    def describe(
        cls, job: Job, spec: DecoderSpec, constants: dict[str, Constant], cut: Cut
    ) -> Description:
        """Return what the program offers: a range where one is asked for, see `Lowering`."""
        found = super().describe(job, spec, constants, cut)
        return replace(found, form=RANGE) if job.shapes.ranged else found

    def _write(self, decoder: Decoder, path: Path, on_progress: OnProgress) -> None:
        """Write the program, see `Lowering.write`; it takes little time, and is not told of."""
        from llm_coreml.lower.xnnpack import lower_xnnpack

        described = self.description
        with uncollected():
            lower_xnnpack(
                decoder, described.seq_lengths, described.constant_methods, described.caches, path
            )


FORMS: tuple[type[Lowering], ...] = (Enumerated, Ranged, Static, Multifunction, Twin)


def form_for(
    job: Job,
    spec: DecoderSpec,
    bos_id: int | None,
    eos_ids: Sequence[int],
    cut: Cut | None = None,
) -> Lowering:
    """Return the form that settings ask for.

    Args:
        job: Settings.
        spec: Sizes of the decoder.
        bos_id: Token that begins a text, if there is one.
        eos_ids: Tokens that end it.
        cut: Partitions, see `cut_of`; None is a single one.
    """
    kind = next(kind for kind in FORMS if kind.fits(job))
    constants = constant_methods(spec, job.shapes, bos_id, eos_ids)
    cut = cut or whole(spec)
    shares = cut.shares if cut.apart else ()
    return kind(job, kind.describe(job, spec, constants, cut), shares)


def _caches(spec: DecoderSpec, shapes: Shapes, dtype: str, cut: Cut) -> dict[str, str]:
    """Return every cache, those of each partition by names of their own."""
    within = [share.layers for share in cut.shares] if cut.apart else [None]
    states = [state for layers in within for state in state_specs(spec, shapes.extent, layers)]
    return {state.name: f"{dtype} {list(state.shape)}" for state in states}
