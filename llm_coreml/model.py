"""A model to export: a checkpoint under the decoder's own names.

model = open_model("folder-or-hub-id")
model.spec.vocab_size
model.weights.tensor("layers.0.mlp.up_proj.weight", torch.float16)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llm_coreml.checkpoint import (
    Checkpoint,
    Source,
    check_tensors,
    expanded,
    is_quantized,
    open_checkpoint,
)
from llm_coreml.checkpoint.apart import Factors, products_apart
from llm_coreml.checkpoint.checkpoint import listing
from llm_coreml.checkpoint.layouts import ordinary_name
from llm_coreml.checkpoint.weights_view import FamilyWeights, Stored, Weights, expected_tensors
from llm_coreml.decoder import DecoderSpec, skeleton
from llm_coreml.errors import LlmCoreMLError, UnknownFamilyError, UnsupportedError
from llm_coreml.families import Family, family_notes, find_family, offer, read_as
from llm_coreml.families.family import Naming
from llm_coreml.recipes import BUNDLED, BUNDLED_RECIPE, find_recipe

_TABLE = "embed_tokens.weight"


@dataclass(frozen=True)
class Model:
    """An opened checkpoint and what its configuration says.

    Attributes:
        source: Where it came from, as a manifest records it.
        checkpoint: Its configuration and tokenizer, and its tensors as they are stored.
        family: What kind of model it is.
        spec: Its sizes.
        weights: Its tensors, as the decoder of these sizes names them.
        notes: What a user should know of how they were read, a sentence each.
    """

    source: Source
    checkpoint: Checkpoint
    family: Family
    spec: DecoderSpec
    weights: Weights
    notes: tuple[str, ...] = ()

    def expanded(self) -> Model:
        """Return the model with quantized matrices seen as values, which can be quantized again."""
        checkpoint = expanded(self.checkpoint)
        stored, _ = _with_lone_head(checkpoint, self.family, self.spec)
        weights = FamilyWeights(checkpoint, stored)
        return replace(self, checkpoint=checkpoint, weights=weights)

    def adapters_beside(self) -> tuple[Model, dict[str, Factors], int]:
        """Return the model without the products that its adapter adds to matrices of blocks.

        Returns:
            It, the products as `[rank, inputs]` and `[outputs, rank]`, fp32, by the matrices'
            names in the decoder, and how many others stay merged.

        Raises:
            UnsupportedError: there are none, or none that a program can keep apart.
        """
        stored, _ = _with_lone_head(self.checkpoint, self.family, self.spec)
        base, found = products_apart(self.checkpoint, stored)
        if not found:
            raise UnsupportedError(
                f"--adapters beside keeps the LoRA matrices of an adapter's files apart, and "
                f"'{self.source.name}' has none that can be (DoRA, token tables and transposed "
                "matrices are merged); give --adapters merged, or save the adapter to a folder."
            )
        left = len(base.products)
        return replace(self, weights=FamilyWeights(base, stored)), found, left

    def sha256(self) -> str:
        """Return the hash of the stored tensors that the decoder is made of."""
        stored, _ = _with_lone_head(self.checkpoint, self.family, self.spec)
        return self.checkpoint.sha256({name for made in stored.values() for name in made.names})


def open_model(
    source: str | Path | torch.nn.Module,
    tokenizer: Any = None,
    revision: str | None = None,
    local_files_only: bool = False,
    accept: Callable[[DecoderSpec, bool], object] = lambda _, __: None,
    family: str | None = None,
) -> Model:
    """Open a checkpoint and hold its tensors' names and shapes against its family's.

    Args:
        source: Recipe (a name, or a YAML file), hub id, folder, or a live `transformers` model.
        tokenizer: Tokenizer of a live model.
        revision: Branch, tag or commit of a hub id.
        local_files_only: Use the hub's local cache only.
        accept: Given the sizes, and whether the matrices are quantized already, before any weights
            are fetched; raises to refuse them.
        family: What to read the model as, if its `model_type` has no family; None is what a recipe
            says, else its own.

    Raises:
        ConfigError: a bare word that is no recipe and no folder, or a recipe that is wrong.
        CheckpointError: it is absent, damaged, or disagrees with its `config.json`.
        UnknownFamilyError: its `model_type` has no family; the message says which its tensors are
            those of, if any.
        UnsupportedError: an unknown option, or a `family` that it cannot be read as.
        ValueError: the family leaves parameters of the decoder out, which is a fault of the family.
    """
    recipe = None if isinstance(source, torch.nn.Module) else find_recipe(source)
    if recipe is not None:
        source, family = recipe.source, family or recipe.config.family

    def judge(config: dict[str, Any]) -> None:
        read = read_as(config, family)
        accept(find_family(read).spec(read), is_quantized(read))

    try:
        checkpoint = open_checkpoint(
            source,
            tokenizer=tokenizer,
            revision=revision,
            local_files_only=local_files_only,
            judge=judge,
        )
    except UnknownFamilyError as error:
        raise UnknownFamilyError(f"{error} {_offer(source)}".strip()) from None
    config = read_as(checkpoint.config, family)
    found = _as_named(checkpoint, config)
    spec = _with_true_head(checkpoint, found, found.spec(config))
    stored, lone = _with_lone_head(checkpoint, found, spec)
    parameters = skeleton(spec).named_parameters()
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters}
    _check_complete(spec, stored.keys(), shapes.keys())
    beside = check_tensors(checkpoint, expected_tensors(stored, shapes), optional=found.ignored)
    bundled = recipe is not None and recipe.model == BUNDLED
    origin = Source("bundled", BUNDLED_RECIPE) if bundled else checkpoint.source
    read = family_notes(checkpoint.config, family)
    notes = (*checkpoint.notes, *read, *lone, *beside, *found.notes(config))
    return Model(origin, checkpoint, found, spec, FamilyWeights(checkpoint, stored), notes)


def _offer(source: str | Path | torch.nn.Module) -> str:
    """Return what a model's tensors say of its family, nothing where they are not here."""
    if not isinstance(source, torch.nn.Module) and not Path(source).expanduser().exists():
        return "Download it and give its folder, to be told which family its tensors are those of."
    try:
        checkpoint = open_checkpoint(source)
        names = (*checkpoint.names(), *checkpoint.tied())
        return offer(checkpoint.config, {name: checkpoint.shape(name) for name in names})
    except LlmCoreMLError:
        return ""


