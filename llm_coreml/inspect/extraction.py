"""The Core ML models of a bundle or a `.pte`, as the packages that Xcode and coremltools open.

    extract(Path("out"), Path("models")).models[0].path        # 'model-0.mlpackage'

A model that several methods share is written once, with all of its functions; `models.json` says
which method runs what. The same file gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_coreml.artifact import pte
from llm_coreml.artifact.limits import MAX_JSON
from llm_coreml.artifact.mapped import MAX_FILES
from llm_coreml.artifact.method_plan import Delegate
from llm_coreml.artifact.packages import BACKEND, COMPILED_MODEL, MODEL, Folder, Packages
from llm_coreml.bundle.folder import program_at
from llm_coreml.errors import ArtifactError
from llm_coreml.output import check_name, check_replaceable, folder_beside, write_json

INDEX = "models.json"
# What every file system of today takes as a name, and macOS as a path.
_LONGEST_NAME, _LONGEST_PATH = 255, 1024


@dataclass(frozen=True)
class ModelUse:
    """A part of a method that runs a model.

    Attributes:
        method: The method's name.
        partition: Which of its parts for Core ML, counted from 0.
        function: The model's function; "" in a compiled one is its default.
        inputs: Names of the model's inputs, in the order in which the method gives them.
        outputs: The same of what it takes from it.
    """

    method: str
    partition: int
    function: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class ExtractedModel:
    """A model that was written.

    Attributes:
        path: Its folder, within that of the extraction.
        files: Bytes of its files, by path.
        used_by: What runs it, one at least.
    """

    path: str
    files: Mapping[str, int]
    used_by: tuple[ModelUse, ...]


@dataclass(frozen=True)
class Extraction:
    """A folder of models.

    Attributes:
        folder: Where it is.
        models: What it holds, in the order in which methods use them.
    """

    folder: str
    models: tuple[ExtractedModel, ...]

    def to_json(self) -> dict[str, Any]:
        """Return what `models.json` says, and where it is."""
        return {"folder": self.folder, **_index(self.models)}


def extract(
    artifact: str | Path, output: str | Path, *, overwrite: bool = False, checked: bool = True
) -> Extraction:
    """Write every Core ML model of a bundle or `.pte` to a folder; nothing is run or compiled.

    Args:
        artifact: Bundle, or a `.pte` of any exporter.
        output: Folder to make.
        overwrite: Replace an earlier extraction at `output`.
        checked: Refuse a bundle whose files have changed since the export wrote them.

    Raises:
        ArtifactError: the file is damaged, or holds no Core ML model.
        OutputError: `output` exists or cannot be written; nothing is left there.
    """
    place = Path(output)
    check_name(place)
    _check_place(place, overwrite)
    folders, models = _models(pte.read(program_at(Path(artifact), checked)))
    with folder_beside(place, lambda path: _check_place(path, overwrite)) as draft:
        for folder, model in zip(folders, models, strict=True):
            _write(folder, model, draft)
        write_json(draft / INDEX, _index(models))
    return Extraction(str(output), models)


def _index(models: tuple[ExtractedModel, ...]) -> dict[str, Any]:
    return {"models": [asdict(model) for model in models]}


def _check_place(place: Path, overwrite: bool) -> None:
    check_replaceable(place, overwrite, _ours, "which no extraction wrote")


def _ours(place: Path) -> set[str]:
    """Return the names that the index of an earlier extraction lists."""
    try:
        with (place / INDEX).open("rb") as file:
            count = len(json.loads(file.read(MAX_JSON))["models"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()
    roots = (MODEL, COMPILED_MODEL)
    return {INDEX, *(_name(number, root) for number in range(count) for root in roots)}


def _name(number: int, root: str) -> str:
    return f"model-{number}{Path(root).suffix}"


def _models(container: pte.Container) -> tuple[list[Folder], tuple[ExtractedModel, ...]]:
    packages = Packages(container)
    delegates = [each for method in container.methods.values() for each in method.delegates]
    uses: dict[int, tuple[Folder, list[ModelUse]]] = {}
    counted: dict[str, int] = {}
    for delegate in delegates:
        if delegate.backend == BACKEND:
            partition = counted.get(delegate.method, 0)
            counted[delegate.method] = partition + 1
            folder, use = _use(delegate, packages, partition)
            uses.setdefault(id(folder), (folder, []))[1].append(use)
    if not uses:
        others = ", ".join(sorted({delegate.backend for delegate in delegates}))
        raise ArtifactError(
            f"'{container.path}' holds no Core ML model to extract: it is lowered for "
            f"{others or 'no backend'}. Export with --backend coreml."
        )
    models = tuple(
        _extracted(number, folder, used_by)
        for number, (folder, used_by) in enumerate(uses.values())
    )
    return [folder for folder, _ in uses.values()], models


def _use(delegate: Delegate, packages: Packages, partition: int) -> tuple[Folder, ModelUse]:
    found = packages.find(delegate)
    # What can be read is held against itself.
    function = found.function if found.folder.compiled else packages.open(delegate).function
    return found.folder, ModelUse(delegate.method, partition, function, found.inputs, found.outputs)


def _extracted(number: int, folder: Folder, used_by: list[ModelUse]) -> ExtractedModel:
    root = _root(folder)
    path = _name(number, root)
    inside = {
        name.removeprefix(f"{root}/"): len(content)
        for name, content in folder.files.items()
        if name.startswith(f"{root}/")
    }
    if len(inside) > MAX_FILES:
        raise ArtifactError(f"A Core ML model of {len(inside):,} files is none; export it again.")
    for name in inside:
        _check_file(name)
    if not folder.compiled:
        _check_entries(folder, inside)
    return ExtractedModel(path, inside, tuple(used_by))


def _root(folder: Folder) -> str:
    return COMPILED_MODEL if folder.compiled else MODEL


def _check_file(name: str) -> None:
    """Refuse what no file system should be asked to hold; `inmemoryfs` has checked the rest."""
    try:
        octets = name.encode()
    except UnicodeEncodeError:
        octets = b"-" * (_LONGEST_PATH + 1)
    longest = max(map(len, octets.split(b"/")))
    if longest > _LONGEST_NAME or len(octets) > _LONGEST_PATH or not name.isprintable():
        raise ArtifactError(
            f"The Core ML model has a part whose name no exporter gives: '{name}'. Nothing was "
            "written; export it again."
        )


def _check_entries(folder: Folder, files: Collection[str]) -> None:
    """Refuse a package whose manifest sends readers out of it, or into a file."""
    for path in _entries(folder):
        _check_file(path)
        parts = path.split("/")
        above = {f"Data/{'/'.join(parts[:count])}" for count in range(1, len(parts))}
        if not {"", ".", ".."}.isdisjoint(parts) or not above.isdisjoint(files):
            raise ArtifactError(
                f"The Core ML model's Manifest.json names '{path}', which is no place in the "
                "package. Nothing was written; export it again."
            )


def _entries(folder: Folder) -> list[str]:
    """Return the paths below `Data` that the manifest of a package names."""
    manifest = json.loads(bytes(folder.files[f"{MODEL}/Manifest.json"][:MAX_JSON]))
    entries = manifest["itemInfoEntries"]
    listed = entries.values() if isinstance(entries, dict) else entries
    paths = [entry.get("path") if isinstance(entry, dict) else None for entry in listed]
    return [path if isinstance(path, str) else "" for path in paths]


def _write(folder: Folder, model: ExtractedModel, draft: Path) -> None:
    place = draft / model.path
    for name in model.files:
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(folder.files[f"{_root(folder)}/{name}"])
    # A blob holds no empty folder, such as that of the weights of a model without any.
    for entry in [] if folder.compiled else _entries(folder):
        if not (place / "Data" / entry).is_file():
            (place / "Data" / entry).mkdir(parents=True, exist_ok=True)
