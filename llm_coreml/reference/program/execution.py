"""How a program is executed: its numerics, the device, and the memory that weights may take.

load("model.pte", execution=Execution(mode="fp32", device="cuda"))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llm_coreml.artifact.limits import reason
from llm_coreml.errors import ConfigError
from llm_coreml.reference.program.constants import ConstantPool
from llm_coreml.reference.program.numerics import numerics


@dataclass(frozen=True)
class Execution:
    """The choices that a caller has; none changes what a program means.

    Attributes:
        mode: `declared`, `fp32` or `strict-fp16`, see `numerics`.
        device: torch's name of a device, such as `cpu` or `cuda:0`.
        memory_budget: bytes that expanded weights may take; further ones stay packed and are
            expanded at each use. None is half of the machine's memory.
        compiled: have torch's inductor compile runs of operations, for each shape at its second
            call; in the mode `fp32` only, since a compiler does not round between operations.
    """

    mode: str = "declared"
    device: str = "cpu"
    memory_budget: int | None = None
    compiled: bool = False

    def pool(self) -> ConstantPool:
        """Return an empty pool for the constants of one model.

        Raises:
            ConfigError: the mode is unknown or cannot be compiled, or there is no such device.
        """
        if self.compiled and self.mode != "fp32":
            raise ConfigError(
                f"The mode '{self.mode}' rounds between operations, which a compiled program does "
                "not; compile the mode 'fp32', or leave compilation out."
            )
        try:
            device = torch.device(self.device)
            torch.empty(1, device=device).item()
        # Of devices that this torch was built without, some lack a module, others a number.
        except (RuntimeError, AssertionError, ImportError, ValueError, TypeError) as error:
            raise ConfigError(
                f"The device '{self.device}' cannot be used here ({reason(error)}); use 'cpu'."
            ) from error
        return ConstantPool(numerics(self.mode), device, self.memory_budget)
