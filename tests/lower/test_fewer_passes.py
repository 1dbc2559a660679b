"""`--operations fewest`: the same numbers to the bit, by fewer operations of Core ML."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts import lower, program
from cases import cases
from llm_coreml.artifact.mil import Function
from llm_coreml.config import ExportConfig
from llm_coreml.runtime.reference import ReferenceRunner
from tiny import llama, mistral, tokens_for

SIZES: dict[str, Any] = {
    "vocab_size": 192,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
CASES: dict[str, dict[str, Any]] = {
    "parts, rings, several lengths": {"seq_lengths": (1, 8), "linear_split": 32},
    "one token": {"seq_lengths": (1,), "target": "ane"},
    "one token, channels first": {"seq_lengths": (1,), "target": "ane", "layout": "conv"},
    "given caches": {"seq_lengths": (1, 8), "kv_cache": "inputs"},
}
FURTHER = ("given caches", "one token, channels first")
UNCOUNTED = ("const", "reshape", "squeeze", "expand_dims", "read_state")


def model_for(name: str) -> Any:
    if "rings" not in name:
        return llama(**SIZES)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return mistral(**SIZES, sliding_window=7, layer_types=kinds)


@pytest.mark.parametrize("name", cases(CASES, FURTHER))
def test_the_same_numbers_by_fewer_operations(name: str, tmp_path: Path) -> None:
    model, tokens = model_for(name), tokens_for(192, 64)
    length = CASES[name]["seq_lengths"][-1]
    rows, counts = [], []
    for operations in ("usual", "fewest"):
        settings = {"scheme": "int8-channel", "context": 64, **CASES[name]}
        config = ExportConfig(**settings, operations=operations)
        path = lower(model, config, tmp_path / f"{operations}.pte").path
        runner = ReferenceRunner(path)
        rows.append(
            torch.cat([runner.step(tokens[at : at + length]) for at in range(0, 64, length)])
        )
        counts.append(counted(program(path)))
    assert torch.equal(*rows)
    usual, fewest = counts
    # A rotation of queries and one of keys are one, of three operations fewer than either was.
    assert sum(usual.values()) - sum(fewest.values()) >= 10
    assert usual["sub"] - fewest["sub"] >= 2 * 3
    # Those behind one another stand where there is one token.
    assert fewest["transpose"] <= (0 if length == 1 else usual["transpose"] - 3)


def counted(function: Function) -> Counter[str]:
    return Counter(
        op.type
        for op in function.operations
        if op.type not in UNCOUNTED and not op.type.startswith("constexpr_")
    )


def test_where_layers_write_is_computed_once(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"scheme": "int8-channel", "context": 64, "seq_lengths": (1,)}
    model, found = llama(**SIZES), []
    for operations in ("usual", "fewest"):
        config = ExportConfig(**settings, operations=operations)
        function = program(lower(model, config, tmp_path / f"{operations}.pte").path)
        sources = {out.name: op for op in function.operations for out in op.outputs}
        updates = [op for op in function.operations if op.type == "slice_update"]
        assert len(updates) == 2 * 3
        ends = {sources[str(op.inputs[end][0])].type for op in updates for end in ("begin", "end")}
        found.append(ends)
    assert found == [{"concat"}, {"squeeze"}]
