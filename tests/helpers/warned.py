"""Warnings of the libraries that tests train with, each by its own words."""

from __future__ import annotations

import pytest

# What PEFT and transformers say when adapters are made, merged and saved.
OF_PEFT = [
    pytest.mark.filterwarnings(words)
    for words in (
        r"ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers\.",
        r"ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning:peft\.",
        r"ignore:Input and output embeddings are no longer tied:UserWarning:peft\.",
        r"ignore:Unsupported layer type .*RMSNorm.* encountered:UserWarning:peft\.",
        r"ignore:The following \w+_pattern keys did not match:RuntimeWarning:peft\.",
        r"ignore:Setting `save_embedding_layers` to `True`:UserWarning:peft\.",
    )
]
