"""Every field of config.json and generation_config.json with absurd values: how does opening end?

    python benchmarks/hostile_config.py
    python benchmarks/hostile_config.py --show

A tiny checkpoint is opened with each of them, and the settings of an export are resolved and
planned for it. Wrong is anything but success and a sentence, more than two seconds, and more than
two gigabytes.
"""

from __future__ import annotations

import argparse
import collections
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from llm_coreml.bundle.bundled_tokenizer import write_tokenizer
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.decoder import DecoderSpec
from llm_coreml.errors import LlmCoreMLError
from llm_coreml.model import open_model
from llm_coreml.quantize.plan.choose import plan_without_weights

SECONDS = 2.0
MEMORY = 2 << 30
# As JSON writes them; Python reads NaN and Infinity, and 1e999 as infinity.
VALUES = (
    *("0", "-1", "1", "1.0", "1.5", "-0.5", "1e-300", "1e30", "1e999", "NaN", "Infinity"),
    *(
        "-Infinity",
        "true",
        "false",
        "null",
        '""',
        '"false"',
        '"silu"',
        '"\\u001b[31m"',
        '"\\ud800"',
    ),
    *("[]", "[1]", "[null]", "[[1]]", '["a"]', "{}", '{"a": 1}', "4096", "1048576", "1000000000"),
    *("9223372036854775807", "9223372036854775808", "1" + 30 * "0", "1" + 5000 * "0"),
    *("[" + 99 * "1, " + "1]", '"' + 100_000 * "x" + '"', 200 * "[" + 200 * "]"),
)
FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "hidden_act"),
    *(
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "attention_bias",
        "mlp_bias",
    ),
    *("tie_word_embeddings", "sliding_window", "layer_types", "per_layer_config", "dtype"),
    *("partial_rotary_factor", "original_max_position_embeddings", "bos_token_id", "eos_token_id"),
    *("model_type", "architectures", "quantization_config"),
)
PARAMETERS = ("rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def make_checkpoint(folder: Path) -> None:
    """Write a tiny Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)


def cases(config: dict[str, object]) -> Iterator[tuple[str, str, str]]:
    """Yield the name of a case, and the texts of config.json and generation_config.json."""
    for model_type in ("llama", "mistral"):
        own = {**config, "model_type": model_type}
        for value in VALUES:
            for field in FIELDS:
                yield f"{field} = {value[:40]}", _text(own, field, value), "{}"
            for field in (*PARAMETERS, "original_max_position_embeddings"):
                scaling = _text(LLAMA3, field, value)
                yield (
                    f"rope_scaling.{field} = {value[:40]}",
                    _text(own, "rope_scaling", scaling),
                    "{}",
                )
    for value in VALUES:
        for field in ("bos_token_id", "eos_token_id"):
            text = _text({}, field, value)
            yield f"generation_config.json, {field} = {value[:40]}", json.dumps(config), text


def _text(values: dict[str, object], field: str, value: str) -> str:
    """Return JSON in which a field has a value that is JSON already."""
    return json.dumps({**values, field: "@@"}).replace('"@@"', value)


def opened(folder: Path) -> str:
    """Open the checkpoint as an export does; returns `done`, `refused`, or what is wrong."""

    def accept(spec: DecoderSpec, _: bool) -> None:
        plan_without_weights(resolve(ExportConfig(bits=4), spec), spec)

    begun = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as draft:
            write_tokenizer(open_model(folder, accept=accept), Path(draft), lambda _: None)
        kind = "done"
    except LlmCoreMLError:
        kind = "refused"
    except BaseException as error:
        return f"unexpected {type(error).__name__}: {error}"[:300]
    seconds = time.monotonic() - begun
    return kind if seconds < SECONDS else f"takes {seconds:.1f} s"


def main() -> None:
    """Open all cases, and print what is wrong and how many ended in which way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--show", action="store_true", help="how every case ended")
    options = parser.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        make_checkpoint(folder)
        opened(folder)  # what is loaded once is nobody's time
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, -1))
        config = json.loads((folder / "config.json").read_text())
        for name, text, generation in cases(config):
            (folder / "config.json").write_text(text)
            (folder / "generation_config.json").write_text(generation)
            ending = opened(folder)
            counts[ending.split()[0]] += 1
            if options.show or ending not in ("done", "refused"):
                print(f"{name}: {ending}", flush=True)
    print(json.dumps({"cases": sum(counts.values()), **counts}))


if __name__ == "__main__":
    main()
