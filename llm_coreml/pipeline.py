"""The pipeline: a model in, a verified bundle out.

export("llama", bits=4, output="out/")                       # a recipe
export("meta-llama/Llama-3.2-1B", output="out/")             # a hub id or a folder
export(model, tokenizer, bits=4, output="out/")              # a live transformers model
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llm_coreml.build import Model, build_decoder, open_model
from llm_coreml.bundle import (
    CARD,
    MANIFEST,
    PROGRAM,
    TOKENIZER,
    Bundle,
    check_output,
    new_bundle,
    open_bundle,
    write_json,
)
from llm_coreml.card import model_card
from llm_coreml.config import ExportConfig, Shapes, resolve_shapes
from llm_coreml.decoder import Decoder
from llm_coreml.errors import CheckpointError
from llm_coreml.lower.program import constant_methods
from llm_coreml.manifest import make_manifest
from llm_coreml.progress import Progress, Silent
from llm_coreml.quantize import make_plan
from llm_coreml.recipes import bundled_model
from llm_coreml.runtime import EagerRunner, ExecutorchRunner, ReferenceRunner, Runner
from llm_coreml.tokenizer import Tokenizer, special_ids
from llm_coreml.verify import Verification, verify

# Enough to read every default length from either end, and to decode after it.
_VERIFIED_TOKENS = 1024


def export(
    model: str | Path | torch.nn.Module,
    tokenizer: Any = None,
    *,
    output: str | Path,
    bits: int | None = None,
    scheme: str | None = None,
    target: str | None = None,
    context: int | None = None,
    config: ExportConfig | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Quantize a causal LM, lower it to a `.pte`, verify that file, and write the bundle.

    Args:
        model: Recipe name, hub id, folder, or a live `transformers` model.
        tokenizer: Tokenizer of a live model; without one the bundle cannot read text.
        output: Folder to make.
        bits: Bits per weight of the linear layers; wins over `config`, as the next three do.
        scheme: Weight format.
        target: Compute unit.
        context: Positions of the KV cache.
        config: All other settings.
        overwrite: Replace an earlier export at `output`.
        revision: Branch, tag or commit of a hub id.
        local_files_only: Use the hub's local cache only.
        progress: Told of stages, shares and notes.

    Returns:
        The written bundle.

    Raises:
        LlmCoreMLError: see `errors`; nothing is left at `output` that was not there before.
    """
    given = {"bits": bits, "scheme": scheme, "target": target, "context": context}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    job = _Job(config=replace(config or ExportConfig(), **changes), progress=progress or Silent())
    check_output(Path(output), overwrite)
    job.progress.stage("open")
    opened = open_model(model, tokenizer, revision, local_files_only)
    with new_bundle(Path(output), overwrite) as draft:
        _write(job, opened, draft)
    return open_bundle(Path(output))


@dataclass(frozen=True)
class _Job:
    """What every step of one export is given."""

    config: ExportConfig
    progress: Progress


def _write(job: _Job, model: Model, draft: Path) -> None:
    config, progress = job.config, job.progress
    plan = make_plan(config, model.spec)
    resolve_shapes(config, model.spec.max_position_embeddings)
    if plan.untied_bytes:
        progress.note(
            f"The head shares its weights with the token table but not its format "
            f"({plan.lm_head.label}, {plan.embedding.label}): storing it separately costs "
            f"{plan.untied_bytes:,} bytes."
        )
    bos_id, eos_ids = special_ids(model.checkpoint.config, model.checkpoint.generation_config)
    text = _write_tokenizer(job, model, draft)
    progress.stage("quantize")
    decoder, shapes = build_decoder(model, config, plan, progress.advance)
    methods = constant_methods(model.spec, shapes, bos_id, eos_ids)
    progress.stage("lower")
    program = draft / PROGRAM
    _lower(decoder, config, shapes, methods, program)
    progress.stage("verify")
    verification = _verify(config, shapes, decoder, program, text)
    manifest = make_manifest(model, config, plan, shapes, program, methods, verification)
    write_json(draft / MANIFEST, manifest)
    (draft / CARD).write_text(model_card(manifest))


def _write_tokenizer(job: _Job, model: Model, draft: Path) -> list[int]:
    """Save the tokenizer and return the tokens that the artifact is verified on."""
    try:
        model.checkpoint.save_tokenizer(draft)
    except CheckpointError:
        job.progress.note("There is no tokenizer: the bundle will not read or write text.")
    if not (draft / TOKENIZER).is_file():
        generator = torch.Generator().manual_seed(0)
        shape = (_VERIFIED_TOKENS,)
        return torch.randint(model.spec.vocab_size, shape, generator=generator).tolist()
    tokenizer = Tokenizer(draft / TOKENIZER)
    text = (bundled_model() / "heldout.txt").read_text(encoding="utf-8")
    return tokenizer.prompt(text[: 8 * _VERIFIED_TOKENS])[:_VERIFIED_TOKENS]


def _lower(
    decoder: Decoder,
    config: ExportConfig,
    shapes: Shapes,
    methods: dict[str, int | bool | list[int]],
    path: Path,
) -> None:
    # Imported here: these load coremltools and XNNPACK, and an export needs one of them.
    if config.backend == "coreml":
        from llm_coreml.lower.coreml import lower_coreml

        program = lower_coreml(decoder, config, shapes, methods)
    else:
        from llm_coreml.lower.xnnpack import lower_xnnpack

        program = lower_xnnpack(decoder, shapes, methods)
    with path.open("wb") as file:
        program.write_to_file(file)


def _verify(
    config: ExportConfig, shapes: Shapes, decoder: Decoder, program: Path, tokens: list[int]
) -> Verification:
    artifact: Runner
    if config.backend == "coreml":
        artifact = ReferenceRunner(program)
    else:
        artifact = ExecutorchRunner(program, shapes.seq_lengths)
    return verify(artifact, EagerRunner(decoder, "quantized"), tokens)
