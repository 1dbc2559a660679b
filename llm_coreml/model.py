"""Open a model and build eager decoders from it: what an export and an evaluation both need.

model = open_model("folder-or-hub-id")
decoder, shapes = build_decoder(model, config, plan_for(config, model))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llm_coreml.checkpoint import Checkpoint, Source, is_quantized, open_checkpoint
from llm_coreml.config import ExportConfig, Shapes, resolve_shapes
from llm_coreml.decoder import Decoder, DecoderSpec
from llm_coreml.families import Family, find_family
from llm_coreml.quantize import QuantizationPlan, make_plan
from llm_coreml.quantize.cache import WeightCache
from llm_coreml.quantize.calibrate.text import CalibrationText, read_content, tokenize
from llm_coreml.quantize.calibrate.tune import Tuning, tune
from llm_coreml.quantize.fill import check_checkpoint, fill
from llm_coreml.quantize.plan.imported import (
    ImportReport,
    import_report,
    refuse_choices,
    refuse_inexact,
    with_imports,
)
from llm_coreml.quantize.rotate.rotation import rotated
from llm_coreml.recipes import BUNDLED, BUNDLED_RECIPE, load_recipe, recipe_names
from llm_coreml.targets import get_target


@dataclass(frozen=True)
class Model:
    """An opened checkpoint and what its configuration says.

    Attributes:
        source: Where it came from, as a manifest records it.
        checkpoint: Its tensors and tokenizer.
        family: Names its tensors.
        spec: Its sizes.
    """

    source: Source
    checkpoint: Checkpoint
    family: Family
    spec: DecoderSpec

    def imported(self) -> ImportReport | None:
        """Return what becomes of matrices that are quantized already, None if none are."""
        return import_report(self.checkpoint)

    def sha256(self) -> str:
        """Return the hash of the tensors that the decoder is made of."""
        return self.checkpoint.sha256(set(self.family.tensor_names(self.spec).values()))


def plan_for(config: ExportConfig, model: Model) -> QuantizationPlan:
    """Choose the scheme of each matrix, or find it in a checkpoint that is quantized already.

    Raises:
        CheckpointError: scales of a quantized checkpoint are damaged.
        ConfigError: settings contradict each other, or choose what is chosen already.
        UnsupportedError: Core ML or the target cannot hold a matrix, or only inexactly.
    """
    report = model.imported()
    if report is None:
        return make_plan(config, model.spec)
    refuse_inexact(report, config)
    forms = model.checkpoint.forms()
    held = {
        ours.removesuffix(".weight"): forms[theirs]
        for ours, theirs in model.family.tensor_names(model.spec).items()
        if theirs in forms
    }
    plan = make_plan(refuse_choices(config), model.spec)
    return with_imports(plan, config, model.spec, held)


def open_model(
    source: str | Path | torch.nn.Module,
    tokenizer: Any = None,
    revision: str | None = None,
    local_files_only: bool = False,
    accept: Callable[[DecoderSpec, bool], object] = lambda _, __: None,
) -> Model:
    """Open a checkpoint and hold its tensors' names and shapes against its family's.

    Args:
        source: Recipe name, hub id, folder, or a live `transformers` model.
        tokenizer: Tokenizer of a live model.
        revision: Branch, tag or commit of a hub id.
        local_files_only: Use the hub's local cache only.
        accept: Given the sizes, and whether the matrices are quantized already, before any weights
            are fetched; raises to refuse them.

    Raises:
        ConfigError: a bare word that is no recipe and no folder.
        CheckpointError: it is absent, damaged, or disagrees with its `config.json`.
        UnsupportedError: an unknown family or option.
    """

    def judge(config: dict[str, Any]) -> None:
        accept(find_family(config).spec(config), is_quantized(config))

    source, bundled = _resolve(source)
    checkpoint = open_checkpoint(
        source,
        tokenizer=tokenizer,
        revision=revision,
        local_files_only=local_files_only,
        judge=judge,
    )
    family = find_family(checkpoint.config)
    spec = _with_true_head(checkpoint, family, family.spec(checkpoint.config))
    # A context of one: only names and shapes are asked for.
    check_checkpoint(Decoder(spec, context=1), checkpoint, family)
    origin = Source("bundled", BUNDLED_RECIPE) if bundled else checkpoint.source
    return Model(origin, checkpoint, family, spec)


def _with_true_head(checkpoint: Checkpoint, family: Family, spec: DecoderSpec) -> DecoderSpec:
    """Untie a spec whose checkpoint holds a head that differs from the token table.

    Fine-tuning may train the head apart while `tie_word_embeddings` stays true; transformers then
    keeps both tensors.
    """
    untied = replace(spec, tie_word_embeddings=False)
    names = family.tensor_names(untied)
    head, table = names["lm_head.weight"], names["embed_tokens.weight"]
    present = checkpoint.names()
    if not spec.tie_word_embeddings or head not in present or table not in present:
        return spec
    same = torch.equal(checkpoint.stored(head), checkpoint.stored(table))
    return spec if same else untied


def _resolve(
    source: str | Path | torch.nn.Module,
) -> tuple[str | Path | torch.nn.Module, bool]:
    """Turn a recipe's name into its model, and say whether it is the bundled one.

    A folder of a recipe's name wins only if it holds a model: exports are often named so.
    """
    if not isinstance(source, str):
        return source, False
    is_recipe = source in recipe_names() and not (Path(source) / "config.json").is_file()
    if not is_recipe and (Path(source).exists() or "/" in source):
        return source, False
    recipe = load_recipe(source)
    return recipe.source, recipe.model == BUNDLED


def build_decoder(
    model: Model,
    config: ExportConfig,
    plan: QuantizationPlan,
    on_progress: Callable[[float], None] = lambda _: None,
    calibration: CalibrationText | None = None,
    cache: WeightCache | None = None,
) -> tuple[Decoder, Shapes]:
    """Build the quantized decoder of an export, and its shapes.

    Args:
        model: What to quantize.
        config: Settings.
        plan: Schemes.
        on_progress: Called with the share done, 0 to 1.
        calibration: The text that `config` asks for, see `read_calibration`.
        cache: Where quantized weights are looked up and kept.

    Raises:
        CheckpointError: a tensor is not finite, or does not fit the precision.
        ConfigError: context or lengths do not fit the model.
        UnsupportedError: a family that cannot be rotated.
    """
    if (config.calibrate is None) != (calibration is None):
        raise ValueError("a calibration text and a config that asks for one belong together")
    shapes = resolve_shapes(config, model.spec.max_position_embeddings)
    # XNNPACK has no fused attention.
    fused = config.backend == "coreml" and get_target(config.target).attention == "fused"
    checkpoint, spec = rotated(model.checkpoint, model.family, model.spec, config.rotate)
    decoder = Decoder(spec, shapes.context, "fused" if fused else "decomposed", config.logits)
    storage = torch.float16 if config.compute_precision == "fp16" else torch.float32
    for buffer in decoder.buffers():
        # Tables and numbers too are what the program holds, so that only activations differ.
        if buffer.is_floating_point():
            buffer.copy_(buffer.to(storage))
    windows = None if calibration is None else calibration.windows
    fill(decoder, checkpoint, model.family, plan, storage, on_progress, windows, cache)
    return decoder.eval(), shapes


def tune_decoder(
    model: Model,
    config: ExportConfig,
    decoder: Decoder,
    calibration: CalibrationText | None,
    on_progress: Callable[[float], None] = lambda _: None,
) -> Tuning | None:
    """Tune a decoder that `build_decoder` calibrated, if `config` asks for it; see `tune`.

    Args:
        model: The original, which is held beside it.
        config: Settings.
        decoder: Changed in place.
        calibration: The text that it was calibrated on.
        on_progress: Called with the share done, 0 to 1.

    Raises:
        CheckpointError: the divergence is not finite.
        UnsupportedError: a linear layer is not quantized.
    """
    if not config.tune or calibration is None:
        return None
    teacher = build_original(model, decoder.context)
    return tune(decoder, teacher, calibration.windows, config.tune, on_progress)


def read_calibration(model: Model, config: ExportConfig, tokenizer: Path) -> CalibrationText | None:
    """Return the text that `config` asks to calibrate on, None if it does not.

    Args:
        model: What is calibrated.
        config: Settings.
        tokenizer: The model's `tokenizer.json`, which may be absent.

    Raises:
        ConfigError: the text cannot be used, or there is no tokenizer to read it with.
    """
    if config.calibrate is None:
        return None
    context = resolve_shapes(config, model.spec.max_position_embeddings).context
    content = read_content(config.calibrate)
    return tokenize(config.calibrate, content, tokenizer, config.calibration_tokens, context)


def build_original(model: Model, context: int) -> Decoder:
    """Build the unquantized decoder, its weights held as the checkpoint stores them."""
    decoder = Decoder(model.spec, context)
    fill(decoder, model.checkpoint, model.family, plan=None, storage=None)
    return decoder.eval()
