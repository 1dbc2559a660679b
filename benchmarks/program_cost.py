"""Operations and bytes of a decoded token: our programs beside those of ExecuTorch's static script.

    python benchmarks/program_cost.py
    python benchmarks/program_cost.py --cases "peer;ane-ios26"

It makes a Llama with the widths and the vocabulary of Llama-3.2-1B and random weights, as a Hugging
Face folder and as Meta's checkpoint, with two layers and with three: what a layer costs is the
difference, and 16 of them with the rest are a token of Llama-3.2-1B. Each is exported by
`llm_coreml`, unverified, and by ExecuTorch's own `export_static_llm_coreml`, for one token at a
time. Nothing is run: operations and bytes are read out of the Core ML programs by the readers of
the reference runtime.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_coreml.artifact import pte
from llm_coreml.artifact.dtypes import DTYPES
from llm_coreml.artifact.mil import Function, Operation, StateType, TensorType, ValueType
from llm_coreml.artifact.packages import Packages
from random_llama import make_model

_PEER = "executorch.examples.apple.coreml.llama.export_static_llm_coreml"
_INT4: dict[str, Any] = {"scheme": "int4-channel", "lm_head": "int4-channel"}
_GROUPS: dict[str, Any] = {"scheme": "int4-group", "lm_head": "int4-group"}
_PARTS: dict[str, Any] = {"linear_split": 1024, "head_split": 16384, "gather_split": 65535}
# The table stands outside of the peer's delegate; ours is as it is cut for tokens of 16 bits.
_PROFILE: dict[str, Any] = {"profile": "ane-ios26", "gather_split": 65535}
_FEWEST: dict[str, Any] = {"norm": "l2", "operations": "fewest"}
# Names -> settings of ours; the peer's are those of its script.
CASES: dict[str, dict[str, Any]] = {
    "peer": {},
    "ane, parts, as ever": {"target": "ane", **_INT4, **_PARTS},
    "ane-ios26": {"target": "ane", **_INT4, **_PROFILE},
    "ane-ios26, conv": {"target": "ane", **_INT4, **_PROFILE, "layout": "conv"},
    "ane-ios18": {"target": "ane", **_INT4, **_PROFILE, "profile": "ane-ios18"},
    "ane, whole, as ever": {"target": "ane", **_INT4},
    "ane, whole, fewest": {"target": "ane", **_INT4, **_FEWEST},
    "peer, b4w": {},
    "gpu, as ever": {"target": "gpu", **_GROUPS},
    "gpu, fewest": {"target": "gpu", **_GROUPS, **_FEWEST},
}
# What differs from the defaults of the peer's script.
_PEERS: dict[str, tuple[str, ...]] = {"peer": (), "peer, b4w": ("--linear_quantize", "b4w")}
_LAYERS = 16
# What moves no numbers: names for what is there.
_NAMES = frozenset({"const", "reshape", "squeeze", "expand_dims", "read_state", "identity"})


@dataclass(frozen=True)
class Cost:
    """What one call costs.

    Attributes:
        operations: By type, constants and what expands them left out.
        weights: Bytes of constants, as they are packed; of a table the rows that are looked up.
        values: Bytes of all else that operations read: activations, caches, masks.
    """

    operations: Counter[str]
    weights: int
    values: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.operations + other.operations,
            self.weights + other.weights,
            self.values + other.values,
        )

    def without(self, other: Cost) -> Cost:
        """Return what this one costs more."""
        more = Counter(self.operations)
        more.subtract(other.operations)
        return Cost(more, self.weights - other.weights, self.values - other.values)

    @property
    def total(self) -> int:
        """All operations."""
        return self.operations.total()


def cost_of(path: Path) -> Cost:
    """Return what the only method of a `.pte` costs, its Core ML programs together."""
    container = pte.read(path)
    packages = Packages(container)
    (method,) = [method for method in container.methods.values() if method.delegates]
    found = Cost(Counter(), 0, 0)
    for delegate in method.delegates:
        lowered = packages.open(delegate)
        found += _function_cost(lowered.package.model.functions[lowered.function])
    return found


def _function_cost(function: Function) -> Cost:
    sources = {output.name: op for op in function.operations for output in op.outputs}
    types = {port.name: port.type for port in function.inputs}
    types |= {output.name: output.type for op in function.operations for output in op.outputs}
    operations: Counter[str] = Counter()
    weights = values = 0
    for op in function.operations:
        if op.type in _NAMES or op.type.startswith("constexpr_"):
            continue
        operations[op.type] += 1
        for parameter, bound in op.inputs.items():
            for name in bound:
                if not isinstance(name, str):
                    continue
                held = _packed(name, sources, types)
                part = _share(op, parameter, types)
                if held is not None:
                    weights += int(held * part)
                else:
                    values += int(_bytes(types[name]) * part)
    return Cost(operations, weights, values)


def _share(op: Operation, parameter: str, types: Mapping[str, ValueType]) -> float:
    """Return which part of an input is read.

    Of a slice or a look-up it is what comes out; of an update in place what is written alone.
    """
    if op.type == "write_state":
        return 0.0
    whole = {"gather": "x", "slice_by_index": "x", "slice_by_size": "x"}
    if whole.get(op.type) == parameter:
        (source,) = op.inputs[parameter]
        assert isinstance(source, str)
        return min(1.0, _bytes(op.outputs[0].type) / max(_bytes(types[source]), 1))
    # A state is updated in place.
    return 0.0 if op.type == "slice_update" and parameter == "x" else 1.0


def _packed(
    name: str, sources: Mapping[str, Operation], types: Mapping[str, ValueType]
) -> int | None:
    """Return the bytes of a constant, as it is packed; None of a value that is computed."""
    op = sources.get(name)
    if op is None or not (op.type == "const" or op.type.startswith("constexpr_")):
        return None
    if op.type == "const":
        return _bytes(types[name])
    parts = [part for bound in op.inputs.values() for part in bound]
    held = sum(
        _packed(part, sources, types) or 0 if isinstance(part, str) else _bytes(part.type)
        for part in parts
    )
    return held + sum(_bytes(part.type) for name, part in op.attributes.items() if name != "name")


def _bytes(kind: ValueType) -> int:
    kind = kind.wrapped if isinstance(kind, StateType) else kind
    if not isinstance(kind, TensorType):
        return 0
    return math.ceil(math.prod(size or 1 for size in kind.shape) * DTYPES[kind.dtype].bits / 8)


def export_ours(folder: Path, settings: Mapping[str, Any], context: int, path: Path) -> None:
    """Lower a model for one token at a time, without verifying it."""
    from llm_coreml.config import ExportConfig, resolve
    from llm_coreml.lower.forms import form_for
    from llm_coreml.model import open_model
    from llm_coreml.quantize import make_plan
    from llm_coreml.quantize.quantized import build_decoder

    model = open_model(folder / "hf")
    job = resolve(ExportConfig(context=context, seq_lengths=(1,), **settings), model.spec)
    decoder = build_decoder(model, job, make_plan(job, model.spec))
    form_for(job, model.spec, bos_id=1, eos_ids=(2,)).write(decoder, path)


def export_peer(folder: Path, options: Sequence[str], context: int, path: Path) -> None:
    """Run ExecuTorch's script for one token at a time, with its own defaults but for `options`."""
    command = [sys.executable, "-m", _PEER, "--output", str(path), "--input_len", "1"]
    command += ["--checkpoint", str(folder / "meta" / "consolidated.00.pth")]
    command += ["--params", str(folder / "meta" / "params.json")]
    command += ["--max_context_len", str(context), *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])


