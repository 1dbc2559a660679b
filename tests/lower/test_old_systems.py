"""Programs for systems before states: the cache as inputs, and the formats that those have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import llm_coreml
from cases import cases
from llm_coreml.artifact import pte
from llm_coreml.artifact.packages import Packages
from llm_coreml.config import ExportConfig
from llm_coreml.errors import UnsupportedError
from llm_coreml.inspect.systems_of import check_system
from llm_coreml.systems import BY_NAME
from tiny import llama

# Every format that iOS16 has.
ALL = {
    "scheme": "int8-channel,layers.0.mlp.*=codebook:4:whole,layers.1.mlp.*=codebook:6:whole,"
    "layers.0.self_attn.*=int8-channel:zero-int",
    "embedding": "codebook:8:whole",
    "lm_head": "codebook:2:whole",
}
PROGRAMS: dict[str, dict[str, Any]] = {
    "iOS16": {"minimum_os": "macOS13", **ALL},
    "iOS17": {"minimum_os": "visionOS1", "target": "ane", **ALL},
    "plain": {"minimum_os": "iOS16", "scheme": "none", "compute_precision": "fp32"},
}


def settings(**changes: Any) -> ExportConfig:
    return ExportConfig(context=32, seq_lengths=(1, 8), kv_cache="inputs", **changes)


@pytest.mark.parametrize("name", cases(PROGRAMS, ("iOS17", "plain")))
def test_old_systems_have_programs_that_verify(name: str, tmp_path: Path) -> None:
    given = PROGRAMS[name]
    bundle = llm_coreml.export(
        llama(num_hidden_layers=2), output=tmp_path / "out", config=settings(**given), cache=False
    )
    (part,) = check_system(bundle.folder, given["minimum_os"])
    system = BY_NAME[given["minimum_os"]]
    assert part.asked.declared == system.name and part.asked.opsets == (system.opset,)
    with pytest.raises(UnsupportedError, match="unknown opset"):
        check_system(bundle.folder, "iOS16" if name == "iOS17" else "iOS15")
    assert bundle.manifest.verification.mean_kl < 1e-3
    (delegate,) = pte.read_delegates(bundle.program)
    operations = Packages(pte.read(bundle.program)).open(delegate).package.model.functions["main"]
    kinds = {each.type for each in operations.operations}
    assert not kinds & {"read_state", "slice_update", "scaled_dot_product_attention"}
    compressed = {"constexpr_affine_dequantize", "constexpr_lut_to_dense"}
    assert kinds & compressed == (set() if name == "plain" else compressed)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kv_cache": "state"}, r"iOS17 is too old: .* as state.* give --kv-cache inputs"),
        ({"scheme": "int8-channel", "zero_point": "float"}, "too old for int8-channel"),
        ({"scheme": "codebook:4:rows16"}, "too old for codebook.*--minimum-os iOS18 or --scheme"),
        ({"scheme": "codebook:3:whole"}, "too old for codebook"),
        ({"scheme": "int4-group"}, "int4-group, .*iOS18 on. Use .* or --scheme int8-channel"),
        ({"scheme": "int3-group"}, "from iOS26 on. Use --minimum-os iOS26 or"),
        ({"scheme": "int8-channel", "embedding": "int4-channel"}, "--embedding int8-channel"),
    ],
    ids=str,
)
def test_newer_formats_are_refused_with_the_flag(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    config = ExportConfig(**{"kv_cache": "inputs", "minimum_os": "iOS17", "context": 32, **changes})
    with pytest.raises(UnsupportedError, match=told):
        llm_coreml.export(
            llama(intermediate_size=96), output=tmp_path / "out", config=config, cache=False
        )
    assert not list(tmp_path.iterdir())
