"""The model card of a bundle: what it is, how it was made, how it was checked."""

from __future__ import annotations

import shlex
from typing import Any


def model_card(manifest: dict[str, Any]) -> str:
    """Return the `README.md` that goes beside the program described by `manifest`."""
    source, program = manifest["source"], manifest["program"]
    target, checked = manifest["target"], manifest["verification"]
    quantization = manifest["quantization"]
    base = f"base_model: {source['name']}\n" if source["kind"] == "hub" else ""
    lengths = ", ".join(map(str, program["seq_lengths"]))
    return f"""---
{base}library_name: executorch
tags: [coreml, executorch, llm-coreml]
pipeline_tag: text-generation
---

# {source["name"]} for ExecuTorch

`{program["file"]}` is an ExecuTorch program, {program["bytes"]:,} bytes, made by llm-coreml
{manifest["versions"]["llm-coreml"]}.

| | |
|---|---|
| backend | {target["backend"]}, compute unit {target["compute_unit"]}, \
{target["minimum_os"]} or later |
| weights | {quantization["linear"]["label"]}; token table {quantization["embedding"]["label"]}; \
head {quantization["lm_head"]["label"]}{" (tied)" if quantization["tied"] else ""}; \
{quantization["bits_per_weight"]:.2f} bits per weight |
{_rotation(quantization.get("rotation"))}\
| linear layers | {_mix(quantization.get("allocation"))}\
{_choice(quantization.get("calibration"), quantization.get("import"))} |
| precision | {target["compute_precision"]} |
| method | `forward(tokens int64 [1, S], start_pos int64 [1])`, {program["output"]} |
| lengths S | {lengths} |
| context | {program["context"]} positions, KV cache inside the program |

## Verification

Produced by: {checked["runtime"]}. {checked["rows"]} rows of logits on
{checked["text"]}, up to position {checked["last_position"]}, against the quantized model in
PyTorch, fp32: largest error {checked["max_relative_error"]:.2e} of the largest logit (bound
{checked["max_relative_error_bound"]:.0e}), mean KL divergence {checked["mean_kl"]:.2e} nats (bound
{checked["mean_kl_bound"]:.0e}). {_conversion(checked["conversion"])}No Apple device took part.

## Rebuild

    {shlex.join(manifest["rebuild"]) or "llm_coreml.export(model, tokenizer, ...)"}
"""


def _rotation(found: dict[str, Any] | None) -> str:
    return "" if found is None else f"| rotated, in the weights | {rotated_spaces(found)} |\n"


def rotated_spaces(found: dict[str, Any]) -> str:
    """Return what a manifest's `rotation` rotates, and by what."""
    names = {"residual": "residual stream", "heads": "values of the heads"}
    return ", ".join(
        f"{name} ({found[space]['factors']})" for space, name in names.items() if found[space]
    )


def _mix(allocation: dict[str, Any] | None) -> str:
    if allocation is None:
        return ""
    return (
        f"formats chosen by what they cost on {allocation['tokens']:,} tokens of "
        f"{allocation['text']}; "
    )


def _choice(calibration: dict[str, Any] | None, imported: dict[str, Any] | None) -> str:
    if imported is not None:
        return (
            f"{imported['matrices']} matrices as the checkpoint quantized them, "
            f"{imported['format']}, {_exactness(imported)}"
        )
    if calibration is None:
        return "rounded to nearest"
    return (
        f"calibrated by {calibration['method']} on {calibration['tokens']:,} tokens of "
        f"{calibration['text']}{tuned(calibration.get('tuning'))}"
    )


def tuned(tuning: dict[str, Any] | None) -> str:
    """Return what a manifest says of tuning, as the rest of a sentence."""
    if tuning is None:
        return ""
    return (
        f", then tuned in {tuning['steps']:,} steps: KL divergence on it {tuning['kl_before']:.1e} "
        f"-> {tuning['kl_after']:.1e}"
    )


def _exactness(imported: dict[str, Any]) -> str:
    if imported["tensor"] is None:
        return "exact"
    return (
        f"inexact: up to {imported['largest_error']:.2%} of the distance between two codes, in "
        f"`{imported['tensor']}`"
    )


def _conversion(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"""Run without rounding, the program
holds all {found["weights"]} weights and tables of that model bit by bit, and the largest error of
{found["rows"]} rows is {found["max_relative_error"]:.1e} (bound \
{found["max_relative_error_bound"]:.0e}). """
