"""The pipeline: a model in, a verified bundle out.

export("llama", bits=4, output="out/")                       # a recipe, or a recipe.yaml
export("meta-llama/Llama-3.2-1B", output="out/")             # a hub id or a folder
export(model, tokenizer, bits=4, output="out/")              # a live transformers model
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm_coreml.artifact.description import Description
from llm_coreml.bundle.bundled_tokenizer import write_tokenizer
from llm_coreml.bundle.card import model_card
from llm_coreml.bundle.failed import keep_failed
from llm_coreml.bundle.folder import (
    CARD,
    MANIFEST,
    PROGRAM,
    TOKENIZER,
    Bundle,
    check_output,
    new_bundle,
    open_bundle,
)
from llm_coreml.bundle.record import make_manifest
from llm_coreml.bundle.seal import sealed, vouch_for
from llm_coreml.config import ExportConfig, Job, resolve
from llm_coreml.decoder import Decoder, DecoderSpec
from llm_coreml.decoder.rope import table_notes
from llm_coreml.errors import UnsupportedError, VerificationError
from llm_coreml.lower.forms import form_for
from llm_coreml.lower.shares import Cut, cut_of
from llm_coreml.machine import free_memory, settled, trim_memory
from llm_coreml.model import Model, open_model
from llm_coreml.output import write_json
from llm_coreml.progress import Progress
from llm_coreml.progress_bar import Step, listening
from llm_coreml.quantize.cache import WeightCache, default_folder
from llm_coreml.quantize.plan.choose import plan_without_weights
from llm_coreml.quantize.plan.imported import keeps_codes, left_as_is
from llm_coreml.quantize.plan.plan import QuantizationPlan
from llm_coreml.quantize.quantized import Quantized, check_files, quantize, quantized_again
from llm_coreml.quantize.residual import needed_shift
from llm_coreml.quiet import quiet
from llm_coreml.recipes import bundled_model, find_recipe
from llm_coreml.reference.program.execution import Execution
from llm_coreml.rules import ARGMAX, broken_by_states
from llm_coreml.runtime.program_runner import program_runner
from llm_coreml.runtime.reference import ReferenceRunner
from llm_coreml.targets import BACKENDS
from llm_coreml.tokenizer import Tokenizer
from llm_coreml.tokenizer.chat_template import find_template
from llm_coreml.verify.logits import verify, verify_conversion
from llm_coreml.verify.passes import plan_passes, sampled
from llm_coreml.verify.reading import ReadText, read_text
from llm_coreml.verify.verification import Verification

# Share of a verification's time.
_CONVERSION = 0.6
# Bytes that weights may take expanded while a program is verified; others are expanded at each use.
_EXPANDED = 1 << 26
# coremltools keeps the blocks that it builds in globals.
_LOWERING = threading.Lock()


@quiet()
def export(
    model: str | Path | torch.nn.Module,
    tokenizer: Any = None,
    *,
    output: str | Path,
    bits: float | None = None,
    scheme: Any = None,
    target: str | None = None,
    context: int | None = None,
    family: str | None = None,
    config: ExportConfig | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    local_files_only: bool = False,
    cache: str | Path | bool = True,
    progress: Progress | bool | Callable[[Step], object] | None = None,
) -> Bundle:
    """Quantize a causal LM, lower it to a `.pte`, verify that file, and write the bundle.

    Args:
        model: Recipe (a name, or a YAML file), hub id, folder, or a live `transformers` model.
        tokenizer: Tokenizer of a live model; without one the bundle cannot read text.
        output: Folder to make.
        bits: Bits per weight of the linear layers, a fraction to mix formats; wins over `config`,
            as the next four do.
        scheme: Weight format: a name, torchao's `IntxWeightOnlyConfig` or
            `CodebookWeightOnlyConfig`, or any of these by patterns of names.
        target: Compute unit.
        context: Positions of the KV cache.
        family: What a model whose `model_type` has no family is read as.
        config: All other settings; None takes a recipe's, or the defaults.
        overwrite: Replace an earlier export at `output`.
        revision: Branch, tag or commit of a hub id.
        local_files_only: Use the hub's local cache only.
        cache: Folder that keeps quantized weights, from which an interrupted export goes on and
            other exports of the model begin; True takes `quantize.cache.default_folder()`, False
            keeps nothing.
        progress: Told of stages, shares and notes: True draws one bar, a function is called with
            each `progress_bar.Step`, None and False are silent.

    Returns:
        The written bundle.

    Raises:
        LlmCoreMLError: see `errors`; nothing is left at `output` that was not there before. What
            failed its verification is kept in a folder beside it, see `bundle.failed`.
    """
    given = {"bits": bits, "scheme": scheme, "target": target, "context": context, "family": family}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    with listening(progress) as listener:
        run = _Run((config or _settings(model)).under(changes), listener, cache)
        check_output(Path(output), overwrite)
        _check_lowering(run.config)
        check_files(run.config)
        opened = run.open(model, tokenizer, revision, local_files_only)
        with settled():
            _make(run, opened, Path(output), overwrite)
    return open_bundle(Path(output))


def _make(run: _Run, opened: Model, output: Path, overwrite: bool) -> None:
    with new_bundle(output, overwrite) as draft, run.open_cache() as kept, kept.paged_out():
        try:
            _write(run, opened, draft, kept)
        except VerificationError as error:
            raise keep_failed(draft, output, error) from None


def _check_lowering(config: ExportConfig) -> None:
    """Refuse what coremltools or this machine does not have, before any work is done."""
    if config.model_type == "compiled_model":
        from llm_coreml.lower.compiled import check_compiler

        check_compiler()
    if config.passes is not None:
        from llm_coreml.lower.mil_passes import pass_names

        pass_names(config.passes)


def _settings(model: str | Path | torch.nn.Module) -> ExportConfig:
    """Return what is asked of an export that says nothing: a recipe's settings, or the defaults."""
    recipe = None if isinstance(model, torch.nn.Module) else find_recipe(model)
    return ExportConfig() if recipe is None else recipe.config


