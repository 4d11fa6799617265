"""How operands fit the tiles of a GPU kernel, and which GPU, dtype and sizes it takes. Loads no part of Pallas."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from nm_jax.matmul._compress import SparseMatrix
from nm_jax.matmul._fragments import CHUNK, EMPTY_WORD
from nm_jax.matmul.base import Product

PTX_TYPES = {jnp.dtype(jnp.bfloat16): "bf16", jnp.dtype(jnp.float16): "f16"}
MOST_PADDING = 1.25
"""Padding pays while the padded product has at most this many times the multiplications of the product itself."""


def misfit(product: Product, tiles: Sequence[int], device: Any, capabilities: Sequence[range]) -> str | None:
    """Why a kernel cannot, or should not, run a product on a device, or `None`.

    Args:
      product: what is to be computed.
      tiles: sizes of a tile along its tokens, rows and k.
      device: a `jax.Device`.
      capabilities: compute capabilities that the kernel runs on, times ten.
    """
    if product.dtype not in PTX_TYPES:
        return f"the dtype is {product.dtype.name}, and sparse tensor cores take bfloat16 or float16 here"
    found = compute_capability(device)
    if found is None or not any(found in each for each in capabilities):
        wanted = [f"{c[0] / 10} to {c[-1] / 10}" if len(c) > 1 else f"{c[0] / 10}" for c in capabilities]
        return f"the device is {device.device_kind}, and the kernel needs compute capability {' or '.join(wanted)}"
    sizes = product.sizes
    if 0 in sizes:
        return f"the product is empty: tokens, rows, k = {sizes}"
    if (added := padding(sizes, tiles)) > MOST_PADDING:
        return (
            f"tiles of {tuple(tiles)} (tokens, rows, k) fit {sizes} badly: "
            f"padding would multiply the work by {added:.2f}, and sparsity gains less than that"
        )
    return None


def compute_capability(device: Any) -> int | None:
    """Ten times the compute capability of an NVIDIA GPU; `None` for other devices."""
    text = getattr(device, "compute_capability", None)
    if device.platform not in ("gpu", "cuda") or not isinstance(text, str):
        return None
    major, _, minor = text.partition(".")
    return 10 * int(major) + int(minor) if major.isdigit() and minor.isdigit() else None


def check_operands(a: SparseMatrix, x: Float[Array, "tokens k"]) -> None:
    """Raises for operands that no tile can take."""
    if x.ndim != 2 or x.shape[1] != a.k:
        raise ValueError(f"x must be (tokens, {a.k}) for a sparse matrix with {a.k} columns, got {x.shape}")
    if x.dtype != a.values.dtype:
        raise ValueError(f"x is {x.dtype} and the sparse matrix {a.values.dtype}; convert one of them")
    if jnp.dtype(x.dtype) not in PTX_TYPES:
        raise NotImplementedError(f"sparse tensor cores take bfloat16 or float16 here, got {x.dtype}")


def pad_operands(a: SparseMatrix, x: Float[Array, "tokens k"], tiles: Sequence[int]) -> tuple[Array, Array, Array]:
    """(values, metadata, x), padded to whole tiles of (tokens, rows, k); what is whole already is not copied."""
    tokens, rows, columns = padded((x.shape[0], a.rows, a.k), tiles)
    values = _pad(a.values, rows, columns // 2)
    metadata = _pad(a.metadata, rows, columns // 16, jnp.asarray(EMPTY_WORD, a.metadata.dtype))
    return values, metadata, _pad(x, tokens, columns)


def padding(sizes: Sequence[int], tiles: Sequence[int]) -> float:
    """How many times the multiplications of a product those of the padded one are; 0 for an empty one."""
    return math.prod(padded(sizes, tiles)) / max(math.prod(sizes), 1)


def padded(sizes: Sequence[int], tiles: Sequence[int]) -> list[int]:
    """Sizes up to whole tiles."""
    return [-(-size // tile) * tile for size, tile in zip(sizes, tiles, strict=True)]


def _pad(matrix: Array, rows: int, columns: int, value: Any = 0) -> Array:
    return jnp.pad(matrix, ((0, rows - matrix.shape[0]), (0, columns - matrix.shape[1])), constant_values=value)


def check_tile_k(tile_k: int) -> None:
    """Raises for a tile whose rows the swizzled layouts do not fit."""
    if tile_k not in (CHUNK, 2 * CHUNK):
        raise ValueError(f"tile_k must be {CHUNK} or {2 * CHUNK} columns, got {tile_k}")


def swizzle_bytes(columns: int) -> int:
    """Width of the swizzled layout of a tile with this many 16-bit columns: its row, 128 bytes at most."""
    return min(128, 2 * columns)
