"""A small model and a text, in the place of those that you fine-tune; all examples begin with it.

Yours would be AutoModelForCausalLM.from_pretrained("org/model"), and AutoTokenizer's of the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llm_coreml import ExportConfig
from llm_coreml.recipes import bundled_model

# What the small model is exported with; for a real one the defaults are right.
SHAPES = ExportConfig(context=128, seq_lengths=(1, 32))


def small_model() -> tuple[Any, Any]:
    """Return a random Llama of 2 layers, and the tokenizer of the model in the package."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config), tokenizer


def texts() -> list[str]:
    """Return a text in lines."""
    content = (bundled_model() / "heldout.txt").read_text(encoding="utf-8")
    return [line for line in content.splitlines() if line.strip()][:200]


def batches(tokenizer: Any, steps: int) -> Iterator[torch.Tensor]:
    """Yield `steps` batches of 4 rows of 32 tokens, int64 `[4, 32]`."""
    tokens = torch.tensor(tokenizer("\n".join(texts())).input_ids)
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        begins = torch.randint(len(tokens) - 32, (4,), generator=draw).tolist()
        yield torch.stack([tokens[at : at + 32] for at in begins])