@dataclass(frozen=True)
class _Run:
    """What every step of one export is given."""

    config: ExportConfig
    progress: Progress
    cache: str | Path | bool

    def open(
        self,
        model: str | Path | torch.nn.Module,
        tokenizer: Any,
        revision: str | None,
        local_files_only: bool,
    ) -> Model:
        """Return the opened model, and tell of how it is read."""
        self.progress.stage("open")
        family = self.config.family
        opened = open_model(
            model, tokenizer, revision, local_files_only, accept=self.check, family=family
        )
        for note in opened.notes:
            self.progress.note(note)
        return opened

    @contextlib.contextmanager
    def open_cache(self) -> Iterator[WeightCache]:
        """Yield where quantized weights are kept, if only until the export ends."""
        if self.cache is False:
            with tempfile.TemporaryDirectory(prefix="llm-coreml-") as folder:
                yield WeightCache(Path(folder), self.progress.note)
            return
        chosen = default_folder() if self.cache is True else Path(self.cache)
        yield WeightCache(chosen, self.progress.note)

    def check(self, spec: DecoderSpec, quantized: bool) -> None:
        """Refuse settings that cannot work for a model of these sizes, and tell of what may not."""
        job = resolve(self.config, spec)
        imported = quantized and keeps_codes(job)
        cut = cut_of(job, spec, plan_without_weights(left_as_is(job) if imported else job, spec))
        _tell_of_the_states(self.progress, job, cut.states(spec, job.shapes.extent))