def measure(name: str, folders: tuple[Path, Path], context: int) -> tuple[Cost, Cost]:
    """Return what a layer costs, and what all beside layers does."""
    costs = []
    for folder in folders:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            path = Path(scratch, "model.pte")
            if name in _PEERS:
                export_peer(folder, _PEERS[name], context, path)
            else:
                export_ours(folder, CASES[name], context, path)
            costs.append(cost_of(path))
    layer = costs[1].without(costs[0])
    return layer, costs[0].without(layer).without(layer)


def main() -> None:
    """Measure the cases that are asked for, and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", help="some of them, with semicolons between")
    parser.add_argument("--context", type=int, default=1024)
    options = parser.parse_args()
    columns = "case", "ops per layer", "weights, MB", "values, MB", "ops beside", "weights, MB"
    columns += "ops of 16 layers", "bytes of 16 layers, MB"
    with tempfile.TemporaryDirectory() as place:
        folders = Path(place, "two"), Path(place, "three")
        for folder, layers in zip(folders, ("2", "3"), strict=True):
            folder.mkdir()
            make_model(str(folder), "1b", layers, "hf,meta")
        print(f"| {' | '.join(columns)} |")
        print(f"|---|{'--:|' * (len(columns) - 1)}", flush=True)
        for name in options.cases.split(";") if options.cases else CASES:
            layer, rest = measure(name, folders, options.context)
            print(f"| {name} | {' | '.join(_row(layer, rest))} |", flush=True)
            told = {kind: n for kind, n in layer.operations.most_common() if n}
            print(f"{name}: {told}", file=sys.stderr, flush=True)


def _row(layer: Cost, rest: Cost) -> list[str]:
    every = [cost.weights + cost.values for cost in (layer, rest)]
    return [
        str(layer.total),
        f"{layer.weights / 1e6:.3f}",
        f"{layer.values / 1e6:.3f}",
        str(rest.total),
        f"{rest.weights / 1e6:.2f}",
        f"{_LAYERS * layer.total + rest.total:,}",
        f"{(_LAYERS * every[0] + every[1]) / 1e6:.1f}",
    ]


if __name__ == "__main__":
    main()
