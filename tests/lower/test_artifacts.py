"""Whole artifacts, executed by the reference runtime, against `transformers` and the eager decoder.

Errors are relative to the largest logit of their row. Each sequence runs through the full context.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts import (
    UNQUANTIZED,
    Artifact,
    feed,
    files,
    lower,
    matrices,
    method,
    program,
    weight_bytes,
)
from cases import cases
from llm_coreml.artifact.mil import StateType, TensorType
from llm_coreml.config import ExportConfig
from llm_coreml.decoder.caches import KVCache
from llm_coreml.decoder.state import Start
from llm_coreml.pipeline import export
from llm_coreml.runtime.eager import EagerRunner
from llm_coreml.runtime.runner import split_lengths
from shared import Shared
from tiny import BASE, expected_logits, llama, mistral, random_split, save, tokens_for

BOUND = 2e-2
# fp32 activations and weights; what the fp16 states round is rounded in the eager decoder too.
FP32_BOUND = 1e-4


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the error of the worst row, relative to the largest logit of that row."""
    assert found.shape == expected.shape
    return float(((found - expected).abs().amax(-1) / expected.abs().amax(-1)).max())


def splits(count: int, lengths: tuple[int, ...]) -> dict[str, list[int]]:
    """Write `count` as sums of `lengths`: largest first, only ones, and at random."""
    return {
        "descending": split_lengths(count, lengths),
        "ones": [1] * count,
        "random 1": random_split(count, lengths, seed=1),
        "random 2": random_split(count, lengths, seed=2),
    }


@dataclass(frozen=True)
class Odd:
    """A model and an export of it that differ from the usual in a few ways at once."""

    model: dict[str, Any]
    lengths: tuple[int, ...]
    context: int = 32
    config: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    make: Callable[..., Any] = llama


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ODD = {
    "gqa-6-2, head_dim 48": Odd(
        {"hidden_size": 96, "num_attention_heads": 6, "head_dim": 48, "vocab_size": 1009},
        (1, 8, 64),
        context=64,
    ),
    "tied, bf16 shards": Odd(
        {"tie_word_embeddings": True, "vocab_size": 1009}, (1, 3, 7), dtype=torch.bfloat16
    ),
    "llama3 rope": Odd(
        {"rope_parameters": LLAMA3, "max_position_embeddings": 96}, (1, 8, 64), context=96
    ),
    "mha, one length": Odd({"num_key_value_heads": 4}, (1,)),
    "one kv head, decomposed": Odd(
        {"num_attention_heads": 8, "num_key_value_heads": 1}, (1, 5), config={"target": "ane"}
    ),
    "mlp_bias, intermediate 100": Odd({"mlp_bias": True, "intermediate_size": 100}, (1, 8)),
    "attention_bias, all logits": Odd(
        {"attention_bias": True}, (1, 3, 7), config={"logits": "all"}
    ),
    "decomposed, all logits": Odd(
        {}, (1, 8, 64), context=64, config={"target": "ane", "logits": "all"}
    ),
    "linear rope, head_dim 8": Odd(
        {
            "head_dim": 8,
            "max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
        },
        (1, 2, 64),
        context=64,
    ),
    "odd sizes everywhere": Odd(
        {
            "hidden_size": 33,
            "intermediate_size": 35,
            "vocab_size": 31,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 14,
        },
        (1, 31),
    ),
    "fp16, both biases, dynamic rope": Odd(
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        },
        (1, 4),
        config={"target": "cpu"},
        dtype=torch.float16,
    ),
    "mistral with a window, for iOS26": Odd(
        {"sliding_window": 12}, (1, 8), config={"minimum_os": "iOS26"}, make=mistral
    ),
}


# Each of them differs in what others differ in too, or in the numbers of a table.
FURTHER = ("mlp_bias, intermediate 100", "decomposed, all logits", "linear rope, head_dim 8")


@pytest.mark.parametrize("name", cases(ODD, FURTHER))
def test_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    odd = ODD[name]
    made = odd.make(**odd.model).to(odd.dtype)
    folder = save(made, tmp_path / "model", max_shard_size="60KB")
    reference = type(made).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    config = ExportConfig(
        context=odd.context, seq_lengths=odd.lengths, **{**UNQUANTIZED, **odd.config}
    )
    runner = lower(folder, config, tmp_path / "model.pte").runner()
    assert runner.seq_lengths == odd.lengths
    assert runner.context == odd.context
    assert runner.every_row == (config.logits == "all")
    tokens = tokens_for(made.config.vocab_size, odd.context)
    expected = expected_logits(reference.eval(), tokens)
    for split, parts in splits(odd.context, odd.lengths).items():
        ends = torch.tensor(parts).cumsum(0) - 1
        wanted = expected if runner.every_row else expected[ends]
        assert relative_error(feed(runner, tokens, parts), wanted) < BOUND, split