def _write(run: _Run, model: Model, draft: Path, cache: WeightCache) -> None:
    job, progress = resolve(run.config, model.spec), run.progress
    _tell_of_the_context(run, model, job)
    if job.head.kind == "argmax":
        run.progress.note(f"--head argmax: {ARGMAX}; --head topk:1 gives the same.")
    bos_id, eos_ids = write_tokenizer(model, draft, progress.note)
    quantized = quantize(model, job, draft / TOKENIZER, progress, cache)
    cut = cut_of(job, model.spec, quantized.plan)
    _tell_of_the_cut(progress, cut, quantized.plan)
    form = form_for(job, model.spec, bos_id, eos_ids, cut)
    reading = _read(progress, quantized, form.description, draft)
    shift = _needed_shift(reading, job)
    if shift:
        progress.note(
            f"The residual stream reaches {reading.largest:,.0f}, and fp16 holds 65,504 at most: "
            f"it is halved {shift} times, by the weights alone, which are quantized again "
            f"(--residual-shift {shift})."
        )
        again = resolve(run.config.under({"residual_shift": shift}), model.spec)
        quantized = quantized_again(quantized, again, draft / TOKENIZER, progress, cache)
        reading = _read(progress, quantized, form.description, draft)
    progress.stage("lower")
    program = draft / PROGRAM
    with _LOWERING:
        form.write(quantized.decoder, program, progress.advance)
    _check_size(job, program)
    free_memory()
    progress.stage("verify")
    verification = _verify(progress, form.description, quantized.decoder, reading, program)
    if job.model_type == "compiled_model":
        from llm_coreml.lower.compiled import compile_program

        compile_program(program)
    manifest = make_manifest(quantized, form.description, program, verification)
    card = model_card(manifest, chat=find_template(draft) is not None)
    (draft / CARD).write_text(card, encoding="utf-8")
    write_json(draft / MANIFEST, sealed(manifest, draft).to_json())
    vouch_for(manifest)


def _tell_of_the_context(run: _Run, model: Model, job: Job) -> None:
    """Tell of a context that is longer than config.json says, and of angles that go by it."""
    meant, context = model.spec.max_position_embeddings, job.shapes.context
    if context > meant:
        kinds = dict.fromkeys(rope.kind for rope in model.spec.rotary)
        run.progress.note(
            f"config.json names {meant} positions; the {context} of --context rest on "
            f"its {' and '.join(kinds)} scaling of RoPE."
        )
    for note in table_notes(model.spec.rotary, context):
        run.progress.note(note)


def _tell_of_the_states(
    progress: Progress, job: Job, programs: list[list[tuple[int, ...]]]
) -> None:
    """Tell what is known not to work of such states on the target, before work is done."""
    if job.kv_cache != "state" or not BACKENDS[job.backend].has_targets:
        return
    for rule in broken_by_states(job.target, programs):
        shapes = dict.fromkeys(str(list(shape)) for states in programs for shape in states)
        progress.note(
            f"--target {job.target.name}: {rule.sentence}, and this model's are "
            f"{' and '.join(shapes)}; give {rule.instead}."
        )


def _tell_of_the_cut(progress: Progress, cut: Cut, plan: QuantizationPlan) -> None:
    """Tell of several partitions, and of what each of them has."""
    if not cut.partitions:
        return
    held = "; ".join(f"{each.holds} ({each.weight_bytes:,} bytes)" for each in cut.partitions)
    twice = " The token table is the head, too, and lies in both their partitions."
    progress.note(
        f"The program has {len(cut.shares)} partitions, as {cut.why}: {held}."
        f"{twice if plan.tied else ''}"
    )


def _needed_shift(reading: ReadText, job: Job) -> int:
    """Return how often the residual stream is to be halved, 0 if it may stay as it is.

    Raises:
        UnsupportedError: fp16 does not hold it, however often, or as often as was asked for.
    """
    if job.precision.name != "fp16":
        return 0
    asked, needed = job.weights.residual_shift, needed_shift(reading.largest)
    if needed == 0 or (asked is not None and reading.largest < torch.finfo(torch.float16).max):
        return 0
    if needed is not None and asked is None:
        return needed
    more = None if needed is None else needed + (asked or 0)
    instead = "" if more is None else f"--residual-shift {more}, or leave it out, or give "
    raise UnsupportedError(
        f"The residual stream reaches {reading.largest:,.0f}"
        f"{'' if asked is None else f' with --residual-shift {asked}'}, and fp16 holds 65,504 at "
        f"most: the export would give inf and NaN. Give {instead}--compute-precision fp32."
    )


