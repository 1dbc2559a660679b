"""The published configuration of every family, with random weights, exported for each target.

Each file of a folder of `config.json` files, named after its model, is taken with its real widths,
heads, vocabulary, windows and rotary settings, and with as few layers as show its pattern (at least
two). It is exported at 4 bits and verified as any other, for every target in a process of its own:
seconds, peak memory and size of the program. What has no family is listed with what is said of it.

    python benchmarks/published_configs.py CONFIGS --rows rows.jsonl
    python benchmarks/published_configs.py CONFIGS --only Qwen-Qwen3-0.6B --targets gpu
    python benchmarks/published_configs.py CONFIGS --show --rows rows.jsonl

Rows that are in the file already are not made again, so that a run can be taken up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Nothing heavy is imported here: on Linux a new process inherits its parent's peak memory.

TARGETS = ("gpu", "ane")
LEAST_LAYERS = 2
COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
SHARING = "num_kv_shared_layers"
# Random numbers at a time: a table of a large model in fp32 would be most of the memory.
DRAWN = 1 << 24
QUANTIZED = ("quantization_config", "compression_config", "quantization")


def shortened(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with as few layers as show all kinds that its family makes of it."""
    from llm_coreml.families import find_family

    found = {key: value for key, value in config.items() if key not in QUANTIZED}
    layers = find_family(found).spec(found).layers
    kinds = set(map(repr, layers))
    count = LEAST_LAYERS
    while set(map(repr, layers[:count])) != kinds:
        count += 1
    for key, value in found.items():
        if key in COUNTS:
            found[key] = count
        elif isinstance(value, list) and len(value) == len(layers):
            found[key] = value[:count]  # an entry for each layer
    if found.get(SHARING):  # the last ones, of which some are left
        found[SHARING] = max(0, count - len(layers) + found[SHARING])
    return found


def write_model(config: Mapping[str, Any], folder: Path) -> None:
    """Write a checkpoint of random bf16 weights, as its family names them, a file for each."""
    import torch
    from safetensors.torch import save_file

    from llm_coreml.checkpoint.weights_view import expected_tensors
    from llm_coreml.decoder import skeleton
    from llm_coreml.families import find_family

    family = find_family(config)
    spec = family.spec(config)
    shapes = {name: tuple(each.shape) for name, each in skeleton(spec).named_parameters()}
    draw = torch.Generator().manual_seed(0)
    files = {}
    for name, shape in expected_tensors(family.stored(spec), shapes).items():
        values = torch.empty(shape, dtype=torch.bfloat16)
        near_one = len(shape) == 1 and not name.endswith("bias")  # gains and factors
        for piece in values.view(-1).split(DRAWN):
            drawn = 0.02 * torch.randn(piece.shape, generator=draw, dtype=torch.float32)
            piece.copy_(1 + drawn if near_one else drawn)
        files[name] = f"model-{len(files):05}.safetensors"
        save_file({name: values}, folder / files[name])
    (folder / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
    index = json.dumps({"weight_map": files})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def prepare(path: str, folder: str) -> dict[str, Any]:
    """Write the model of one configuration; return what it is, or what is said of it."""
    from llm_coreml.checkpoint.wrappers import text_part
    from llm_coreml.errors import LlmCoreMLError

    config = json.loads(Path(path).read_text(encoding="utf-8"))
    try:
        read = text_part(config).config
        small = shortened(read)
        write_model(small, Path(folder))
    except LlmCoreMLError as error:
        return {"model_type": config.get("model_type"), "refused": str(error)}
    layers = next(small[key] for key in COUNTS if key in small)
    return {"model_type": small["model_type"], "layers": layers}


def measure(folder: str, target: str, context: str) -> dict[str, Any]:
    """Export one model for one target; run in a process of its own."""
    import torch

    from llm_coreml import ExportConfig, export
    from llm_coreml.machine import peak_memory

    torch.set_num_threads(1)
    config = ExportConfig(bits=4, target=target, context=int(context), seq_lengths=(1, 64))
    begun = time.perf_counter()
    bundle = export(folder, output=Path(folder) / target, config=config, cache=False)
    seconds = time.perf_counter() - begun
    verification = bundle.manifest.verification
    return {
        "seconds": round(seconds, 1),
        "peak_bytes": peak_memory(),
        "bytes": bundle.program.stat().st_size,
        "error": verification.max_relative_error,
        "kl": verification.mean_kl,
    }


def in_a_process(*words: str) -> dict[str, Any]:
    """Run one step in a new process; return what it found, or how it failed."""
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return {"failed": lines[-1]}


def rows_in(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of rows; none if it is not there."""
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def rows_of(path: Path, targets: list[str], context: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each target, or one that says why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        made = in_a_process("--prepare", str(path), folder)
        if "layers" not in made:
            yield {"config": path.stem, **made}
            return
        for target in targets:
            found = in_a_process("--measure", folder, target, str(context))
            yield {"config": path.stem, "target": target, **made, **found}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| configuration | `model_type` | layers | target | s | peak MB | MB | largest error |",
        "|---|---|--:|---|" + "--:|" * 4,
    ]
    for row in (each for each in rows if "error" in each):
        lines.append(
            f"| {row['config']} | `{row['model_type']}` | {row['layers']} | {row['target']} | "
            f"{row['seconds']:.0f} | {row['peak_bytes'] / 1e6:,.0f} | {row['bytes'] / 1e6:,.0f} | "
            f"{row['error']:.1e} |"
        )
    for row in (each for each in rows if "failed" in each):
        lines.append(f"\n{row['config']}, {row.get('target')}: {row['failed']}")
    refused = [row for row in rows if "refused" in row]
    if refused:
        lines += ["", "Without a family:", ""]
        lines += [f"- {row['config']} (`{row['model_type']}`)" for row in refused]
    return "\n".join(lines)


def main() -> None:
    """Measure what the arguments ask for."""
    steps = {"--prepare": prepare, "--measure": measure}
    if sys.argv[1:2] and sys.argv[1] in steps:
        print(json.dumps(steps[sys.argv[1]](*sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of config.json files, each NAME.json")
    parser.add_argument("--only", help="names, by commas")
    parser.add_argument("--targets", default=",".join(TARGETS), help="by commas")
    parser.add_argument("--context", type=int, default=1024, help="positions of the cache (1024)")
    parser.add_argument("--rows", type=Path, default=Path("published_configs.jsonl"))
    parser.add_argument("--show", action="store_true", help="print the table of the rows")
    given = parser.parse_args()
    names = None if given.only is None else set(given.only.split(","))
    for path in [] if given.show else sorted(given.folder.glob("*.json")):
        known = {row.get("target") for row in rows_in(given.rows) if row["config"] == path.stem}
        targets = [target for target in given.targets.split(",") if target not in known]
        if (names is not None and path.stem not in names) or None in known or not targets:
            continue
        for row in rows_of(path, targets, given.context):
            with given.rows.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
            print(json.dumps(row), file=sys.stderr)
    print(table(list(rows_in(given.rows))))


if __name__ == "__main__":
    main()
