"""A delta made of two bundles, or of a bundle and a model that is exported as that one was.

    make_delta("base", "tuned", output="delta").bytes

What is written has been applied, its result compared with the second bundle byte by byte, and run.
"""

from __future__ import annotations

import lzma
import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch

from llm_coreml.artifact.mapped import map_file
from llm_coreml.bundle.bundle_runner import open_runner
from llm_coreml.bundle.folder import CARD, MANIFEST, PROGRAM, Bundle, is_bundle, open_bundle
from llm_coreml.bundle.seal import file_sha256
from llm_coreml.config import ExportConfig
from llm_coreml.config.values import checked_count
from llm_coreml.delta.applying import write_result
from llm_coreml.delta.comparing import hold_to, measure
from llm_coreml.delta.delta_record import (
    CHANGES,
    RECORD,
    DeltaRecord,
    Made,
    Measured,
    new_record,
    read_delta,
)
from llm_coreml.delta.parts import Part, changes, compare, merged
from llm_coreml.delta.places import places
from llm_coreml.errors import ArtifactError, ConfigError
from llm_coreml.eval.originals import EAGER
from llm_coreml.heads import LOGITS, Head
from llm_coreml.model import open_model
from llm_coreml.output import check_name, check_replaceable, folder_beside, write_json
from llm_coreml.pipeline import export
from llm_coreml.progress import Progress, Silent
from llm_coreml.quantize.calibrate.text import BUNDLED_TEXT
from llm_coreml.quantize.quantized import build_original
from llm_coreml.runtime.eager import EagerRunner
from llm_coreml.runtime.runner import Runner

DEFAULT_TOKENS = 256
# Of XZ: higher ones take twice the time for a hundredth of the bytes.
_PRESET = 4