def _read(
    progress: Progress, quantized: Quantized, description: Description, draft: Path
) -> ReadText:
    """Have the quantized model read what its program will be held to."""
    free_memory()
    progress.stage("read")
    found = _reading_of(quantized, description, draft)
    free_memory()
    return found


def _reading_of(quantized: Quantized, description: Description, draft: Path) -> ReadText:
    lengths = description.seq_lengths
    lengths = sampled(lengths[0], lengths[-1]) if description.ranged else lengths
    plan = plan_passes(lengths, description.context)
    text, tokens = _verification_text(draft, quantized.decoder, plan.tokens)
    on_reference = BACKENDS[description.backend].runtime == "reference"
    return read_text(
        quantized.decoder,
        tokens,
        text,
        plan,
        every_row=description.every_row,
        natural=on_reference,
        in_fp16=on_reference and quantized.job.precision.name == "fp16",
        cuts=quantized.job.cuts,
    )


def _verification_text(draft: Path, decoder: Decoder, count: int) -> tuple[str, list[int]]:
    """Return `count` tokens that an artifact is verified on, and what they are."""
    if not (draft / TOKENIZER).is_file():
        generator = torch.Generator().manual_seed(0)
        shape = (count,)
        tokens = torch.randint(decoder.spec.vocab_size, shape, generator=generator).tolist()
        return "random tokens", tokens
    text = (bundled_model() / "heldout.txt").read_text(encoding="utf-8")
    # A token is rarely longer than eight characters; a long context reads the text again.
    tokens = Tokenizer(draft / TOKENIZER).prompt(text[: 8 * count])
    return "held-out text", (tokens * (count // len(tokens) + 1))[:count]


def _check_size(job: Job, program: Path) -> None:
    """Hold the promise of `--size`, whatever the program was estimated to take."""
    size, limit = program.stat().st_size, job.weights.size
    if limit is not None and size > limit:
        raise UnsupportedError(
            f"The program takes {size:,} bytes, more than --size {limit:,}: this model needs "
            f"more beside its matrices than was foreseen. Give --size {2 * limit - size} to "
            "stay below it, and please report the model."
        )


def _verify(
    progress: Progress,
    description: Description,
    decoder: Decoder,
    reading: ReadText,
    program: Path,
) -> Verification:
    def advance(share: float) -> None:
        trim_memory()
        progress.advance(share)

    conversion, begun = None, 0.0
    if BACKENDS[description.backend].runtime == "reference":
        unrounded = Execution(mode="fp32", memory_budget=_EXPANDED)
        # Held by nothing afterwards: the expanded weights of one mode exist at a time.
        conversion = verify_conversion(
            ReferenceRunner(program, unrounded, description),
            decoder,
            reading,
            lambda share: advance(_CONVERSION * share),
        )
        begun = _CONVERSION
        free_memory()
    execution = Execution(memory_budget=_EXPANDED)
    artifact = program_runner(program, description, execution)
    found = verify(
        artifact,
        reading,
        conversion,
        lambda share: advance(begun + (1 - begun) * share),
    )
    plain = found.plain_fp16
    if plain is not None and plain.noisy:
        progress.note(
            f"fp16 is noisy in this model, most of all in layer {plain.layer}: plain fp16 changes "
            f"its logits by up to {plain.max_relative_error:.1e} of the largest and "
            f"{plain.mean_kl:.1e} nats, this program by {found.max_relative_error:.1e} and "
            f"{found.mean_kl:.1e} nats. --compute-precision fp32 avoids it."
        )
    return found
