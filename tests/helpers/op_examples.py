"""One call of every operation that the reference computes, as arguments of `single_op.build`."""

from __future__ import annotations

from typing import Any

import coremltools as ct
import numpy as np
from coremltools.converters.mil.mil import types

RNG = np.random.default_rng(5)
X = RNG.uniform(0.1, 0.9, (2, 3, 4)).astype(np.float32)
Y = RNG.uniform(0.1, 0.9, (2, 3, 4)).astype(np.float32)
INTS = RNG.integers(1, 9, (2, 3, 4)).astype(np.int32)
FLAGS = RNG.integers(0, 2, (2, 3, 4)).astype(bool)
IMAGE = RNG.uniform(0.1, 0.9, (4, 4, 6, 6)).astype(np.float32)
THREE = RNG.uniform(0.1, 0.9, 3).astype(np.float32)
FOUR = RNG.uniform(0.1, 0.9, 4).astype(np.float32)
PLACES = np.array([[1, -1], [0, 1]], np.int32)


def narrow(array: np.ndarray, name: str) -> np.ndarray:
    """Return `array` in coremltools' numpy type for a type narrower than a byte."""
    return array.astype(types.nptype_from_builtin(types.string_to_builtin(name)))


def _same_for(names: str, **arguments: Any) -> dict[str, dict[str, Any]]:
    return {name: arguments for name in names.split()}


_MASK = narrow(np.array([[1, 0, 1, 0], [0, 1, 1, 1]]), "uint1")
_INDICES = narrow(np.array([[1, 0, 1, 3], [0, 2, 1, 1]]), "uint2")
_TABLE = np.array([[[[1], [2], [3], [4]]]], np.float16)
_BEGIN, _END = np.array([0, 1, 0], np.int32), np.array([2, 3, 3], np.int32)
_POOL: dict[str, Any] = {"kernel_sizes": [2, 3], "pad_type": "same", "strides": [2, 1]}
_SCATTER: dict[str, Any] = {"data": X, "indices": np.array([2, 0], np.int32), "axis": 1}

