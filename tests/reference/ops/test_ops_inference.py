"""Random calls against coremltools' value inference, or against numpy where it infers nothing."""

from __future__ import annotations

from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from llm_coreml.reference.ops import reduction
from op_examples import narrow
from single_op import agree, build, close, evaluate

# Shrinking a failure would build thousands of operations.
_ONCE = (Phase.explicit, Phase.generate)
FEW = settings(deadline=None, derandomize=True, max_examples=20, phases=_ONCE)
MANY = settings(deadline=None, derandomize=True, max_examples=50, phases=_ONCE)
FLOATS = (np.float32, np.float16)
INTEGERS = (np.int8, np.uint8, np.int16, np.uint16, np.int32)
SMALL = st.integers(1, 4)


def floats(rng: np.random.Generator, shape: Any, kind: Any = np.float32) -> np.ndarray:
    return (rng.standard_normal(shape) * 2).astype(kind)


def numbers(rng: np.random.Generator, shape: Any, kind: Any) -> np.ndarray:
    """Return values of any type; a value may occur twice."""
    if np.dtype(kind).kind == "f":
        return (rng.integers(-9, 9, shape) / 4).astype(kind)
    if kind is np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    return rng.integers(0 if np.dtype(kind).kind == "u" else -99, 99, shape).astype(kind)


seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)
shapes = st.lists(SMALL, min_size=1, max_size=4)

UNARY = {
    "acos": 1, "asin": 1, "atan": 9, "atanh": 1, "cos": 9, "cosh": 9, "erf": 9, "exp": 9, "sin": 9,
    "sinh": 9, "sqrt": 0, "tan": 1, "tanh": 9, "ceil": 9, "floor": 9, "round": 9, "abs": 9,
    "sign": 9, "exp2": 9, "square": 9, "relu": 9, "relu6": 9, "sigmoid": 9, "softsign": 9,
    "softplus": 9, "log": 0, "rsqrt": 0, "inverse": 0, "gelu": 9,
}  # fmt: skip


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("kind", FLOATS)
def test_unary(name: str, kind: Any) -> None:
    rng = np.random.default_rng(7)
    low, high = (0.05, 4) if UNARY[name] == 0 else (-UNARY[name], UNARY[name])
    x = (rng.uniform(low, high, (5, 40)) * 0.95).astype(kind)
    agree(name, x=x, tolerance=2e-5 if name in ("tan", "sinh", "cosh", "acos") else 3e-6)


@FEW
@given(seeds, shapes, st.data())
@pytest.mark.parametrize("kind", [*FLOATS, np.int32])
def test_binary(kind: Any, rng: Any, shape: list[int], data: Any) -> None:
    other = [1 if data.draw(st.booleans()) else size for size in shape]
    other = other[data.draw(st.integers(0, len(shape) - 1)) :]
    x, y = numbers(rng, shape, kind), numbers(rng, other, kind)
    for name in ("add", "sub", "mul", "maximum", "minimum"):
        agree(name, x=x, y=y)
        agree(name, x=y, y=x)
    for name in ("equal", "not_equal", "greater", "greater_equal", "less", "less_equal"):
        agree(name, x=x, y=y)
    divisor = np.where(y == 0, kind(3), y)
    for name in ("floor_div", "mod"):
        agree(name, x=x, y=divisor)
    if kind is not np.int32:
        agree("real_div", x=x, y=divisor)
        agree("pow", x=abs(x) + kind(0.25), y=y, tolerance=1e-5)
    else:
        agree("pow", x=x % 5, y=abs(y) % 9)
    for name in ("logical_and", "logical_or", "logical_xor"):
        agree(name, x=x > 0, y=y > 0)
    chosen = evaluate("select", cond=y > 0, a=x, b=x * kind(2))[0]
    np.testing.assert_array_equal(chosen, np.where(y > 0, x, x * kind(2)))


