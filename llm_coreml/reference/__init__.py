"""The reference runtime: executes the Core ML program inside a `.pte` in torch, on any machine.

    from llm_coreml.reference import load_method

    forward = load_method("model.pte")
    logits = forward(tokens, start_pos)

What comes in are parsed files of `artifact`; what leaves are tensors. `program` compiles and runs
one function of a model, with the operations of `ops`; `method` runs the kernels and delegates of a
method; `observe` watches a run, and holds two against each other.
"""

from llm_coreml.reference.load import load, load_method, load_methods
from llm_coreml.reference.method.method import LoadedMethod
from llm_coreml.reference.program.coreml_program import CoreMLProgram
from llm_coreml.reference.program.execution import Execution

__all__ = ["CoreMLProgram", "Execution", "LoadedMethod", "load", "load_method", "load_methods"]
