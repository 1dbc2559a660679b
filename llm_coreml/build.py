"""Open a model and build eager decoders from it: what an export and an evaluation both need.

model = open_model("folder-or-hub-id")
decoder = build_decoder(model, shapes, plan, torch.float16)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm_coreml.checkpoint import Checkpoint, open_checkpoint
from llm_coreml.config import ExportConfig, Shapes, resolve_shapes
from llm_coreml.decoder import Decoder, DecoderSpec
from llm_coreml.families import Family, find_family
from llm_coreml.quantize import QuantizationPlan
from llm_coreml.quantize.fill import check_checkpoint, fill
from llm_coreml.targets import get_target


@dataclass(frozen=True)
class Model:
    """An opened checkpoint and what its configuration says."""

    checkpoint: Checkpoint
    family: Family
    spec: DecoderSpec


def open_model(
    source: str | Path | torch.nn.Module,
    tokenizer: Any = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Model:
    """Open a checkpoint and hold its tensors' names and shapes against its family's.

    Raises:
        CheckpointError: it is absent, damaged, or disagrees with its `config.json`.
        UnsupportedError: an unknown family or option.
    """
    checkpoint = open_checkpoint(
        source, tokenizer=tokenizer, revision=revision, local_files_only=local_files_only
    )
    family = find_family(checkpoint.config)
    spec = family.spec(checkpoint.config)
    # A context of one: only names and shapes are asked for.
    check_checkpoint(Decoder(spec, context=1), checkpoint, family)
    return Model(checkpoint, family, spec)


def build_decoder(
    model: Model,
    config: ExportConfig,
    plan: QuantizationPlan,
    on_progress: Callable[[float], None] = lambda _: None,
) -> tuple[Decoder, Shapes]:
    """Build the quantized decoder of an export, and its shapes.

    Raises:
        CheckpointError: a tensor is not finite, or does not fit the precision.
        ConfigError: context or lengths do not fit the model.
    """
    shapes = resolve_shapes(config, model.spec.max_position_embeddings)
    attention = get_target(config.target).attention
    decoder = Decoder(model.spec, shapes.context, attention, config.logits)
    storage = torch.float16 if config.compute_precision == "fp16" else torch.float32
    fill(decoder, model.checkpoint, model.family, plan, storage, on_progress)
    return decoder.eval(), shapes


def build_original(model: Model, context: int) -> Decoder:
    """Build the unquantized decoder, its weights held as the checkpoint stores them."""
    decoder = Decoder(model.spec, context)
    fill(decoder, model.checkpoint, model.family, plan=None, storage=None)
    return decoder.eval()
