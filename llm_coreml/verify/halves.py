"""What plain fp16 makes of a model: every value rounded to fp16, every sum kept in fp32.

    with plain_half(block) as half, half:
        x = block(x, chunk)

It rounds what `model.half()` of `transformers` rounds: the result of each operation, but the inside
of a norm, of a softmax and of a fused attention, which compute in fp32 there. No program in fp16
can be expected to be closer to the model than that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from llm_coreml.decoder.norm import RMSNorm


class PlainHalf(TorchFunctionMode):
    """While it lasts, results of torch's functions are rounded to fp16 and kept as fp32."""

    def __init__(self) -> None:
        super().__init__()
        self._lasts = False
        self._inside = False

    def __enter__(self) -> PlainHalf:
        """Begin to round."""
        self._lasts = True
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *reason: Any) -> None:
        """Round no more."""
        self._lasts = False
        super().__exit__(*reason)  # type: ignore[no-untyped-call]

    def enter_norm(self, *_: Any) -> None:
        """Round nothing until `leave_norm`."""
        self._inside = True

    def leave_norm(self, _module: nn.Module, _given: Any, result: torch.Tensor) -> torch.Tensor:
        """Round again, `result` to begin with."""
        self._inside = False
        return half_of(result) if self._lasts else result

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call `func`, and round what it gives."""
        result = func(*args, **(kwargs or {}))
        if self._inside or not isinstance(result, torch.Tensor):
            return result
        return half_of(result)


@contextmanager
def plain_half(module: nn.Module) -> Iterator[PlainHalf]:
    """Give the mode in which `module`, whose norms are computed as a whole, is to be run."""
    mode, hooks = PlainHalf(), []
    for norm in module.modules():
        if isinstance(norm, RMSNorm):
            hooks.append(norm.register_forward_pre_hook(mode.enter_norm))
            hooks.append(norm.register_forward_hook(mode.leave_norm))
    try:
        yield mode
    finally:
        for hook in hooks:
            hook.remove()


def half_of(value: torch.Tensor) -> torch.Tensor:
    """Return `value`, if it is fp32, as the nearest numbers of fp16, in fp32."""
    if value.dtype is not torch.float32:
        return value
    return value.to(torch.float16).to(torch.float32)


def round_to_half(matrix: torch.Tensor, elements: int) -> None:
    """Round an fp32 matrix in place as `half_of` does, about so many elements at a time."""
    for rows in torch.split(matrix, max(1, elements // matrix.shape[1])):
        rows.copy_(rows.to(torch.float16))
