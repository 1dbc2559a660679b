"""What holds for every operation: its device, its defaults, and who owns its result's memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from llm_coreml.reference.ops import OPS
from op_examples import EXAMPLES, PACKED
from single_op import build, close, evaluate

# These look at values, which fake tensors have not: to check a range, or to find a shape.
LOOKS_AT_VALUES = {
    "cast", "constexpr_lut_to_dense", "constexpr_lut_to_sparse", "constexpr_sparse_to_dense",
    "constexpr_sparse_blockwise_shift_scale", "gather", "gather_along_axis", "gather_nd",
    "non_zero", "reduce_argmax", "reduce_argmin", "reverse_sequence", "scatter",
    "scatter_along_axis", "scatter_nd", "topk",
}  # fmt: skip
FORMS = [
    *((name, arguments) for name, arguments in EXAMPLES.items()),
    *((name, arguments) for name, arguments in PACKED.items()),
]
NAMES = [*EXAMPLES, *(f"{name}-packed" for name in PACKED)]


class NamedDevices(TorchFunctionMode):
    """Refuses to create a tensor on torch's default device."""

    def __torch_function__(
        self,
        func: Any,
        kinds: Any,
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        assert func not in _device_constructors() or "device" in given, f"{func} names no device"
        return func(*args, **given)


def test_every_operation_has_an_example() -> None:
    assert set(EXAMPLES) == set(OPS)


@pytest.mark.parametrize(("name", "arguments"), FORMS, ids=NAMES)
def test_equals_value_inference_with_and_without_defaults(
    name: str, arguments: dict[str, Any]
) -> None:
    actual = evaluate(name, **arguments)
    for value, wanted in zip(actual, build(name, **arguments).inferred or (), strict=False):
        close(value, wanted, 1e-5)


@pytest.mark.parametrize(("name", "arguments"), FORMS, ids=NAMES)
def test_new_tensors_name_their_device(name: str, arguments: dict[str, Any]) -> None:
    function, given = build(name, **arguments).call(dynamic=True)
    with NamedDevices():
        function(**given)


def on_other_device(name: str) -> Any:
    """Run the example on fake tensors, which only know their device and mix with no other one."""
    function, given = build(name, **EXAMPLES[name]).call(dynamic=False, device="meta")

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty(value.shape, dtype=value.dtype, device="meta")

    with FakeTensorMode():
        return function(**{key: moved(value) for key, value in given.items()})


@pytest.mark.parametrize("name", sorted(set(OPS) - LOOKS_AT_VALUES))
def test_works_on_another_device(name: str) -> None:
    result = on_other_device(name)
    for item in result if isinstance(result, tuple) else (result,):
        assert item.device.type == "meta"


@pytest.mark.parametrize("name", sorted(LOOKS_AT_VALUES))
def test_those_said_to_look_at_values_do(name: str) -> None:
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        on_other_device(name)


@pytest.mark.parametrize(("name", "arguments"), FORMS, ids=NAMES)
def test_inputs_stay_and_fresh_results_are_fresh(name: str, arguments: dict[str, Any]) -> None:
    function, given = build(name, **arguments).call(dynamic=True)
    tensors = [
        item
        for value in given.values()
        for item in (value if isinstance(value, list) else [value])
        if isinstance(item, torch.Tensor)
    ]
    before = [tensor.clone() for tensor in tensors]
    result = function(**given)
    for tensor, kept in zip(tensors, before, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), kept.numpy())
    memory = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    for item in result if isinstance(result, tuple) else (result,):
        assert not OPS[name].fresh or item.untyped_storage().data_ptr() not in memory