@MANY
@given(seeds, shapes, st.sampled_from([*FLOATS, *INTEGERS, np.bool_]), st.data())
def test_shapes(rng: Any, shape: list[int], kind: Any, data: Any) -> None:
    x, rank = numbers(rng, shape, kind), len(shape)
    perm = data.draw(st.permutations(range(rank)))
    signed = [axis - rank if data.draw(st.booleans()) else axis for axis in perm]
    agree("transpose", x=x, perm=signed)
    agree("reverse", x=x, axes=signed[: data.draw(st.integers(1, rank))])
    places = data.draw(st.lists(st.integers(0, rank), min_size=1, max_size=5 - rank, unique=True))
    agree("expand_dims", x=x, axes=places)
    ones = [axis - rank for axis, size in enumerate(shape) if size == 1]
    if ones and len(ones) < rank:
        agree("squeeze", x=x, axes=ones)
    target = data.draw(st.permutations(shape))
    inferred = data.draw(st.integers(0, rank - 1))
    agree("reshape", x=x, shape=[-1 if at == inferred else n for at, n in enumerate(target)])
    copied = data.draw(st.integers(0, rank - 1))
    agree("reshape", x=x, shape=[0 if at == copied else n for at, n in enumerate(shape)])
    if kind in (np.float32, np.float16, np.int32, np.bool_):
        agree("split", x=x, num_splits=shape[0], axis=-rank)
        agree("tile", x=x, reps=[data.draw(SMALL) for _ in shape])
        cut = data.draw(st.integers(1, rank))
        flat = evaluate("flatten2d", x=x[..., None, None], axis=cut - rank - 2)[0]
        np.testing.assert_array_equal(flat, x.reshape(int(np.prod(shape[:cut])), -1))
        axis = data.draw(st.integers(-rank - 1, rank))
        joined = evaluate("stack", values=[x, x[::-1].copy()], axis=axis)[0]
        np.testing.assert_array_equal(joined, np.stack([x, x[::-1]], axis))
        axis = data.draw(st.integers(-rank, rank - 1))
        part = x.take(range(data.draw(st.integers(1, x.shape[axis]))), axis)
        joined = evaluate("concat", values=[x, part], axis=axis)[0]
        np.testing.assert_array_equal(joined, np.concatenate([x, part], axis))
        if rank >= 2:
            lower, upper = (data.draw(st.integers(-1, 3)) for _ in range(2))
            agree("band_part", x=x, lower=lower, upper=upper)
    if kind in FLOATS:
        amounts = [data.draw(st.integers(0, 2)) for _ in range(2 * data.draw(st.integers(1, rank)))]
        agree("pad", x=x, pad=np.int32(amounts), constant_val=kind(1.5))


@FEW
@given(seeds, st.data())
def test_pads_without_values(rng: Any, data: Any) -> None:
    shape = [data.draw(st.integers(3, 5)) for _ in range(3)]
    x = floats(rng, shape)
    amounts = [data.draw(st.integers(0, 2)) for _ in range(4)]
    pairs = [(0, 0), tuple(amounts[:2]), tuple(amounts[2:])]
    for mode, equivalent in (("reflect", "reflect"), ("replicate", "edge")):
        actual = evaluate("pad", x=x, pad=amounts, mode=mode)[0]
        np.testing.assert_array_equal(actual, np.pad(x, pairs, equivalent))


@MANY
@given(seeds, shapes, st.sampled_from([np.float32, np.float16, np.int8, np.uint16]), st.data())
def test_slices(rng: Any, shape: list[int], kind: Any, data: Any) -> None:
    x = numbers(rng, shape, kind)
    flag = st.lists(st.booleans(), min_size=len(shape), max_size=len(shape))
    squeeze = data.draw(flag)
    assume(not all(squeeze))
    begin = [data.draw(st.integers(-size, size - 1)) for size in shape]
    arguments = {
        "begin": begin,
        "end": [data.draw(st.integers(-size - 1, size + 1)) for size in shape],
        "stride": [data.draw(st.sampled_from([1, 2, 3, -1, -2])) for _ in shape],
        "begin_mask": data.draw(flag),
        "end_mask": data.draw(flag),
        "squeeze_mask": squeeze,
    }
    # coremltools takes an element along a squeezed axis only with a step of 1.
    for axis, single in enumerate(squeeze):
        if single:
            arguments["stride"][axis] = 1
            arguments["begin_mask"][axis] = arguments["end_mask"][axis] = False
            arguments["end"][axis] = begin[axis] + 1
    try:
        case = build("slice_by_index", x=x, **arguments)
    except ValueError as error:
        assert "zero" in str(error) or "dimension" in str(error) or "0" in str(error)
        return
    if case.inferred is None or 0 in case.inferred[0].shape:
        return
    computed = {**arguments, "begin": np.int32(begin), "end": np.int32(arguments["end"])}
    for given_arguments in (arguments, computed):
        agree("slice_by_index", x=x, **given_arguments)
    start = [axis % size for axis, size in zip(begin, shape, strict=True)]
    size = [
        data.draw(st.sampled_from([-1, *range(1, n - s + 1)]))
        for n, s in zip(shape, start, strict=True)
    ]
    agree("slice_by_size", x=x, begin=start, size=size)
    agree("slice_by_size", x=x, begin=np.int32(start), size=np.int32(size))


