"""Models that Core ML has compiled, in the place of those that the reference runtime can read.

    check_compiler()                           # before any work: only macOS has one
    compile_program(Path("model.pte"))         # after the program in it was verified

Devices compile a model when they first load it, and keep what they made. A file that is compiled
beforehand spares them that, and can be read by Core ML alone: it is verified before.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import numpy as np
from executorch.backends.apple.coreml.compiler import CoreMLBackend
from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary

from llm_coreml.artifact.inmemoryfs import pack, unpack
from llm_coreml.artifact.mapped import map_folder
from llm_coreml.artifact.packages import BACKEND, COMPILED_MODEL, MODEL, REFERENCE_MARK
from llm_coreml.drafts import draft_file
from llm_coreml.errors import ArtifactError, UnsupportedError

# From a package to the folder of the compiled model.
Compiler = Callable[[Path], Path]
_TYPE = CoreMLBackend.generate_model_type_compile_spec(CoreMLBackend.MODEL_TYPE.COMPILED_MODEL)


def check_compiler() -> None:
    """Refuse a machine without a compiler. Raises UnsupportedError."""
    if sys.platform != "darwin":
        raise UnsupportedError(
            "--model-type compiled_model needs macOS, whose Core ML compiles the model, and this "
            f"is {sys.platform}; leave it out: a device compiles the model when it first loads it."
        )


def core_ml_compiler(package: Path) -> Path:
    """Compile a package by Core ML, which loads it for that; on macOS."""
    import coremltools as ct

    return Path(ct.models.MLModel(str(package)).get_compiled_model_path())


def compile_program(path: Path, compiler: Compiler | None = None) -> None:
    """Compile every Core ML model of the `.pte` at `path`, in its place.

    Args:
        path: A program that was verified.
        compiler: What compiles; None is Core ML.
    """
    compiles = core_ml_compiler if compiler is None else compiler
    # A file may be most of the memory: it is mapped, and written piece by piece.
    file = deserialize_pte_binary(_Mapped(np.memmap(path, mode="r")))
    ours = [
        delegate
        for plan in file.program.execution_plan
        for delegate in plan.delegates
        if delegate.id == BACKEND
    ]
    for delegate in ours:
        others = [spec for spec in delegate.compile_specs if spec.key != _TYPE.key]
        delegate.compile_specs = [*others, _TYPE]
    shared: set[str] = set()
    for index in {delegate.processed.index for delegate in ours}:
        held = file.program.backend_delegate_data[index]
        data = bytes(held.data)
        if data.startswith(REFERENCE_MARK):
            shared.add(json.loads(data[len(REFERENCE_MARK) :])["key"])
        else:
            held.data = _compiled(data, compiles)
    for buffer in {file.named_data.pte_data[key].buffer_index for key in shared}:
        model = bytes(file.named_data.buffers[buffer])
        file.named_data.buffers[buffer] = _compiled(model, compiles)
    with draft_file(path.parent) as draft:
        with draft.open("wb") as out:
            serialize_pte_binary(file, extract_delegate_segments=True).write_to_file(out)
        draft.replace(path)


@final
class _Mapped:
    """The bytes of a file from an offset on: a slice to the end is mapped, too, others are bytes.

    ExecuTorch's reader takes the rest of a file and cuts parts out of that, each of them a copy.
    """

    def __init__(self, octets: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        self._octets = octets

    def __len__(self) -> int:
        return len(self._octets)

    def __getitem__(self, part: slice) -> Any:
        cut = self._octets[part]
        return _Mapped(cut) if part.stop is None else cut.tobytes()


def _compiled(blob: bytes, compiler: Compiler) -> bytes:
    """Return a delegate's blob with its model compiled."""
    files = unpack(blob)
    if "metadata.json" not in files:
        raise ArtifactError("A Core ML delegate has no metadata.json; export again.")
    with tempfile.TemporaryDirectory(prefix="llm-coreml-") as folder:
        for name, content in files.items():
            if name.startswith(f"{MODEL}/"):
                place = Path(folder, name)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content)
        compiled = compiler(Path(folder, MODEL))
        made = {f"{COMPILED_MODEL}/{name}": data for name, data in map_folder(compiled).items()}
        return pack({**made, "metadata.json": files["metadata.json"]})
