"""Tensors and layouts that several tests use."""

import ml_dtypes
import numpy as np

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
LAYOUTS = [{"packed": True}, {"keep_masks": True}]
PRUNED = ("layers.0.weight", "conv.weight", "params.Dense_0.kernel")


def bits(array):
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def normal(seed, shape, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)