@MANY
@given(seeds, shapes, shapes, st.data())
def test_gathers(rng: Any, shape: list[int], chosen: list[int], data: Any) -> None:
    assume(len(shape) + len(chosen) <= 6)
    kind = data.draw(st.sampled_from([*FLOATS, *INTEGERS]))
    x, rank = numbers(rng, shape, kind), len(shape)
    batch = data.draw(st.integers(0, min(rank, len(chosen)) - 1))
    chosen = [*shape[:batch], *chosen[batch:]]
    axis = data.draw(st.integers(batch, rank - 1))
    size = shape[axis]
    index_kind = data.draw(st.sampled_from([np.int32, np.int16, np.int8]))
    indices = rng.integers(-size, size, chosen).astype(index_kind)
    # coremltools' own inference errs on an axis from the right behind batch axes.
    given_axis = axis - rank if batch == 0 and data.draw(st.booleans()) else axis
    actual = evaluate("gather", x=x, indices=indices, axis=given_axis, batch_dims=batch)[0]
    expected = np.empty(actual.shape, kind)
    for place in np.ndindex(*shape[:batch]):
        expected[place] = x[place].take(indices[place], axis - batch)
    np.testing.assert_array_equal(actual, expected)
    agree("gather", x=x, indices=indices, axis=given_axis, batch_dims=batch)

    along = [data.draw(SMALL) if at == axis else n for at, n in enumerate(shape)]
    indices = rng.integers(-size, size, along).astype(np.int32)
    agree("gather_along_axis", x=x, indices=indices, axis=given_axis)

    depth = data.draw(st.integers(1, rank - batch))
    rows = [rng.integers(-n, n, chosen).astype(np.int32) for n in shape[batch : batch + depth]]
    indices = np.stack(rows, -1)
    actual = evaluate("gather_nd", x=x, indices=indices, batch_dims=batch)[0]
    assert actual.shape == (*chosen, *shape[batch + depth :])
    for place in np.ndindex(*chosen):
        wanted = x[(*place[:batch], *indices[place])]
        np.testing.assert_array_equal(actual[place], wanted)


def test_two_batch_axes() -> None:
    x = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    indices = np.random.default_rng(1).integers(-4, 4, (2, 3, 6)).astype(np.int32)
    wanted = np.take_along_axis(x, indices[..., None] % 4, 2)
    actual = evaluate("gather_nd", x=x, indices=indices[..., None], batch_dims=2)[0]
    np.testing.assert_array_equal(actual, wanted)
    actual = evaluate("gather", x=x, indices=indices, axis=2, batch_dims=2)[0]
    np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("target", [ct.target.iOS15, ct.target.iOS16, ct.target.iOS17])
def test_gathers_of_older_opsets(target: Any) -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    places = np.array([[1, 0], [2, 1]], np.int32)
    agree("gather", target, x=x, indices=places, axis=1)
    agree("gather_along_axis", target, x=x, indices=places[:, :1].repeat(4, 1), axis=0)
    np.testing.assert_array_equal(
        evaluate("gather_nd", target, x=x, indices=places)[0], x[places[:, 0], places[:, 1]]
    )


MODES = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "min": np.minimum,
    "max": np.maximum, "update": lambda old, new: new,
}  # fmt: skip