def _check_complete(
    spec: DecoderSpec, stored: Collection[str], parameters: Collection[str]
) -> None:
    """Refuse a family by which a parameter would stay as it was constructed."""
    tied = {"lm_head.weight"} if spec.tie_word_embeddings else set()
    forgotten = [name for name in parameters if name not in stored and name not in tied]
    if forgotten:
        raise ValueError(
            f"The family of '{spec.model_type}' does not say what the decoder's "
            f"{listing(forgotten, limit=3)} is made of."
        )


def _as_named(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Family:
    """Return the family of `config` with the names that the checkpoint has, if they are known.

    Those of GPT-2 and BLOOM on the hub are of the model inside of transformers' causal LM.
    """
    family, present = find_family(config), {*checkpoint.names(), *checkpoint.tied()}
    spec = family.spec(config)
    namings = (family.stored, *family.other_names)
    for naming in (*namings, *map(_of_the_inner_model, namings)):
        if present.issuperset(name for made in naming(spec).values() for name in made.names):
            return replace(family, stored=naming)
    return family


def _of_the_inner_model(naming: Naming) -> Naming:
    """Return the names of tensors without what stands before all but those of the head."""

    def named(spec: DecoderSpec) -> dict[str, Stored]:
        found = naming(spec)
        front = found["embed_tokens.weight"].names[0].partition(".")[0] + "."
        return {
            name: replace(
                made, names=tuple(ordinary_name(each.removeprefix(front)) for each in made.names)
            )
            for name, made in found.items()
        }

    return named


def _with_lone_head(
    checkpoint: Checkpoint, family: Family, spec: DecoderSpec
) -> tuple[Mapping[str, Stored], list[str]]:
    """Return what parameters are made of, the table of the head where only that is stored of both.

    Returns:
        That, and what to tell of it.
    """
    stored = family.stored(spec)
    if not spec.tie_word_embeddings:
        return stored, []
    head = family.stored(replace(spec, tie_word_embeddings=False))["lm_head.weight"]
    (table,), (name,), present = stored[_TABLE].names, head.names, checkpoint.names()
    if table in present or name not in present:
        return stored, []
    told = f"The token table, which is also the head, is read from '{name}'."
    return {**stored, _TABLE: head}, [told]


def _with_true_head(checkpoint: Checkpoint, family: Family, spec: DecoderSpec) -> DecoderSpec:
    """Untie a spec whose checkpoint holds a head that differs from the token table.

    Fine-tuning may train the head apart while `tie_word_embeddings` stays true; transformers then
    keeps both tensors.
    """
    if not spec.tie_word_embeddings:
        return spec
    untied = replace(spec, tie_word_embeddings=False)
    stored = family.stored(untied)
    (head,), (table,) = stored["lm_head.weight"].names, stored["embed_tokens.weight"].names
    present = checkpoint.names()
    if head not in present or table not in present:
        return spec
    same = torch.equal(checkpoint.stored(head), checkpoint.stored(table))
    return spec if same else untied
