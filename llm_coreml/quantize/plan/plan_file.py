"""A plan as JSON: what a manifest records of it, and what `--plan` reads.

    recorded = plan_json(plan, spec, losses={})
    schemes = read_plan(Path("out/manifest.json"), job, spec)        # as `make_plan` takes them

    {"matrices": {"layers.0.mlp.down_proj": {"shape": [2048, 8192],
                                             "scheme": {"type": "Codebook", "bits": 3, ...}}, ...}}

A plan fits every model with matrices of these names and shapes, such as fine-tuned ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llm_coreml.config import Job
from llm_coreml.decoder import DecoderSpec
from llm_coreml.errors import ConfigError, LlmCoreMLError, nearest
from llm_coreml.quantize.formats.scheme_json import scheme_from_json, scheme_json, shown
from llm_coreml.quantize.formats.schemes import Scheme, TableGroup, Unquantized
from llm_coreml.quantize.plan.plan import QuantizationPlan, beside_blocks, matrices

# A matrix takes some 400 bytes; nobody's plan needs more.
_LARGEST_FILE = 1 << 26


def plan_json(
    plan: QuantizationPlan, spec: DecoderSpec, losses: Mapping[str, float]
) -> dict[str, Any]:
    """Return the scheme, shape and bytes of every matrix.

    Args:
        plan: Schemes.
        spec: Sizes.
        losses: Estimated KL divergence of matrices that were measured, in nats per token.
    """
    described = {}
    # What is stored as the token table is, is left out.
    beside = [each for each in beside_blocks(spec) if each[0] in plan.exceptions]
    for name, shape in [*_all_matrices(spec), *beside]:
        scheme = plan.scheme_of(name)
        described[name] = {
            "shape": list(shape),
            "scheme": scheme_json(scheme),
            "bytes": -(-scheme.stored_bits(shape) // 8),
            **({"kl": losses[name]} if name in losses else {}),
        }
    return {"matrices": described}


def _all_matrices(spec: DecoderSpec) -> Iterator[tuple[str, tuple[int, int]]]:
    yield from matrices(spec)
    for name in ("embed_tokens", "lm_head"):
        yield name, (spec.vocab_size, spec.hidden_size)


def read_plan(path: Path, job: Job, spec: DecoderSpec) -> dict[str, Scheme]:
    """Read a plan, or the plan in a manifest, and hold it against a model.

    Raises:
        ConfigError: the file cannot be read, or is no plan for this model and precision.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ValueError(f"it is larger than {_LARGEST_FILE >> 20} MiB")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"--plan '{path}' cannot be read: {error}. Give an export's manifest.json."
        ) from None
    if isinstance(content, dict) and isinstance(content.get("quantization"), dict):
        content = content["quantization"].get("plan")
    try:
        schemes = parse_plan(content, job, spec)
        for name, scheme in schemes.items():
            if isinstance(scheme, TableGroup):
                raise ConfigError(
                    f"{name} has a table that only a quantized checkpoint holds; give the plan of "
                    "an export that chose its formats."
                )
        return schemes
    except ConfigError as error:
        raise ConfigError(f"--plan '{path}': {error}") from None


def parse_plan(content: object, job: Job, spec: DecoderSpec) -> dict[str, Scheme]:
    """Return the schemes of a plan's matrices by name.

    Args:
        content: A parsed plan, not trusted.
        job: Says the precision, in which scales and tables are stored.
        spec: The model that it is for.

    Raises:
        ConfigError: it is none, or none for this model.
    """
    needed = dict(_all_matrices(spec))
    expected = {**needed, **dict(beside_blocks(spec))}
    found = content.get("matrices") if isinstance(content, dict) else None
    if not isinstance(found, dict):
        raise ConfigError("there is no plan in it; give the manifest.json of an export.")
    for name in found:
        if name not in expected:
            raise ConfigError(
                f"the model has no matrix {shown(name)}; the plan is another model's."
                + nearest(name, expected)
            )
    absent = [name for name in needed if name not in found]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise ConfigError(f"it lacks {absent[0]}{more}; give every matrix of the model a scheme.")
    return {
        name: _entry(name, found[name], shape, job)
        for name, shape in expected.items()
        if name in found
    }


def _entry(name: str, entry: object, shape: tuple[int, int], job: Job) -> Scheme:
    """Return the scheme of one matrix."""
    if not isinstance(entry, dict) or entry.get("shape") != list(shape):
        given = entry.get("shape") if isinstance(entry, dict) else entry
        raise ConfigError(
            f"{name} is {list(shape)} in the model, not {shown(given)}; the plan is another "
            "model's."
        )
    try:
        scheme = scheme_from_json(entry.get("scheme"))
        scheme.check(name, shape)
    except LlmCoreMLError as error:
        raise ConfigError(f"{name}: {error}") from None
    full = job.precision.bits
    numbers = (
        scheme.bits if isinstance(scheme, Unquantized) else getattr(scheme, "scale_bits", full)
    )
    if numbers != full:
        raise ConfigError(
            f"{name} holds fp{numbers} numbers, and --compute-precision is "
            f"{job.precision.name}; give the precision that the plan was made for."
        )
    return scheme