@FEW
@given(seeds, shapes, st.data())
@pytest.mark.parametrize("mode", MODES)
def test_scatters(mode: str, rng: Any, shape: list[int], data: Any) -> None:
    kind = np.float32 if mode == "div" else data.draw(st.sampled_from([np.float32, np.int32]))
    x, rank = numbers(rng, shape, kind), len(shape)
    axis = data.draw(st.integers(0, rank - 1))
    size, combine = shape[axis], MODES[mode]
    count = data.draw(st.integers(1, size))
    repeats = mode != "update" and data.draw(st.booleans())
    places = (rng.integers(0, size, count) if repeats else rng.permutation(size)[:count]) - size * (
        rng.integers(0, 2, count)
    )

    def updates(shape: Any) -> np.ndarray:
        return np.where(values := numbers(rng, shape, kind), values, kind(2))

    def check(name: str, expected: np.ndarray, **arguments: Any) -> None:
        close(evaluate(name, data=x, mode=mode, **arguments)[0], expected, 1e-5)

    new = updates([*shape[:axis], count, *shape[axis + 1 :]])
    expected = np.moveaxis(x.copy(), axis, 0)
    for place, update in zip(places, np.moveaxis(new, axis, 0), strict=True):
        expected[place] = combine(expected[place], update)
    expected = np.moveaxis(expected, 0, axis)
    check("scatter", expected, indices=places.astype(np.int32), updates=new, axis=axis - rank)

    sizes = [1] * rank
    sizes[axis] = count
    indices = np.broadcast_to(places.reshape(sizes), new.shape).astype(np.int32)
    check("scatter_along_axis", expected, indices=indices, updates=new, axis=axis)

    depth = data.draw(st.integers(1, rank))
    leading = [
        tuple(rng.integers(-n, n) for n in shape[:depth]) for _ in range(count if repeats else 1)
    ]
    new = updates([len(leading), *shape[depth:]])
    expected = x.copy()
    for place, update in zip(leading, new, strict=True):
        expected[place] = combine(expected[place], update)
    check("scatter_nd", expected, indices=np.array(leading, np.int32), updates=new)


REDUCTIONS = (
    "sum", "mean", "max", "min", "prod", "sum_square", "l1_norm", "l2_norm", "log_sum_exp",
)  # fmt: skip


@FEW
@given(seeds, shapes, st.sampled_from([*FLOATS, np.int32]), st.data())
def test_reductions(rng: Any, shape: list[int], kind: Any, data: Any) -> None:
    x, rank = numbers(rng, shape, kind), len(shape)
    axes = data.draw(st.lists(st.integers(0, rank - 1), min_size=1, unique=True))
    axes = [axis - rank if data.draw(st.booleans()) else axis for axis in axes]
    keep = data.draw(st.booleans())
    arguments: dict[str, Any] = {"axes": axes, "keep_dims": keep}
    if data.draw(st.integers(0, 3)) == 0:
        del arguments["axes"]
    for name in REDUCTIONS:
        if kind is not np.int32:
            agree(f"reduce_{name}", x=x, tolerance=2e-5, **arguments)
        elif name not in ("prod", "log_sum_exp", "l2_norm"):
            agree(f"reduce_{name}", x=x, **arguments)
    positive = abs(x) + kind(1)
    if kind is not np.int32:
        agree("reduce_log_sum", x=positive, tolerance=2e-5, **arguments)
    axis = data.draw(st.integers(-rank, rank - 1))
    for name in ("reduce_argmax", "reduce_argmin"):
        for output in ("int32", "uint16"):
            agree(name, x=x, axis=axis, keep_dims=keep, output_dtype=output)
    agree("cumsum", x=x, axis=data.draw(st.integers(0, rank - 1)), reverse=keep, tolerance=1e-5)


@FEW
@given(seeds, shapes, st.sampled_from([*FLOATS, np.int32]), st.data())
def test_sorting(rng: Any, shape: list[int], kind: Any, data: Any) -> None:
    rank = len(shape)
    x = rng.permutation(int(np.prod(shape))).reshape(shape).astype(kind)
    axis = data.draw(st.integers(-rank, rank - 1))
    ascending = data.draw(st.booleans())
    agree("argsort", x=x, axis=axis, ascending=ascending)
    k = data.draw(st.integers(1, shape[axis]))
    agree("topk", x=x, k=k, axis=axis, ascending=ascending)
    agree("topk", ct.target.iOS15, x=x, k=k, axis=axis, ascending=ascending)
    values, places = evaluate(
        "topk", x=x, k=k, axis=axis, ascending=ascending, output_indices_dtype="uint16"
    )
    assert places.dtype == np.uint16
    np.testing.assert_array_equal(values, np.take_along_axis(x, places.astype(int), axis))
    # coremltools' own inference fails on exclusive sums.
    declared = {"f": "fp32", "i": "int32"}[x.dtype.kind]
    widest = torch.from_numpy(x.astype(np.float32) if declared == "fp32" else x)
    exclusive = reduction.cumsum(widest, declared, axis, exclusive=True).numpy()
    close(exclusive, np.cumsum(x, axis, dtype=np.float64) - x)


RANGES = {
    "int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767), "uint16": (0, 65535),
    "int32": (-(2**31), 2**31 - 1), "bool": (0, 1),
}  # fmt: skip


