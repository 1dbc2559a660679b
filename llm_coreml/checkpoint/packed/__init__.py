"""Quantized checkpoints: one file for each format, and all of them seen as plain checkpoints.

In come a checkpoint with packed tensors and its settings, not trusted; out goes a checkpoint of
plain names, which gives a matrix as values or as codes and what they stand for. Codes are taken as
the file holds them, nothing is written, and a format knows no family by its name. Adding a format:
a `PackedFormat` in a file, and a reader of its settings in `formats`.
"""

from llm_coreml.checkpoint.packed.formats import find_formats as find_formats
from llm_coreml.checkpoint.packed.formats import names_quantization as names_quantization
from llm_coreml.checkpoint.packed.view import PackedCheckpoint as PackedCheckpoint
