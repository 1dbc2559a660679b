"""Quantized checkpoints: one file for each format, and all of them seen as plain checkpoints."""

from llm_coreml.checkpoint.packed.formats import find_formats as find_formats
from llm_coreml.checkpoint.packed.view import PackedCheckpoint as PackedCheckpoint
