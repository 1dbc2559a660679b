"""A LoRA of PEFT, exported while it is still an adapter: it is merged layer by layer as it is read.

python examples/peft_lora.py out/lora
"""

from __future__ import annotations

import sys

import torch
from peft import LoraConfig, get_peft_model

import llm_coreml
from small import SHAPES, batches, small_model


def main(output: str) -> None:
    base, tokenizer = small_model()
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in batches(tokenizer, steps=20):
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss {loss.item():.3f}")

    # No merge_and_unload(): the model goes on training afterwards, if you like.
    bundle = llm_coreml.save_pretrained_coreml(
        model, output, tokenizer, bits=4, target="ane", config=SHAPES
    )
    print(bundle)


if __name__ == "__main__":
    main(*sys.argv[1:])