def test_computes_what_the_quantized_decoder_computes(
    quantized: Callable[[str], Artifact], scheme_label: str
) -> None:
    artifact = quantized(scheme_label)
    tokens = tokens_for(96, artifact.shapes.context)
    expected = EagerRunner(artifact.decoder, "eager").logits(tokens)
    runner = artifact.runner()
    for parts in splits(len(tokens), runner.seq_lengths).values():
        ends = torch.tensor(parts).cumsum(0) - 1
        assert relative_error(feed(runner, tokens, parts), expected[ends]) < BOUND


def test_tokens_above_65535_reach_their_row(tmp_path: Path) -> None:
    """Core ML gathers with uint16 where it thinks that suffices."""
    model = llama(vocab_size=70000, hidden_size=32, intermediate_size=32, num_attention_heads=2)
    config = ExportConfig(context=32, seq_lengths=(1, 8), **UNQUANTIZED)
    runner = lower(model, config, tmp_path / "model.pte").runner()
    tokens = [65535, 65536, 65537, 69999, 4463, 66000, 464, 68123]
    expected = expected_logits(model, tokens)
    assert relative_error(feed(runner, tokens, [1] * 8), expected) < BOUND
    assert relative_error(feed(runner, tokens, [8]), expected[-1:]) < BOUND


def test_fp32_program_is_tight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ExportConfig(
        context=32,
        seq_lengths=(1, 8),
        target="ane",
        compute_precision="fp32",
        logits="all",
        **UNQUANTIZED,
    )
    artifact = lower(llama(), config, tmp_path / "model.pte")
    tokens = tokens_for(97, 32)
    plain = EagerRunner(artifact.decoder, "eager").logits(tokens)
    put = KVCache.put

    def rounded(cache: KVCache, rows: torch.Tensor, entries: torch.Tensor, start: Start) -> None:
        put(cache, rows, entries.half().float(), start)

    monkeypatch.setattr(KVCache, "put", rounded)
    expected = EagerRunner(artifact.decoder, "eager").logits(tokens)
    runner = artifact.runner()
    for parts in splits(32, (1, 8)).values():
        found = feed(runner, tokens, parts)
        assert relative_error(found, expected) < FP32_BOUND
        assert relative_error(found, plain) < 2e-3, "only the states may round"


# The shape of the program


def test_only_the_padding_is_not_delegated(three_layers: Artifact) -> None:
    *kernels, last = method(three_layers.path).instructions
    assert (last.kind, last.target) == ("delegate", "0")
    padding = "_to_copy add arange clamp index_select mul scalar_tensor sub sym_min sym_size"
    called = {step.target.partition("::")[2].partition(".")[0] for step in kernels}
    assert called == set(padding.split())


def test_two_states_hold_all_layers_in_fp16(three_layers: Artifact) -> None:
    (core,) = three_layers.runner().programs
    mixer = three_layers.decoder.spec.layers[0].mixer
    spare = three_layers.shapes.spare
    assert spare == 32, "what pads reach beyond the context, rounded up"
    shape = (3, mixer.num_key_value_heads, 32 + spare, mixer.head_dim)
    assert {(state.name, state.dtype, state.shape) for state in core.states} == {
        ("cache_keys", "fp16", shape),
        ("cache_values", "fp16", shape),
    }
    states = [
        item for item in program(three_layers.path).inputs if isinstance(item.type, StateType)
    ]
    assert [item.type for item in states] == [StateType(TensorType("fp16", shape))] * 2


def test_a_layer_cuts_its_rows_out_of_the_cache_at_once(three_layers: Artifact) -> None:
    operations = program(three_layers.path).operations
    cuts = [op for op in operations if op.type == "slice_by_index"]
    names = {op.outputs[0].name for op in cuts}
    assert not any(set(op.inputs["x"]) & names for op in cuts)
    mixer = three_layers.decoder.spec.layers[0].mixer
    rows = TensorType("fp16", (1, mixer.num_key_value_heads, 32, mixer.head_dim))
    assert [op.outputs[0].type for op in cuts].count(rows) == 6