@dataclass(frozen=True)
class Delta:
    """A delta that was written.

    Attributes:
        folder: Where it is.
        bytes: What its files take.
        full_bytes: What the files of the bundle take that it stands for.
        copied: Bytes of the program that are the base's.
        changed: Bytes of it in parts that differ in the two.
        new: Bytes of it that the base has no counterpart of.
        measured: What was found of base and delta together.
    """

    folder: str
    bytes: int
    full_bytes: int
    copied: int
    changed: int
    new: int
    measured: Measured | None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def make_delta(
    base: str | Path,
    tuned: str | Path | torch.nn.Module,
    tokenizer: Any = None,
    *,
    output: str | Path,
    text: str | Path | None = None,
    tokens: int = DEFAULT_TOKENS,
    max_kl: float | None = None,
    adapters: Literal["merged", "beside"] | None = None,
    keep_codes: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Delta:
    """Write what makes one bundle of another, once base and delta together were run.

    Args:
        base: The bundle that is there already.
        tuned: The bundle that is wanted; or a model (folder, adapter, hub id, live), which is
            exported with the base's settings.
        tokenizer: Of a live model.
        output: Folder to make.
        text: UTF-8 file to compare predictions on; None takes the held-out text.
        tokens: Most tokens to score.
        max_kl: Gate: largest mean KL of the result from `tuned`, in nats.
        adapters: Of a model that is exported here, see `ExportConfig`; None is as the base.
        keep_codes: Of a model that is exported here: keep the base's codes, and fit scales and
            tables to its weights.
        overwrite: Replace an earlier delta at `output`.
        progress: Told of stages and shares.

    Raises:
        GateError: the gate is not held; nothing is written.
        LlmCoreMLError: see `errors`; nothing is left at `output` that was not there before.
    """
    checked_count("--tokens", tokens)
    if max_kl is not None and not (math.isfinite(max_kl) and max_kl >= 0):
        raise ConfigError(f"--max-kl is {max_kl:g}; it must be finite, 0 or more.")
    progress, place = progress or Silent(), Path(output)
    check_name(place)
    _check_place(place, overwrite)
    opened = open_bundle(Path(base))
    config = _settings(opened, tuned, adapters, keep_codes, max_kl)
    with (
        folder_beside(place, lambda path: _check_place(path, overwrite)) as draft,
        tempfile.TemporaryDirectory() as folder,
    ):
        scratch = Path(folder)
        wanted, reference = _wanted(config, tuned, tokenizer, scratch, progress)
        progress.stage("delta")
        files = _write_changes(opened, wanted, draft / CHANGES, progress)
        record = _record(opened, files, draft / CHANGES, None)
        result = _made(opened, record, draft / CHANGES, scratch / "made")
        progress.stage("score")
        found = measure(result, opened, reference, text, tokens, progress)
        hold_to(found, max_kl)
        record = _record(opened, files, draft / CHANGES, found)
        write_json(draft / RECORD, record.to_json())
    return _told(place, record)


def _is_bundle(tuned: str | Path | torch.nn.Module) -> TypeGuard[str | Path]:
    return not isinstance(tuned, torch.nn.Module) and is_bundle(Path(tuned))


def _settings(
    base: Bundle,
    tuned: str | Path | torch.nn.Module,
    adapters: Literal["merged", "beside"] | None,
    keep_codes: bool,
    max_kl: float | None,
) -> ExportConfig:
    """Return with what a model is exported, as far as that can be and comes to what is wanted.

    Raises:
        ConfigError: the base's settings name files of which it holds no more than the names, or
            there is no model.
        UnmeasuredError: a gate needs logits that such an export does not give.
    """
    config = ExportConfig.from_json(base.manifest.config)
    if _is_bundle(tuned):
        asked = "--keep-codes" if keep_codes else adapters and f"--adapters {adapters}"
        if asked:
            raise ConfigError(
                f"{asked} is for a model that is exported, and '{tuned}' is an "
                "export already; leave it out, or give the model."
            )
        return config
    if keep_codes:
        config = _over_codes(base, config)
    files = {"calibrate": config.calibrate, "plan": config.plan, "codes-of": config.codes_of}
    for name, file in files.items():
        if file is not None and file != BUNDLED_TEXT and not Path(file).exists():
            raise ConfigError(
                f"The base was exported with --{name} {file}, a file of which it holds no more "
                "than the name; work in its folder, or export TUNED yourself and give the bundle."
            )
    if Head.of(config.head) != LOGITS:
        hold_to(None, max_kl)
    return config if adapters is None else replace(config, adapters=adapters)


def _over_codes(base: Bundle, config: ExportConfig) -> ExportConfig:
    """Return settings with the base's codes, and with the formats that these have."""
    config = replace(config, codes_of=str(base.folder))
    # What settings choose by the weights, they would choose otherwise by others.
    fixed = config.pt2e != "none" or base.manifest.plan_json() is None
    return config if fixed else config.under({"plan": str(base.folder / MANIFEST)})


def _made(base: Bundle, record: DeltaRecord, kept: Path, folder: Path) -> Bundle:
    """Return what base and delta make, once it is known to be what was wanted by its hashes."""
    folder.mkdir()
    write_result(base, record, kept, folder)
    return open_bundle(folder)


def _wanted(
    config: ExportConfig,
    tuned: str | Path | torch.nn.Module,
    tokenizer: Any,
    scratch: Path,
    progress: Progress,
) -> tuple[Bundle, Runner]:
    """Return the bundle to make, and what its predictions are compared with.

    That is the bundle that was given, or the unquantized model of which one is exported here.
    """
    if _is_bundle(tuned):
        found = open_bundle(Path(tuned))
        return found, open_runner(found)
    exported = export(
        tuned, tokenizer, output=scratch / "tuned", config=config, cache=False, progress=progress
    )
    model = open_model(tuned, tokenizer, family=config.family)
    original = build_original(model, exported.manifest.program.context)
    return exported, EagerRunner(original, EAGER)


def _write_changes(base: Bundle, wanted: Bundle, path: Path, progress: Progress) -> dict[str, Made]:
    """Write all that the base does not have, and return how each file is made."""
    names = sorted({MANIFEST, *wanted.manifest.listed})
    total = sum((wanted.folder / name).stat().st_size for name in names) or 1
    done, files = 0, {}
    packed = lzma.LZMACompressor(lzma.FORMAT_XZ, preset=_PRESET)
    with path.open("xb") as file:
        for name in names:
            target = wanted.folder / name
            content = map_file(target)
            source, parts = _parts(base, name, target, content)
            for piece in changes(source, content, parts):
                file.write(packed.compress(piece))
                done += len(piece)
                progress.advance(min(done / total, 1.0))
            files[name] = Made(len(content), file_sha256(target), merged(parts))
        file.write(packed.flush())
    return files


def _parts(
    base: Bundle, name: str, target: Path, content: memoryview
) -> tuple[memoryview, list[Part]]:
    """Return the base's file of that name, and what of the wanted one can be made of it."""
    new = [Part("new", len(content))] if len(content) else []
    if name in (CARD, MANIFEST) or name not in base.manifest.listed:
        return memoryview(b""), new
    source = map_file(base.folder / name)
    if name == PROGRAM:
        return source, compare(source, places(base.program), content, places(target))
    return source, [Part("copy", len(content))] if source == content and new else new


def _record(
    base: Bundle, files: Mapping[str, Made], kept: Path, found: Measured | None
) -> DeltaRecord:
    manifest = base.manifest
    return new_record(manifest.program.sha256, manifest.source.name, files, kept, found)


def _told(folder: Path, record: DeltaRecord) -> Delta:
    def of_program(how: str) -> int:
        return sum(part.bytes for part in record.files[PROGRAM].parts if part.how == how)

    return Delta(
        str(folder),
        record.changes.bytes + (folder / RECORD).stat().st_size,
        record.result_bytes,
        of_program("copy"),
        of_program("change"),
        of_program("new"),
        record.measured,
    )


def _check_place(place: Path, overwrite: bool) -> None:
    check_replaceable(place, overwrite, _ours, "which no delta is made of")


def _ours(place: Path) -> set[str]:
    try:
        read_delta(place)
    except ArtifactError:
        return set()
    return {RECORD, CHANGES}
