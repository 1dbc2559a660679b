"""Checkpoints: a folder, a hub id, a GGUF file or a live model, read one checked tensor at a time.

In come paths, ids and models; out go tensors by name, finite and of the type asked for, and through
`weights_view` the same under the decoder's names. Files are mapped and never written to, nothing is
unpickled, and no code of a checkpoint is run. A new format of quantized checkpoints is a file in
`packed`; an arrangement of tensors is a class in `value_maps`.
"""

from llm_coreml.checkpoint.checkpoint import Checkpoint as Checkpoint
from llm_coreml.checkpoint.checkpoint import Source as Source
from llm_coreml.checkpoint.opening import expanded as expanded
from llm_coreml.checkpoint.opening import is_quantized as is_quantized
from llm_coreml.checkpoint.opening import open_checkpoint as open_checkpoint
from llm_coreml.checkpoint.promise import check_tensors as check_tensors
