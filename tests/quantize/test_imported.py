"""Quantized checkpoints keep their values, weight by weight, or say by how much they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packers import Array, Packer, awq, checkpoint, compressed, gptq, plain_bytes

from llm_coreml.build import build_decoder, open_model, plan_for
from llm_coreml.config import ExportConfig
from llm_coreml.quantize.apply import dense_rows

CONFIG = ExportConfig(context=32, seq_lengths=(1, 8))


def with_method(method: str, **settings: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, **settings}}


def groups(bits: int, size: int | None) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "group_size": size}
    return with_method("compressed-tensors", config_groups={"group_0": {"weights": weights}})


V1 = with_method("gptq", bits=4, group_size=32)
V2 = with_method("gptq", bits=4, group_size=32, checkpoint_format="gptq_v2")
BYTES = with_method("gptq", bits=8, group_size=16)

EXACT: dict[str, tuple[dict[str, Any], tuple[Packer, ...]]] = {
    "gptq-symmetric": (V1, (gptq(4, 32, 1, (8, 8)),)),
    "gptq-asymmetric": (V1, (gptq(4, 32, 1, (1, 15)),)),
    "gptq-zero-of-16": (V1, (gptq(4, 32, 1, (1, 16)),)),
    "gptq-v2": (V2, (gptq(4, 32, 2, (0, 15)),)),
    "gptq-8-bit": (BYTES, (gptq(8, 16, 1, (128, 128)), gptq(8, 16, 1, (1, 256)))),
    "awq": (with_method("awq", bits=4, group_size=32), (awq(32),)),
    "compressed-4-bit": (groups(4, 16), (compressed(4, 16, True), compressed(4, 16, False))),
    "compressed-8-bit": (groups(8, 32), (compressed(8, 32, True), compressed(8, 32, False))),
    "compressed-bytes": (groups(8, None), (plain_bytes,)),
}


def decoder_values(folder: Path, config: ExportConfig = CONFIG) -> dict[str, Array]:
    """Return every matrix of the decoder, by its checkpoint's name."""
    model = open_model(folder)
    decoder, _ = build_decoder(model, config, plan_for(config, model))
    names = model.family.tensor_names(model.spec)
    found = {}
    for ours, parameter in decoder.named_parameters():
        if parameter.ndim == 2 and ours in names:
            found[names[ours]] = torch.cat(list(dense_rows(parameter))).double().numpy()
    return found


@pytest.mark.parametrize("label", EXACT)
def test_every_value_is_the_one_that_the_format_defines(label: str, tmp_path: Path) -> None:
    settings, packers = EXACT[label]
    folder, meant = checkpoint(tmp_path / "model", settings, *packers)
    held = decoder_values(folder)
    model = open_model(folder)
    assert len(meant) == 7
    for name, values in meant.items():
        assert np.array_equal(held[name], values), name
        assert np.array_equal(model.checkpoint.tensor(name, torch.float32).numpy(), values), name
    report = model.imported()
    assert report is not None
    assert (report.exactness, report.largest_error, report.tensor) == ("exact", 0.0, None)
    assert report.matrices == 7
