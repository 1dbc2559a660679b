"""Results as tables for people."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from llm_coreml.artifact.compatibility import MIXED_ADVICE
from llm_coreml.bundle.card import rotated_spaces, tuned
from llm_coreml.bundle.manifest import (
    Allocation,
    Calibration,
    Import,
    Manifest,
    Matrix,
    Quantization,
    Rotations,
)
from llm_coreml.cli.cells import devices_table, line, plain
from llm_coreml.cli.models_table import delegate_rows
from llm_coreml.verify.verification import Conversion, PlainFp16

if TYPE_CHECKING:  # they bring torch, which a list does not need
    from llm_coreml.eval.difference import Comparison
    from llm_coreml.eval.inspection import Inspection
    from llm_coreml.eval.metrics import Metric
    from llm_coreml.eval.results import Evaluation, Quality
    from llm_coreml.inspect.contents import Contents
    from llm_coreml.inspect.systems_of import PartSystems


def export_table(manifest: Manifest, folder: str, peak: int) -> Group:
    """Return what an export made, in a few rows, and the bytes of memory that it took."""
    table = plain("", "")
    for name, value in _export_rows(manifest, folder).items():
        table.add_row(name, value)
    table.add_row("peak memory", f"{peak / 1e6:,.0f} MB resident, mapped files included")
    return Group(table, *_mixed_formats(manifest.quantization))


def _mixed_formats(stored: Quantization) -> list[Any]:
    """Return a table of bits per weight by block and kind of matrix, if formats are mixed."""
    if stored.linear.scheme != "mixed" or stored.plan is None:
        return []
    blocks: dict[int, dict[str, Matrix]] = {}
    for name, matrix in stored.plan.matrices.items():
        if name.startswith("layers."):
            _, number, *_, kind = name.removesuffix("_proj").split(".")
            blocks.setdefault(int(number), {})[kind] = matrix
    kinds = dict.fromkeys(kind for matrices in blocks.values() for kind in matrices)
    losses = {block: _loss(matrices) for block, matrices in blocks.items()}
    estimated = None not in losses.values()
    columns = [*kinds, "bytes", *(["KL"] if estimated else [])]
    table = plain("bits per weight", *columns, numeric=columns)
    for block, matrices in sorted(blocks.items()):
        cells = [
            f"{matrices[kind].bits_per_weight:.2f}" if kind in matrices else "" for kind in kinds
        ]
        cells.append(f"{sum(matrix.bytes for matrix in matrices.values()):,}")
        if estimated:
            cells.append(f"{losses[block]:.1e}")
        table.add_row(f"block {block}", *cells)
    return [Text(""), table]


def _loss(matrices: Mapping[str, Matrix]) -> float | None:
    """Return the sum of what matrices are estimated to cost, None if one was not measured."""
    found = [matrix.kl for matrix in matrices.values() if matrix.kl is not None]
    return sum(found) if len(found) == len(matrices) else None


def _export_rows(manifest: Manifest, folder: str) -> dict[str, str]:
    program, target = manifest.program, manifest.target
    stored, checked = manifest.quantization, manifest.verification
    tied = " (one table for both)" if stored.tied else ""
    return {
        "program": f"{folder}/{program.file}, {program.bytes:,} bytes",
        "weights": f"{stored.linear.label}, {stored.bits_per_weight:.2f} bits per weight over all",
        **_rotation_row(stored.rotation),
        **_allocation_row(stored.allocation),
        **_calibration_row(stored.calibration),
        **_import_row(stored.imported),
        **({"expanded from": stored.expanded} if stored.expanded else {}),
        "embedding, head": f"{stored.embedding.label}, {stored.lm_head.label}{tied}",
        "target": f"{target.backend}, {target.compute_unit}, {target.minimum_os}, "
        f"{target.compute_precision}",
        "lengths, context": f"{manifest.description.lengths}; {program.context}",
        **_conversion_row(checked.conversion),
        "verified by": f"{checked.runtime}: {checked.rows} rows, largest error "
        f"{checked.max_relative_error:.1e} (bound {checked.max_relative_error_bound:.0e}), "
        f"mean KL {checked.mean_kl:.1e} (bound {checked.mean_kl_bound:.0e})",
        **_plain_row(checked.plain_fp16),
    }


def _rotation_row(found: Rotations | None) -> dict[str, str]:
    return {} if found is None else {"rotated": rotated_spaces(found)}


def _allocation_row(found: Allocation | None) -> dict[str, str]:
    if found is None:
        return {}
    return {
        "formats chosen": f"for a KL of {found.kl:.1e}, estimated on {found.tokens:,} tokens "
        f"of text '{found.text}'"
    }


def _calibration_row(found: Calibration | None) -> dict[str, str]:
    if found is None:
        return {}
    return {
        "calibrated": f"by {found.method} on {found.tokens:,} tokens of text "
        f"'{found.text}'{tuned(found.tuning)}"
    }


def _import_row(found: Import | None) -> dict[str, str]:
    if found is None:
        return {}
    error = f", largest error {found.largest_error:.2%} of a step" if found.tensor else ""
    return {"imported": f"{found.matrices} matrices from {found.format}, {found.exactness}{error}"}


def _conversion_row(found: Conversion | None) -> dict[str, str]:
    """Return what an artifact was found to be without rounding; early manifests do not say."""
    if found is None:
        return {}
    return {
        "the same model": f"{found.weights} weights and tables bit by bit; {found.rows} rows "
        f"without rounding, largest error {found.max_relative_error:.1e} "
        f"(bound {found.max_relative_error_bound:.0e})"
    }


def _plain_row(found: PlainFp16 | None) -> dict[str, str]:
    """Return what plain fp16 makes of the model; early manifests do not say."""
    if found is None:
        return {}
    noisy = f"; noisy, most of all in layer {found.layer}" if found.noisy else ""
    return {
        "plain fp16": f"largest error {found.max_relative_error:.1e}, mean KL {found.mean_kl:.1e}, "
        f"{found.rows} rows{noisy}"
    }


def evaluation_table(result: Evaluation) -> Group:
    """Return quality, latency and size, each figure under what produced it."""
    metrics = result.artifact.metrics
    quality = _figures("model", "runtime", metrics=metrics)
    for row in result.qualities:
        quality.add_row(row.name, row.runtime, *_shown(row))
    latency = plain("call", "runtime", "median", "tokens/s")
    for timed in result.latencies:
        name = "decode, 1 token" if timed.tokens == 1 else f"prefill, {timed.tokens} tokens"
        latency.add_row(
            name, timed.runtime, f"{1e3 * timed.seconds:.1f} ms", f"{timed.tokens_per_second:.0f}"
        )
    size = plain("part", "bytes")
    for name, count in result.bytes.items():
        size.add_row(f"  {name.split('/')[1]}" if "/" in name else name, f"{count:,}")
    if result.bits_per_weight is not None:
        size.add_row("bits per weight", f"{result.bits_per_weight:.2f}")
    text = f"{result.tokens:,} tokens of {result.text}, windows of up to {result.window}"
    devices = [devices_table(result.devices)] if result.devices else []
    further = [line(told) for row in result.qualities for told in _further(row)]
    return Group(line(text + _compared(metrics)), quality, *further, latency, *devices, size)


def _further(row: Quality) -> list[str]:
    """Return what is told of a model below its figures: what is no number, and bits per byte."""
    found = row.measures
    if found is None:
        return []
    if found.not_finite is not None:
        bad = found.not_finite
        return [
            f"{row.name}: {bad.rows:,} rows of logits hold inf or NaN, the first after token "
            f"{bad.token} at position {bad.position} of window {bad.window}; there are no figures."
        ]
    told = []
    for name, label in (("bits_per_byte", "bits per byte"), ("word_perplexity", "per word")):
        if name in found.figures:
            told.append(f"{label} {found.figures[name]:.4f}")
    if "perplexity" in found.intervals:
        low, high = found.intervals["perplexity"]
        told.append(f"perplexity {low:.4f} to {high:.4f} (95 %)")
    return [f"{row.name}: {', '.join(told)}"] if told else []


def inspection_table(found: Inspection) -> Group:
    """Return what `inspect_numerics` found."""
    # Imported here: it brings torch, as the inspection has.
    from llm_coreml.reference.observe.watch import FP16_MAX

    parts: list[Any] = [
        line(f"{found.tokens:,} tokens of {found.text}; {found.operations:,} floating-point values")
    ]
    if found.overflows:
        table = plain(
            "begins",
            f"in {found.against}" if found.against else "",
            "after attention",
            "inf or NaN begins at",
        )
        for item in found.overflows:
            beside = "" if item.beside is None else f"{item.beside:.5g}"
            kinds = " and ".join(item.begins)
            table.add_row(kinds, beside, str(item.layer), f"{item.name} ({item.type})")
        parts.append(table)
    else:
        parts.append(Text("no value is inf or NaN beyond what masks bring in"))
    if found.nearest:
        table = plain("largest", "headroom", "after attention", "fp16 value")
        for item in found.nearest:
            room = f"{FP16_MAX / item.largest:,.1f}x" if item.largest else ""
            name = f"{item.name} ({item.type})"
            table.add_row(f"{item.largest:.5g}", room, str(item.layer), name)
        parts += [Text(""), table]
    if found.against is not None:
        parts += [Text(""), *_errors(found, f"declared and {found.against} part")]
    return Group(*parts)


def comparison_table(found: Comparison) -> Group:
    """Return what `diff` found."""
    parts: list[Any] = []
    for letter, path in zip("AB", found.programs, strict=True):
        parts.append(line(f"{letter}  {path}"))
    read = f"{found.tokens:,} tokens of {found.text}"
    if found.equal:
        parts.append(
            line(f"no difference: {found.paired:,} operations gave equal values on {read}")
        )
        return Group(*parts)
    parts.append(line(f"{read}; {found.paired:,} operations in common"))
    for letter, alone in zip("AB", found.alone, strict=True):
        if alone:
            counts = ", ".join(f"{count} {name}" for name, count in alone.items())
            parts.append(line(f"only in {letter}: {counts}"))
    parts += [Text(""), *_errors(found, "A and B part"), Text("")]
    first, second = found.qualities
    table = _figures("model", metrics=first.metrics)
    table.add_row("A", *_shown(first))
    table.add_row("B, against A", *_shown(second))
    return Group(*parts, table)


def _errors(found: Inspection | Comparison, what: str) -> list[Any]:
    """Return where two runs part, and the largest error of each layer."""
    if found.first is None:
        sentence = f"nowhere do {what} by more than {found.threshold:g}"
    else:
        where = f"{found.first.name} ({found.first.type}, after attention {found.first.layer})"
        sentence = f"{what} by more than {found.threshold:g} first at {where}"
    table = plain("error", "after attention", "largest in the layer at")
    for item in found.layers:
        error = "inf or NaN" if item.error is None else f"{item.error:.2e}"
        table.add_row(error, str(item.layer), f"{item.name} ({item.type})")
    return [line(sentence), table]


def interface_table(path: str, interface: dict[str, dict[str, str]]) -> Group:
    """Return what a program takes and gives, and how to run it."""
    parts = [listing_table(kind, ports) for kind, ports in interface.items() if ports]
    return Group(
        *parts, line(f"Give the inputs by these names: llm-coreml run {path} --inputs FILE.npz")
    )


def outputs_table(results: dict[str, Any]) -> Group:
    """Return what each output of a run is like."""
    table = plain("output", "type", "shape", "lowest", "highest")
    for name, found in results.items():
        limits = [found["lowest"], found["highest"]]
        told = ["inf or NaN" if limit is None else f"{limit:.6g}" for limit in limits]
        table.add_row(name, found["dtype"], str(found["shape"]), *told)
    return Group(table)


def contents_table(found: Contents) -> Group:
    """Return what `contents.contents` found in a bundle or `.pte`."""
    parts: list[Any] = []
    if found.manifest is not None:
        manifest, source = found.manifest, found.manifest.source
        rows = _export_rows(manifest, found.path)
        rows["rebuild"] = shlex.join(manifest.rebuild) or "from the same live model"
        parts += [
            listing_table(f"{source.name} ({source.kind})", rows),
            *_mixed_formats(manifest.quantization),
            Text(""),
        ]
    if found.rules:
        rows = {
            name: f"{_counted(rule.matrices)}{rule.reason} ({rule.source}); give {rule.flag}"
            for name, rule in found.rules.items()
        }
        parts += [listing_table("breaks the rules", rows), Text("")]
    constants = {name: str(value) for name, value in found.constant_methods.items()}
    if size := found.weights_outside:
        constants["weights outside of Core ML"] = f"{size:,} bytes"
    parts.append(listing_table(f"program, {found.bytes:,} bytes", constants))
    for method, delegates in found.methods.items():
        for delegate in delegates:
            title = f"{method}: {delegate.backend}, {delegate.bytes:,} bytes"
            parts += [Text(""), listing_table(title, delegate_rows(delegate))]
    return Group(*parts)


def systems_table(parts: Sequence[PartSystems]) -> Group:
    """Return which systems run each part of a program, and what asks for them."""
    shown: list[Any] = []
    for part in parts:
        asked = part.asked
        rows = {
            "runs from": f"{asked.declared or 'a newer system'} on",
            "model format": f"{asked.specification}, operations of {', '.join(asked.opsets)}",
            "needs": f"{asked.needed or 'a newer system'}",
        }
        table = plain("from", "what", "first")
        for need in asked.needs:
            table.add_row(need.system or "?", need.what, need.where)
        mixed = [line(f"No system compiles {each}. {MIXED_ADVICE}") for each in asked.mixed]
        shown += [listing_table(part.part, rows), table, *mixed, Text("")]
    return Group(*shown[:-1])


def _counted(matrices: int) -> str:
    return f"{matrices} matrices: " if matrices else ""


def listing_table(title: str, rows: dict[str, str]) -> Table:
    """Return names and what they mean."""
    table = plain(title, "")
    for name, meaning in rows.items():
        table.add_row(name, meaning)
    return table


def lists_table(lists: Mapping[str, dict[str, str]]) -> Group:
    """Return several lists of names and what they mean, by their titles."""
    parts = ((listing_table(title, rows), Text("")) for title, rows in lists.items())
    return Group(*(part for pair in parts for part in pair))


def _figures(*columns: str, metrics: Sequence[Metric]) -> Table:
    """Return an empty table with a column for each metric after those given."""
    labels = [metric.label for metric in metrics]
    return plain(*columns, *labels, numeric=labels)


def _shown(quality: Quality) -> list[str]:
    return [metric.shown(quality.figures.get(metric.name)) for metric in quality.metrics]


def _compared(metrics: Sequence[Metric]) -> str:
    """Return what is a distance from the original: "; KL and agreement against ..."."""
    nouns = list(dict.fromkeys(metric.label.split()[-1] for metric in metrics if metric.compares))
    if not nouns:
        return ""
    listed = " and ".join([", ".join(nouns[:-1]), nouns[-1]] if nouns[1:] else nouns)
    return f"; {listed} against the original"
