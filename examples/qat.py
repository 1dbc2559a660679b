"""Quantization-aware training by torchao: what was trained is what is exported, bit by bit.

python examples/qat.py out/qat
"""

from __future__ import annotations

import sys

import torch
from torchao.quantization import quantize_

import llm_coreml
from small import SHAPES, batches, small_model


def main(output: str) -> None:
    model, tokenizer = small_model()
    qat = llm_coreml.qat_config("int4-group", group_size=32)
    quantize_(model, qat.prepare, qat.filter)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in batches(tokenizer, steps=20):
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss {loss.item():.3f} with weights of 4 bits")

    # No bits and no scheme: the codes are the model's own.
    bundle = llm_coreml.export(model, tokenizer, output=output, target="gpu", config=SHAPES)
    print(bundle)


if __name__ == "__main__":
    main(*sys.argv[1:])
