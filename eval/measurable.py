"""What can be evaluated, opened: a bundle, a bare .pte, a .mlpackage, or a model in PyTorch.

with open_measurable("out", Choice(), progress) as opened:
opened.runner.logits([1, 42, 7]), opened.subject.kind
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from llm_coreml.bundle.bundled_tokenizer import write_tokenizer
from llm_coreml.bundle.folder import (
    PROGRAM,
    RESULTS,
    TOKENIZER,
    Bundle,
    is_bundle,
    may_be_bundle,
    open_bundle,
)
from llm_coreml.bundle.seal import file_sha256
from llm_coreml.errors import CheckpointError, ConfigError
from llm_coreml.eval.originals import EAGER, originals
from llm_coreml.eval.results import Subject
from llm_coreml.eval.runtimes import AUTO, REFERENCE, bundle_runner, program_runner_of
from llm_coreml.eval.runtimes import EAGER as EAGERLY
from llm_coreml.eval.sizes import measure_bytes
from llm_coreml.model import open_model
from llm_coreml.output import check_writable
from llm_coreml.progress import Progress
from llm_coreml.quantize.quantized import build_original
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.eager import EagerRunner
from llm_coreml.runtime.package_runner import PackageRunner
from llm_coreml.runtime.reference import DECLARED
from llm_coreml.runtime.runner import Runner

Originals = tuple[dict[str, EagerRunner], str]
Weights = str | Path | torch.nn.Module
# Windows are shorter, and prompts that are timed.
_CONTEXT = 2048


@dataclass(frozen=True)
class Choice:
    """How something is evaluated.

    Attributes:
        model: The original, where it is not found by itself.
        tokenizer: A `tokenizer.json` or a folder with one, where none belongs to it; of a live
            model its tokenizer.
        runtime: `auto`, `reference`, `executorch` or `eager`.
        execution: Numerics, device and memory of the reference runtime.
        checked: Refuse a bundle whose files have changed since the export wrote them.
        alone: Look at no original.
    """

    model: Weights | None = None
    tokenizer: Any = None
    runtime: str = AUTO
    execution: Execution = DECLARED
    checked: bool = True
    alone: bool = False


@dataclass(frozen=True, eq=False)
class Measurable:
    """Something that can be evaluated.

    Attributes:
        subject: What it is.
        runner: Reads tokens.
        load_seconds: Until it could.
        tokenizer: Its `tokenizer.json`, None without one.
        originals: Opens the models that it is compared to: by name, and the hash of the original's
            weights.
        facts: What its own figures follow from, by name.
        sizes: Bytes of every part.
        program_bytes: What a device loads.
        source: What it was made from, None if nobody knows.
        program_sha256: Hash of the `.pte`, None if it is none.
        bundle: The bundle, None if it is none.
    """

    subject: Subject
    runner: Runner
    load_seconds: float
    tokenizer: Path | None
    originals: Callable[[], Originals]
    facts: Mapping[str, str]
    sizes: dict[str, int]
    program_bytes: int
    source: dict[str, Any] | None = None
    program_sha256: str | None = None
    bundle: Bundle | None = field(default=None, repr=False)


@contextlib.contextmanager
def open_measurable(what: Weights, choice: Choice, progress: Progress) -> Iterator[Measurable]:
    """Open a bundle, a `.pte`, a `.mlpackage`, or a model: a folder, a hub id, or a live one.

    Args:
        what: What is evaluated.
        choice: How.
        progress: Told what a user should know.

    Raises:
        ArtifactError: it is damaged, or not a language model's.
        CheckpointError: the original is absent, or is another model.
        ConfigError: the choice contradicts what it is.
        OutputError: the results of a bundle cannot be written.
        SystemUnfitError: the runtime is not on this system.
    """
    kind = kind_of(what)
    if kind == "bundle":
        yield _bundle(Path(str(what)), choice, progress)
    elif kind == "eager":
        with tempfile.TemporaryDirectory(prefix="llm-coreml-") as place:
            yield _eager(what, choice, Path(place), progress)
    else:
        yield _program(Path(str(what)), kind, choice)


def kind_of(what: Weights) -> str:
    """Return what something is: `bundle`, `pte`, `mlpackage` or `eager`.

    Raises:
        ArtifactError: nobody may look, or no file can have such a name.
    """
    if isinstance(what, torch.nn.Module):
        return "eager"
    path = Path(what)
    if may_be_bundle(path) and is_bundle(path):
        return "bundle"
    if path.suffix == ".mlpackage" or (path / "Manifest.json").is_file():
        return "mlpackage"
    if path.suffix == ".pte":
        return "pte"
    if path.exists():
        models = path.suffix == ".gguf" or any(path.glob("*.gguf"))
        return "eager" if models or (path / "config.json").is_file() else "bundle"
    # A hub id has an owner, which is no folder here.
    owner, _, name = str(what).partition("/")
    hub = name and "/" not in name and owner not in ("", ".", "..", "~")
    return "eager" if hub and not Path(owner).exists() else "bundle"


def _bundle(path: Path, choice: Choice, progress: Progress) -> Measurable:
    if choice.tokenizer is not None:
        raise ConfigError("A bundle has its own tokenizer; leave --tokenizer out.")
    bundle = open_bundle(path, choice.checked)
    check_writable(bundle.folder, RESULTS)
    begun = time.perf_counter()
    source, made = bundle.manifest.source, dict[str, EagerRunner]()
    if choice.runtime == EAGERLY:
        _check_eager(choice)
        made = originals(bundle, choice.model, progress)
        if "quantized" not in made:
            raise ConfigError(
                "The quantized model of this bundle cannot be made again, so that there is none to "
                "run with --runtime eager; leave it out."
            )
    runner = made.pop("quantized", None) or bundle_runner(bundle, choice.runtime, choice.execution)
    seconds = time.perf_counter() - begun

    def others() -> Originals:
        if choice.alone:
            return {}, ""
        return made or originals(bundle, choice.model, progress), source.sha256

    sizes, program = measure_bytes(bundle), file_sha256(bundle.program)
    return Measurable(
        subject=Subject("bundle", bundle.folder.resolve().name, program),
        runner=runner,
        load_seconds=seconds,
        tokenizer=bundle.tokenizer if bundle.tokenizer.is_file() else None,
        originals=others,
        facts={
            "program": program,
            "manifest": json.dumps(bundle.manifest.to_json(), sort_keys=True),
        },
        sizes=sizes,
        program_bytes=sizes[PROGRAM],
        source=asdict(source),
        program_sha256=program,
        bundle=bundle,
    )


def _program(path: Path, kind: str, choice: Choice) -> Measurable:
    """Open a program without a bundle: nothing tells what it was made from."""
    begun = time.perf_counter()
    runner: Runner
    if kind == "pte":
        runner = program_runner_of(path, choice.runtime, choice.execution)
        sha256 = file_sha256(path)
        sizes = {path.name: path.stat().st_size}
    else:
        if choice.runtime not in (AUTO, REFERENCE):
            raise ConfigError(
                f"--runtime {choice.runtime} does not run a .mlpackage; the reference runtime does."
            )
        runner, sha256 = PackageRunner(path, choice.execution), _folder_sha256(path)
        files = (each for each in sorted(path.rglob("*")) if each.is_file())
        sizes = {f"{path.name}/{each.relative_to(path)}": each.stat().st_size for each in files}
    seconds = time.perf_counter() - begun
    return Measurable(
        subject=Subject("pte" if kind == "pte" else "mlpackage", path.name, sha256),
        runner=runner,
        load_seconds=seconds,
        tokenizer=_tokenizer(choice.tokenizer, path.parent),
        originals=lambda: _original(choice, runner),
        facts={"program": sha256},
        sizes=sizes,
        program_bytes=sum(sizes.values()),
        program_sha256=sha256 if kind == "pte" else None,
    )


def _eager(what: Weights, choice: Choice, place: Path, progress: Progress) -> Measurable:
    """Open a model in PyTorch; a file for its tokenizer is written into `place`."""
    if choice.runtime not in (AUTO, EAGERLY):
        raise ConfigError(
            f"--runtime {choice.runtime} runs exports, and this is a model; export it, or leave "
            "--runtime out."
        )
    _check_eager(choice)
    live = isinstance(what, torch.nn.Module)
    begun = time.perf_counter()
    model = open_model(what, tokenizer=choice.tokenizer if live else None)
    context = min(_CONTEXT, model.spec.longest_context)
    decoder = build_original(model, context)
    runner = EagerRunner(decoder, EAGER)
    seconds = time.perf_counter() - begun
    if live or choice.tokenizer is None:
        write_tokenizer(model, place, progress.note)
    own = place / TOKENIZER
    size = sum(value.numel() * value.element_size() for value in decoder.parameters())
    sha256 = model.sha256()
    return Measurable(
        subject=Subject("eager", model.source.name, sha256),
        runner=runner,
        load_seconds=seconds,
        tokenizer=own if own.is_file() else _tokenizer(choice.tokenizer, None),
        originals=lambda: _original(choice, runner),
        facts={"program": sha256, "spec": repr(model.spec)},
        sizes={"weights": size},
        program_bytes=size,
        source=asdict(model.source),
    )


def _original(choice: Choice, runner: Runner) -> Originals:
    """Return the original that the user names, and the hash of its weights; nothing without."""
    if choice.model is None or choice.alone:
        return {}, ""
    opened = open_model(choice.model)
    if opened.spec.vocab_size != runner.vocab_size:
        raise CheckpointError(
            f"'{opened.source.name}' has {opened.spec.vocab_size} tokens, and what is evaluated "
            f"{runner.vocab_size}; give the model that it was made from with --model."
        )
    decoder = build_original(opened, runner.context)
    return {"original": EagerRunner(decoder, EAGER)}, opened.sha256()


def _tokenizer(given: Any, beside: Path | None) -> Path:
    """Return the `tokenizer.json` that is meant, the one beside a program if none is named."""
    if isinstance(given, (str, Path)):
        path = Path(given)
        path = path / TOKENIZER if path.is_dir() else path
        if not path.is_file():
            raise ConfigError(f"--tokenizer '{path}' is no file; give a {TOKENIZER}.")
        return path
    if given is None and beside is not None and (beside / TOKENIZER).is_file():
        return beside / TOKENIZER
    raise ConfigError(
        "No tokenizer that can be read here belongs to what is evaluated, and it is measured on a "
        f"text; give a {TOKENIZER}, or its folder, with --tokenizer."
    )


def _check_eager(choice: Choice) -> None:
    """Refuse what a model in PyTorch has no choice of."""
    if choice.execution != DECLARED:
        raise ConfigError(
            "PyTorch runs a model in fp32 on the CPU here; leave mode and device out, or evaluate "
            "an export by the reference runtime."
        )


def _folder_sha256(path: Path) -> str:
    """Return a hash of all files in a folder, their names included."""
    digest = hashlib.sha256()
    for each in sorted(path.rglob("*")):
        if each.is_file():
            digest.update(f"{each.relative_to(path).as_posix()}\n{file_sha256(each)}\n".encode())
    return digest.hexdigest()
