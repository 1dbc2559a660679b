"""How precisely a program is executed: as it declares, without rounding, or with fp16 sums.

`declared` rounds each value to its declared type and accumulates in fp32, as Core ML's own CPU and
GPU paths do. `fp32` rounds nothing, so what is left of a difference to the original is the
conversion's fault, not the precision's. `strict-fp16` also rounds after every addition inside a
matrix product, in order, which is the worst that fp16 hardware may do.

    load("model.pte", mode="fp32")
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from llm_coreml.errors import ConfigError, nearest
from llm_coreml.reference.ops import OPS, STRICT_OPS, Spec
from llm_coreml.reference.ops.storage import storage


@dataclass(frozen=True)
class Numerics:
    """A mode of execution.

    Attributes:
        name: what the caller asks for.
        halves: whether values declared fp16 are kept as fp16.
        ops: the operations, by MIL's name.
    """

    name: str
    halves: bool
    ops: Mapping[str, Spec]

    def held(self, dtype: str) -> torch.dtype:
        """Return the torch type in which values declared as `dtype` are kept between operations.

        Raises:
            ArtifactError: the reference does not compute with this type.
        """
        return torch.float16 if self.halves and dtype == "fp16" else storage(dtype)


_MODES = {
    mode.name: mode
    for mode in (
        Numerics("declared", True, OPS),
        Numerics("fp32", False, OPS),
        Numerics("strict-fp16", True, {**OPS, **STRICT_OPS}),
    )
}
MODES = tuple(_MODES)


def numerics(mode: str) -> Numerics:
    """Return the mode of that name.

    Raises:
        ConfigError: there is no such mode.
    """
    if mode not in _MODES:
        raise ConfigError(
            f"There is no numerics mode '{mode}', only {', '.join(MODES)}.{nearest(mode, MODES)}"
        )
    return _MODES[mode]
