"""The model card of a bundle: what it is, how it was made, how it was checked."""

from __future__ import annotations

import shlex
from pathlib import PurePath

from llm_coreml.artifact.description import Description
from llm_coreml.bundle.manifest import (
    Allocation,
    Calibration,
    Import,
    Manifest,
    Quantization,
    Rotations,
    Tuned,
)
from llm_coreml.printable import CELL, printable
from llm_coreml.rules import broken_by_states
from llm_coreml.targets import BACKENDS, get_target
from llm_coreml.verify.verification import Conversion, PlainFp16

_CHAT = "| chat | by the tokenizer's chat template: `llm-coreml generate --chat` |\n"


def model_card(manifest: Manifest, chat: bool) -> str:
    """Return the `README.md` that goes beside the program described by `manifest`.

    Args:
        manifest: The export.
        chat: The bundle has a chat template.
    """
    source, program, target = manifest.source, manifest.program, manifest.target
    stored, checked = manifest.quantization, manifest.verification
    # Cards are published: of a folder its own name, and not where it lay.
    shown = PurePath(source.name).name if source.kind == "folder" else source.name
    name = printable(shown)
    base = f"base_model: {name}\n" if source.kind == "hub" else ""
    described = manifest.description
    inputs = ", ".join(described.methods[described.main].inputs)
    return f"""---
{base}library_name: executorch
tags: [coreml, executorch, llm-coreml]
pipeline_tag: text-generation
---

# {name} for ExecuTorch

`{program.file}` is an ExecuTorch program, {program.bytes:,} bytes, made by llm-coreml
{manifest.versions["llm-coreml"]}.

| | |
|---|---|
| backend | {target.backend}, compute unit {target.compute_unit}, \
{target.minimum_os} or later |
| weights | {stored.linear.label}; token table {stored.embedding.label}; \
head {stored.lm_head.label}{" (tied)" if stored.tied else ""}; \
{stored.bits_per_weight:.2f} bits per weight |
{_rotation(stored.rotation)}\
| linear layers | {_mix(stored.allocation)}\
{_choice(stored)} |
| precision | {target.compute_precision} |
| method | `{described.main}({inputs})`, {program.output} |
| lengths S | {described.lengths} |
| prompts | {_feeding(described)} |
| context | {program.context} positions; {_remembered(described)} |
{_doubts(manifest)}\
{_CHAT if chat else ""}\

## Verification

Produced by: {checked.runtime}. {checked.rows} rows of logits on
{checked.text}, up to position {checked.last_position}, against the quantized model in
PyTorch, fp32: largest error {checked.max_relative_error:.2e} of the largest logit (bound
{checked.max_relative_error_bound:.0e}), mean KL divergence {checked.mean_kl:.2e} nats (bound
{checked.mean_kl_bound:.0e}). {_plain(checked.plain_fp16)}{_conversion(checked.conversion)}\
No Apple device took part.

## Rebuild

    {printable(shlex.join(manifest.rebuild), CELL) or "llm_coreml.export(model, tokenizer, ...)"}
"""


def _feeding(described: Description) -> str:
    """Return how runners feed a prompt, as the constant methods tell them."""
    constants = described.constant_methods
    if constants["enable_dynamic_shape"] is not True:
        return "fed token by token, by every runner"
    told = (
        f"ExecuTorch's LLM runner feeds up to {constants['get_max_seq_len']} tokens in a call, of "
        "any number"
    )
    if described.ranged:
        return f"{told}, and so does llm-coreml; nothing is padded"
    padded = ", which the method pads to the next length" if described.backend == "coreml" else ""
    if 1 not in described.seq_lengths:
        return f"{told}{padded}; so does llm-coreml"
    return f"{told}{padded}; llm-coreml feeds a sum of the lengths, which needs no pads"


def _remembered(described: Description) -> str:
    held = described.states or described.caches
    if not held:
        return "nothing is remembered between calls"
    told = ", ".join(f"`{name}` {text}" for name, text in held.items())
    if described.states:
        return f"states inside the program: {told}"
    return f"caches that each call takes, zeros at first, and gives back behind the logits: {told}"


def _doubts(manifest: Manifest) -> str:
    """Return a row of what is known not to work of the program's states on its target."""
    target = manifest.target
    if not BACKENDS[target.backend].has_targets:
        return ""
    broken = broken_by_states(get_target(target.name), manifest.description.states_by_program)
    told = "; ".join(rule.sentence for rule in broken)
    return f"| known of such programs | {told} |\n" if told else ""


def _rotation(found: Rotations | None) -> str:
    return "" if found is None else f"| rotated, in the weights | {rotated_spaces(found)} |\n"


def rotated_spaces(found: Rotations) -> str:
    """Return what is rotated, and by what."""
    spaces = {"residual stream": found.residual, "values of the heads": found.heads}
    return ", ".join(f"{name} ({space.factors})" for name, space in spaces.items() if space)


def _mix(found: Allocation | None) -> str:
    if found is None:
        return ""
    return f"formats chosen by what they cost on {found.tokens:,} tokens of {found.text}; "


def _choice(stored: Quantization) -> str:
    if stored.imported is not None:
        return _imported(stored.imported)
    expanded = f"values of {stored.expanded}, " if stored.expanded else ""
    if stored.calibration is None:
        return f"{expanded}rounded to nearest"
    return expanded + _calibrated(stored.calibration)


def _imported(found: Import) -> str:
    exactness = "exact"
    if found.tensor is not None:
        exactness = (
            f"inexact: up to {found.largest_error:.2%} of the distance between two codes, in "
            f"`{found.tensor}`"
        )
    return (
        f"{found.matrices} matrices as the checkpoint quantized them, {found.format}, {exactness}"
    )


def _calibrated(found: Calibration) -> str:
    return (
        f"calibrated by {found.method} on {found.tokens:,} tokens of "
        f"{found.text}{tuned(found.tuning)}"
    )


def tuned(found: Tuned | None) -> str:
    """Return what tuning did, as the rest of a sentence."""
    if found is None:
        return ""
    return (
        f", then tuned in {found.steps:,} steps: KL divergence on it {found.kl_before:.1e} "
        f"-> {found.kl_after:.1e}"
    )


def _plain(found: PlainFp16 | None) -> str:
    if found is None:
        return ""
    noisy = f"""fp16 is noisy in this model, most of all in layer
{found.layer}. """
    return f"""For comparison, the quantized
model in plain fp16 is {found.max_relative_error:.2e} and {found.mean_kl:.2e} nats from it
on {found.rows} rows. {noisy if found.noisy else ""}"""


def _conversion(found: Conversion | None) -> str:
    if found is None:
        return ""
    return f"""Run without rounding, the program
holds all {found.weights} weights and tables of that model bit by bit, and the largest error of
{found.rows} rows is {found.max_relative_error:.1e} (bound \
{found.max_relative_error_bound:.0e}). """
