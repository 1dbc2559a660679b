"""A plain PyTorch loop; the model is exported where it is, and the file is measured beside it.

python examples/plain_loop.py out/plain
"""

from __future__ import annotations

import sys

import torch

import llm_coreml
from small import SHAPES, batches, small_model


def main(output: str) -> None:
    model, tokenizer = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for batch in batches(tokenizer, steps=20):
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss {loss.item():.3f}")

    bundle = llm_coreml.save_pretrained_coreml(
        model, output, tokenizer, bits=4, target="gpu", config=SHAPES
    )
    print(bundle)
    print(llm_coreml.evaluate(output, model=model, tokens=256))


if __name__ == "__main__":
    main(*sys.argv[1:])
