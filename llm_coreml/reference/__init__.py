"""The reference runtime: executes the Core ML program inside a `.pte` in torch, on any machine.

    from llm_coreml.reference import load_method

    forward = load_method("model.pte")
    logits = forward(tokens, start_pos)

`load` gives the Core ML program alone, `load_method` the whole method as a runner calls it, and
`load_methods` all of a file's. The file formats are in `pte`, `inmemoryfs`, `weights` and
`milproto`, which are useful without a call.
"""

from llm_coreml.reference.execution import Execution
from llm_coreml.reference.method import LoadedMethod, load_method, load_methods
from llm_coreml.reference.packages import load
from llm_coreml.reference.runtime import CoreMLProgram

__all__ = ["CoreMLProgram", "Execution", "LoadedMethod", "load", "load_method", "load_methods"]
