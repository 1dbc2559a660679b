"""Core ML's operations in torch, one file per idea; importing this package fills the table `OPS`.

To add one: write a function in the file it belongs to, decorate it with `@op`, name it in
`docs/ops.md`, and add a test line.
"""

from llm_coreml.reference.ops import (
    activation,
    attention,
    constexpr,
    elementwise,
    indexing,
    linear,
    normalization,
    pooling,
    reduction,
    scatter,
    shape,
    slicing,
    spatial,
)
from llm_coreml.reference.ops.registry import OPS, Spec, op

__all__ = [
    "OPS",
    "Spec",
    "activation",
    "attention",
    "constexpr",
    "elementwise",
    "indexing",
    "linear",
    "normalization",
    "op",
    "pooling",
    "reduction",
    "scatter",
    "shape",
    "slicing",
    "spatial",
]
