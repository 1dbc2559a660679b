"""Checkpoints: a folder, a hub id or a live model, read one checked tensor at a time."""

from llm_coreml.checkpoint.checkpoint import Checkpoint as Checkpoint
from llm_coreml.checkpoint.checkpoint import Source as Source
from llm_coreml.checkpoint.opening import check_tensors as check_tensors
from llm_coreml.checkpoint.opening import is_quantized as is_quantized
from llm_coreml.checkpoint.opening import open_checkpoint as open_checkpoint