@MANY
@given(
    seeds, st.sampled_from([*RANGES, "fp16", "fp32"]), st.sampled_from([*RANGES, "fp16", "fp32"])
)
def test_casts(rng: Any, source: str, target: str) -> None:
    low, high = -200, 200
    for name in (source, target):
        if name in RANGES and name != "bool":
            low, high = max(low, RANGES[name][0]), min(high, RANGES[name][1])
    values = rng.integers(low, high, 30, endpoint=True) + rng.choice([0.0, 0.25, 0.5, 0.75], 30)
    values = np.clip(values, low, high)
    kind = {"fp16": np.float16, "fp32": np.float32}.get(source) or np.dtype(source).type
    x = (values > 0) if source == "bool" else values.astype(kind)
    agree("cast", x=x, dtype=target)


@FEW
@given(seeds, st.sampled_from(FLOATS), st.sampled_from(["int8", "uint8"]), st.data())
def test_quantization(rng: Any, kind: Any, target: str, data: Any) -> None:
    shape = data.draw(st.lists(SMALL, min_size=2, max_size=3))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    vector = data.draw(st.booleans())
    size = [shape[axis]] if vector else []
    # Powers of two divide exactly, so rounding meets no tie by accident.
    scale = (2.0 ** rng.integers(-4, 2, size)).astype(kind)
    low, high = RANGES[target]
    zero = rng.integers(low // 4, high // 4, size).astype(target)
    arguments = {"scale": scale if vector else kind(scale), "axis": axis}
    if data.draw(st.booleans()):
        arguments["zero_point"] = zero if vector else np.dtype(target).type(zero)
    if not vector:
        del arguments["axis"]
    x = floats(rng, shape, kind) * kind(8)
    agree("quantize", input=x, output_dtype=target, **arguments)
    stored = rng.integers(low, high, shape, endpoint=True).astype(target)
    sizes = [shape[axis] if vector and at == axis % len(shape) else 1 for at in range(len(shape))]
    shift = zero.reshape(sizes).astype(np.float64) if "zero_point" in arguments else 0.0
    actual = evaluate("dequantize", input=stored, **arguments)[0]
    close(actual, (stored - shift) * scale.reshape(sizes).astype(np.float64))


@FEW
@given(seeds, st.sampled_from([*FLOATS, np.int32]), st.data())
def test_products(rng: Any, kind: Any, data: Any) -> None:
    m, k, n, batch = (data.draw(SMALL) for _ in range(4))
    first, second = data.draw(st.booleans()), data.draw(st.booleans())
    x = numbers(rng, (batch, k, m) if first else (batch, m, k), kind)
    y = numbers(rng, (n, k) if second else (k, n), kind)
    agree("matmul", x=x, y=y, transpose_x=first, transpose_y=second, tolerance=1e-5)
    weight, bias = numbers(rng, (n, k), kind), numbers(rng, (n,), kind)
    x = numbers(rng, (batch, m, k), kind)
    agree("linear", x=x, weight=weight, bias=bias, tolerance=1e-5)
    if kind in FLOATS:
        # iOS 17 admits constant weights of another type; the result has that of x.
        other = np.float16 if kind is np.float32 else np.float32
        mixed = evaluate("linear", x=x, weight=weight.astype(other), bias=bias.astype(other))[0]
        assert mixed.dtype == kind
        close(mixed, x.astype(np.float64) @ weight.T + bias, 1e-5)


@FEW
@given(seeds, st.sampled_from(FLOATS), st.data())
def test_normalizations(rng: Any, kind: Any, data: Any) -> None:
    shape = [data.draw(st.integers(2, 4)) for _ in range(3)]
    x = floats(rng, shape, kind)
    axes = data.draw(st.sampled_from([[2], [1, 2], [-1]]))
    inner = [shape[axis] for axis in axes]
    settings = {"gamma": floats(rng, inner, kind), "beta": floats(rng, inner, kind)}
    agree("layer_norm", x=x, axes=axes, epsilon=kind(1e-2), tolerance=1e-4, **settings)
    agree("softmax", x=x, axis=data.draw(st.integers(-3, 2)), tolerance=1e-5)
    agree("l2_norm", x=x, tolerance=1e-5)


def bits_of(data: Any, choices: tuple[int, ...] = (1, 2, 3, 4, 6, 8)) -> tuple[int, str]:
    bits = data.draw(st.sampled_from(choices))
    return bits, f"uint{bits}"


@MANY
@given(seeds, st.data())
def test_blockwise(rng: Any, data: Any) -> None:
    rank = data.draw(st.integers(1, 3))
    counts = [data.draw(st.integers(1, 3)) for _ in range(rank)]
    shape = [count * data.draw(st.integers(1, 4)) for count in counts]
    name = data.draw(st.sampled_from(["int4", "uint4", "int8", "uint8", "fp16", "fp32"]))
    kind = data.draw(st.sampled_from(FLOATS))

    def stored(name: str, shape: Any) -> np.ndarray:
        if name.startswith("fp"):
            return floats(rng, shape, {"fp16": np.float16, "fp32": np.float32}[name])
        bits, signed = int(name[-1]), name.startswith("int")
        low = -(1 << (bits - 1)) if signed else 0
        return narrow(rng.integers(low, low + (1 << bits), shape), name)

    arguments = {"scale": rng.uniform(0.01, 2, counts).astype(kind)}
    offset = data.draw(st.sampled_from([None, name, "fp16", "fp32"]))
    if offset is not None:
        arguments["offset"] = stored(offset, counts)
    agree("constexpr_blockwise_shift_scale", data=stored(name, shape), **arguments)

    mask = narrow(rng.integers(0, 2, shape), "uint1")
    kept = int((mask != 0).sum())
    assume(kept > 0)
    agree(
        "constexpr_sparse_blockwise_shift_scale",
        data_mask=mask, nonzero_data=stored(name, kept), **arguments,
    )  # fmt: skip
    agree("constexpr_sparse_to_dense", nonzero_data=stored(name, kept), mask=mask)


@MANY
@given(seeds, st.data())
def test_tables(rng: Any, data: Any) -> None:
    bits, name = bits_of(data)
    rank = data.draw(st.integers(1, 3))
    groups = [data.draw(st.integers(1, 3)) for _ in range(rank)]
    shape = [count * data.draw(st.integers(1, 3)) for count in groups]
    width = data.draw(st.sampled_from([1, 1, 2, 3]))
    kind = data.draw(st.sampled_from([np.float16, np.float32, np.int8, np.uint8]))
    lut = numbers(rng, [*groups, 1 << bits, width], kind)
    arguments: dict[str, Any] = {"lut": lut}
    if width > 1:
        arguments["vector_axis"] = data.draw(st.integers(-rank, rank - 1))
    indices = narrow(rng.integers(0, 1 << bits, shape), name)
    agree("constexpr_lut_to_dense", indices=indices, **arguments)

    mask = narrow(rng.integers(0, 2, shape), "uint1")
    kept = narrow(rng.integers(0, 1 << bits, int((mask != 0).sum())), name)
    assume(kept.size > 0)
    agree("constexpr_lut_to_sparse", indices_mask=mask, indices_nonzero_data=kept, **arguments)


@FEW
@given(seeds, shapes, st.data())
def test_forms_of_ios16(rng: Any, shape: list[int], data: Any) -> None:
    bits, _ = bits_of(data, (1, 2, 4, 6, 8))
    count = int(np.prod(shape))
    lut = numbers(rng, 1 << bits, data.draw(st.sampled_from([np.float16, np.int8, np.uint8])))
    flat = rng.integers(0, 1 << bits, count)
    bit_rows = (flat[:, None] >> np.arange(bits)) & 1
    packed = np.packbits(bit_rows.reshape(-1).astype(np.uint8), bitorder="little")
    arguments = {"indices": packed, "lut": lut, "shape": np.array(shape, np.uint32)}
    actual = agree("constexpr_lut_to_dense", ct.target.iOS16, **arguments)[0]
    np.testing.assert_array_equal(actual, lut[flat].reshape(shape))

    rank = len(shape)
    axis = data.draw(st.integers(-rank, rank - 1))
    kind = data.draw(st.sampled_from(FLOATS))
    scale = rng.uniform(0.01, 2, shape[axis]).astype(kind)
    stored = rng.integers(-128, 128, shape).astype(np.int8)
    for zero in (np.int8(3), stored.take(0, axis), np.float32(0.5)):
        zero = zero if np.ndim(zero) == 0 or np.shape(zero) == (shape[axis],) else np.int8(-3)
        agree(
            "constexpr_affine_dequantize", ct.target.iOS16,
            quantized_data=stored, zero_point=zero, scale=scale, axis=axis,
        )  # fmt: skip