def test_every_state_write_follows_its_update_in_place(three_layers: Artifact) -> None:
    operations = [op for op in program(three_layers.path).operations if op.type != "const"]
    writes = [i for i, op in enumerate(operations) if op.type == "write_state"]
    by_state: dict[str, int] = {}
    for i in writes:
        update, write = operations[i - 1], operations[i]
        assert update.type == "slice_update", "nothing stands between an update and its write"
        assert write.inputs["data"] == (update.outputs[0].name,)
        (source,) = [
            op
            for op in operations
            if update.inputs["x"] == tuple(output.name for output in op.outputs)
        ]
        assert source.type == "read_state", "the update is made on the state's own value"
        assert source.inputs["input"] == write.inputs["input"], "and goes back to the same state"
        (state,) = write.inputs["input"]
        assert isinstance(state, str)
        by_state[state] = by_state.get(state, 0) + 1
    assert by_state == {"cache_keys": 3, "cache_values": 3}
    assert sum(op.type == "slice_update" for op in operations) == 6


def test_a_tied_table_is_stored_once(three_layers: Artifact) -> None:
    spec = three_layers.decoder.spec
    stored = matrices(three_layers.path, spec)
    table = stored["embed_tokens"].bytes
    assert table == 2 * spec.vocab_size * spec.hidden_size
    assert torch.equal(stored["embed_tokens"].dense, stored["lm_head"].dense)
    needed = sum(matrix.bytes for name, matrix in stored.items() if name != "lm_head")
    rest = weight_bytes(three_layers.path) - needed
    assert 0 < rest < table, "no room for a second table beside norms, biases and rotations"


def test_constant_methods_tell_runners_what_they_need(three_layers: Artifact) -> None:
    found = three_layers.runner().description.constant_methods
    assert found == {
        "get_max_seq_len": 16,
        "get_max_context_len": 32,
        "get_vocab_size": 257,
        "get_n_layers": 3,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": False,
        "enable_dynamic_shape": True,
        "get_bos_id": 1,
        "get_eos_ids": [2, 5],
    }


def test_nothing_of_the_build_machine_is_inside(three_layers: Artifact) -> None:
    data = three_layers.path.read_bytes()
    for trace in (str(three_layers.path.parent), str(Path(__file__).parent), ".py"):
        assert trace.encode() not in data
    assert not any("debug" in name for name in files(three_layers.path))


# Determinism, which tests of the command and of live models show as well, of another format

_EXPORT = """
import sys
from pathlib import Path
from llm_coreml.config import ExportConfig
from llm_coreml.pipeline import export
config = ExportConfig(scheme="codebook", bits=2, embedding="int8-channel", seq_lengths=(1, 8))
export(sys.argv[1], output=sys.argv[2], context=32, config=config)
"""


@pytest.fixture(scope="module")
def exported(shared: Shared) -> tuple[Path, Path]:
    """A model folder, and an export of it made in a worker's process."""
    model = llama(tie_word_embeddings=True, vocab_size=96)
    config = ExportConfig(bits=2, scheme="codebook", embedding="int8-channel", seq_lengths=(1, 8))

    def make(root: Path) -> None:
        export(save(model, root / "model"), output=root / "here", context=32, config=config)

    root = shared.folder("determinism", [model, config], make)
    return root / "model", root / "here"


@pytest.mark.exhaustive
def test_another_process_writes_the_same_bytes(exported: tuple[Path, Path], tmp_path: Path) -> None:
    folder, here = exported
    there = tmp_path / "deep" / "there"
    subprocess.run(
        [sys.executable, "-c", _EXPORT, str(folder), str(there)],
        check=True,
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONHASHSEED": "7",
            "PYTHONPATH": os.pathsep.join(sys.path),
            # As here: the number of threads decides the order of sums in measured figures.
            "OMP_NUM_THREADS": "1",
        },
        stderr=subprocess.DEVNULL,
    )
    assert sorted(p.name for p in there.iterdir()) == sorted(p.name for p in here.iterdir())
    for path in sorted(here.iterdir()):
        assert (there / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.exhaustive
def test_a_live_model_gives_the_program_of_its_folder(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    _, here = exported
    model = llama(tie_word_embeddings=True, vocab_size=96)
    config = ExportConfig(bits=2, scheme="codebook", embedding="int8-channel", seq_lengths=(1, 8))
    live = export(model, output=tmp_path / "live", context=32, config=config)
    assert live.program.read_bytes() == (here / "model.pte").read_bytes()
    from llm_coreml.bundle.folder import open_bundle

    told = live.manifest.to_json()
    differing = {
        key for key, value in open_bundle(here).manifest.to_json().items() if told[key] != value
    }
    # The card names the source, and the checksum covers that.
    assert differing <= {"source", "rebuild", "files", "checksum"}
    assert live.manifest.source.kind == "live"
    assert BASE["hidden_size"] == live.manifest.spec["hidden_size"]