EXAMPLES: dict[str, dict[str, Any]] = {
    **_same_for("abs acos asin atan atanh ceil cos cosh erf exp exp2 floor", x=X),
    **_same_for("identity inverse log", x=X),
    **_same_for("relu relu6 round rsqrt sigmoid sign silu sin sinh softplus", x=X),
    **_same_for("softsign sqrt square", x=X),
    **_same_for("tan tanh shape non_zero flatten2d softmax gelu argsort cumsum", x=X),
    **_same_for("add sub mul real_div floor_div mod pow maximum minimum equal", x=X, y=Y),
    **_same_for("not_equal greater greater_equal less less_equal", x=INTS, y=INTS[0]),
    **_same_for("logical_and logical_or logical_xor", x=FLAGS, y=FLAGS[1]),
    **_same_for("reduce_sum reduce_mean reduce_max reduce_min reduce_prod reduce_sum_square", x=X),
    **_same_for("reduce_l1_norm reduce_l2_norm reduce_log_sum reduce_log_sum_exp", x=X, axes=[1]),
    **_same_for("reduce_argmax reduce_argmin", x=X, axis=1),
    **_same_for("avg_pool max_pool l2_pool", x=IMAGE, **_POOL),
    **_same_for("pixel_shuffle", x=IMAGE, upscale_factor=2),
    **_same_for("pixel_unshuffle", x=IMAGE, downscale_factor=np.uint32(2)),
    **_same_for("depth_to_space space_to_depth", x=IMAGE, block_size=2),
    **_same_for("gather gather_along_axis", x=INTS[0, :2, :2], indices=PLACES, axis=0),
    **_same_for("clamped_relu scaled_tanh sigmoid_hard", x=X, alpha=0.5, beta=0.2),
    **_same_for("linear_activation", x=X, alpha=0.5, beta=0.2),
    **_same_for("elu leaky_relu thresholded_relu threshold", x=X, alpha=0.5),
    **_same_for("layer_norm", x=X, axes=[2], gamma=FOUR, beta=FOUR),
    **_same_for("instance_norm", x=IMAGE, gamma=FOUR, beta=FOUR),
    "matmul": {"x": X, "y": Y, "transpose_y": True},
    "logical_not": {"x": FLAGS},
    "cast": {"x": X * 9, "dtype": "int16"},
    "clip": {"x": X, "alpha": 0.2, "beta": 0.5},
    "select": {"cond": FLAGS, "a": X, "b": Y},
    "prelu": {"x": IMAGE - 0.5, "alpha": FOUR},
    "softplus_parametric": {"x": X, "alpha": THREE, "beta": THREE},
    "gather_nd": {"x": X, "indices": PLACES[:, :, None], "batch_dims": 1},
    "reverse_sequence": {"x": X, "lengths": np.array([2, 3], np.int32), "seq_axis": 1},
    "scatter": {**_SCATTER, "updates": Y[:, :2], "mode": "div"},
    "scatter_along_axis": {
        "data": X, "indices": np.array([[[2, 0, 1, 0]]] * 2, np.int32), "updates": Y[:, :1],
        "axis": 1, "mode": "update",
    },
    "scatter_nd": {"data": X, "indices": np.array([[0, 2], [1, 0]], np.int32), "updates": Y[0, :2]},
    "linear": {"x": X, "weight": Y[0], "bias": THREE},
    "einsum": {"values": [IMAGE, IMAGE.transpose(0, 3, 2, 1)], "equation": "abcd,adce->abce"},
    "conv": {"x": IMAGE, "weight": IMAGE[:, :2, :3, :3], "groups": 2, "pad_type": "same"},
    "conv_transpose": {
        "x": IMAGE, "weight": IMAGE[:, :, :3, :3], "bias": FOUR, "pad_type": "same",
        "strides": [2, 2],
    },
    "batch_norm": {"x": IMAGE, "mean": FOUR, "variance": FOUR, "gamma": FOUR, "beta": FOUR},
    "l2_norm": {"x": IMAGE},
    "local_response_norm": {"x": IMAGE, "size": 3},
    "topk": {"x": X, "k": 2, "axis": 1},
    "scaled_dot_product_attention": {
        "query": X, "key": Y, "value": X, "attn_mask": np.tril(np.ones((3, 3))).astype(bool),
    },
    "reshape": {"x": X, "shape": np.array([0, -1], np.int32)},
    "reshape_like": {
        "x": X, "ref_tensors": [Y, Y], "begins": [0, 2], "ends": [2, 0], "end_masks": [False, True],
    },
    "expand_dims": {"x": X, "axes": [0, -1]},
    "squeeze": {"x": X[:1], "axes": [0]},
    "transpose": {"x": X, "perm": [2, 0, -2]},
    "reverse": {"x": X, "axes": [0, 2]},
    "concat": {"values": [X, Y], "axis": 1},
    "stack": {"values": [X, Y], "axis": -1},
    "tile": {"x": X, "reps": np.array([1, 2, 3], np.int32)},
    "pad": {"x": X, "pad": np.array([1, 2, 3, 0], np.int32), "mode": "reflect"},
    "fill": {"shape": np.array([2, 3], np.int32), "value": 2.5},
    "fill_like": {"ref_tensor": X, "value": 7},
    "range_1d": {"start": np.float32(0.5), "end": np.float32(2.4), "step": np.float32(0.5)},
    "one_hot": {
        "indices": PLACES % 2, "one_hot_vector_size": 3, "axis": 0, "on_value": 2.5,
        "off_value": 1.5,
    },
    "band_part": {"x": X, "lower": 1, "upper": 0},
    "quantize": {
        "input": X * 9, "scale": THREE, "zero_point": np.array([3, 4, 5], np.int8), "axis": 1,
        "output_dtype": "int8",
    },
    "dequantize": {
        "input": INTS.astype(np.int8), "scale": THREE, "zero_point": np.array([3, 4, 5], np.int8),
        "axis": 1,
    },
    "slice_by_index": {"x": X, "begin": _BEGIN, "end": _END, "stride": [1, 1, 2]},
    "slice_by_size": {"x": X, "begin": _BEGIN, "size": np.array([1, -1, 2], np.int32)},
    "slice_update": {"x": X, "update": Y[:, :2, :3], "begin": _BEGIN, "end": _END},
    "split": {"x": X, "axis": 2, "split_sizes": [1, 3]},
    "sliding_windows": {"x": X, "axis": 1, "size": 2},
    "crop": {"x": X, "crop_height": [1, 0], "crop_width": [0, 2]},
    "space_to_batch": {"x": IMAGE, "block_shape": [2, 2], "paddings": np.array([[1, 1], [0, 0]])},
    "batch_to_space": {"x": IMAGE, "block_shape": [2, 2], "crops": np.array([[1, 1], [0, 0]])},
    "constexpr_affine_dequantize": {
        "quantized_data": INTS[0].astype(np.int8), "zero_point": np.int8(3), "scale": THREE,
        "axis": 0,
    },
    "constexpr_cast": {"source_val": X.astype(np.float16), "output_dtype": "fp32"},
    "constexpr_blockwise_shift_scale": {
        "data": narrow(INTS[0] - 4, "int4"), "scale": X[0, :1, :2].astype(np.float16),
        "offset": narrow(np.array([[1, 2]]), "int4"),
    },
    "constexpr_lut_to_dense": {"indices": _INDICES, "lut": _TABLE},
    "constexpr_lut_to_sparse": {
        "indices_mask": _MASK, "indices_nonzero_data": narrow(np.array([1, 0, 3, 2, 1]), "uint2"),
        "lut": _TABLE,
    },
    "constexpr_sparse_to_dense": {"nonzero_data": np.arange(5, dtype=np.float16), "mask": _MASK},
    "constexpr_sparse_blockwise_shift_scale": {
        "data_mask": _MASK, "nonzero_data": narrow(np.array([1, 0, 3, 2, -1]), "int4"),
        "scale": np.array([[0.5], [0.25]], np.float16),
    },
}  # fmt: skip

# The forms of iOS 16, whose parameters differ.
PACKED: dict[str, dict[str, Any]] = {
    "constexpr_lut_to_dense": {
        "indices": np.array([0b11_10_01_00, 0b01], np.uint8), "lut": np.float16([1, 2, 3, 4]),
        "shape": np.array([5], np.uint32), "target": ct.target.iOS16,
    },
    "constexpr_sparse_to_dense": {
        "nonzero_data": np.float16([1, 2, 3]), "mask": np.array([0b10110], np.uint8),
        "shape": np.array([5], np.uint32), "target": ct.target.iOS16,
    },
}  # fmt: skip
