"""What the two GPU kernels share: jax's unstable interfaces, imported in one place, and the fit of operands to tiles.

Pallas Mosaic GPU may change with every release of jax. Where a release lacks something that the kernels need, this
module still imports, and `UNAVAILABLE` says what was missing.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from nm_jax.matmul._fragments import CHUNK, EMPTY_WORD
from nm_jax.matmul._packing import SparseMatrix

UNAVAILABLE: str | None = None
try:
    from jax.experimental import pallas as pl
    from jax.experimental.mosaic.gpu import fragmented_array, utils
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, memref, nvvm
except (ImportError, AttributeError) as error:  # a jax without Mosaic GPU, or with another one
    UNAVAILABLE = f"jax {jax.__version__} lacks a part of Pallas Mosaic GPU that the kernel needs ({error})"
    arith = fragmented_array = ir = llvm = memref = nvvm = pl = plgpu = utils = None  # type: ignore[assignment]
try:
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
except ImportError:
    InterpretGPUParams = None  # type: ignore[assignment, misc]

__all__ = ["arith", "fragmented_array", "ir", "llvm", "memref", "nvvm", "pl", "plgpu", "utils"]

PTX_TYPES = {jnp.dtype(jnp.bfloat16): "bf16", jnp.dtype(jnp.float16): "f16"}
MOST_PADDING = 1.25
"""Padding pays while the padded product has at most this many times the multiplications of the product itself."""


def unsupported(dtype: Any, sizes: Sequence[int], tiles: Sequence[int], device: Any, capability: range) -> str | None:
    """Why a kernel cannot, or should not, run a product, or `None`.

    Args:
      dtype: of values and activations.
      sizes: (tokens, rows, k).
      tiles: sizes of a tile along them.
      device: a `jax.Device`.
      capability: compute capabilities that the kernel runs on, times ten.
    """
    if UNAVAILABLE is not None:
        return UNAVAILABLE
    if jnp.dtype(dtype) not in PTX_TYPES:
        return f"the dtype is {jnp.dtype(dtype).name}, and sparse tensor cores take bfloat16 or float16 here"
    found = compute_capability(device)
    if found is None or found not in capability:
        wanted = f"{capability.start / 10} to {capability[-1] / 10}" if len(capability) > 1 else capability.start / 10
        return f"the device is {device.device_kind}, and the kernel needs compute capability {wanted}"
    if 0 in sizes:
        return f"the product is empty: tokens, rows, k = {tuple(sizes)}"
    padding = math.prod(_padded(sizes, tiles)) / math.prod(sizes)
    if padding > MOST_PADDING:
        return (
            f"tiles of {tuple(tiles)} (tokens, rows, k) fit {tuple(sizes)} badly: "
            f"padding would multiply the work by {padding:.2f}, and sparsity gains less than that"
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
    if UNAVAILABLE is not None:
        raise NotImplementedError(UNAVAILABLE)
    if x.ndim != 2 or x.shape[1] != a.k:
        raise ValueError(f"x must be (tokens, {a.k}) for a sparse matrix with {a.k} columns, got {x.shape}")
    if x.dtype != a.values.dtype:
        raise ValueError(f"x is {x.dtype} and the sparse matrix {a.values.dtype}; convert one of them")
    if jnp.dtype(x.dtype) not in PTX_TYPES:
        raise NotImplementedError(f"sparse tensor cores take bfloat16 or float16 here, got {x.dtype}")


def pad_operands(a: SparseMatrix, x: Float[Array, "tokens k"], tiles: Sequence[int]) -> tuple[Array, Array, Array]:
    """(values, metadata, x), padded to whole tiles of (tokens, rows, k); what is whole already is not copied."""
    tokens, rows, columns = _padded((x.shape[0], a.rows, a.k), tiles)
    values = _pad(a.values, rows, columns // 2)
    metadata = _pad(a.metadata, rows, columns // 16, jnp.asarray(EMPTY_WORD, a.metadata.dtype))
    return values, metadata, _pad(x, tokens, columns)


def _padded(sizes: Sequence[int], tiles: Sequence[int]) -> list[int]:
    return [-(-size // tile) * tile for size, tile in zip(sizes, tiles, strict=True)]


def _pad(matrix: Array, rows: int, columns: int, value: Any = 0) -> Array:
    return jnp.pad(matrix, ((0, rows - matrix.shape[0]), (0, columns - matrix.shape[1])), constant_values=value)


def check_tile_k(tile_k: int) -> None:
    """Raises for a tile whose rows the swizzled layouts below do not fit."""
    if tile_k not in (CHUNK, 2 * CHUNK):
        raise ValueError(f"tile_k must be {CHUNK} or {2 * CHUNK} columns, got {tile_k}")


def swizzle_bytes(columns: int) -> int:
    """Width of the swizzled layout of a tile with this many 16-bit columns: its row, 128 bytes at most."""
    return min(128, 2 * columns)


def swizzled(columns: int) -> tuple[Any, Any]:
    """Layout in shared memory of a tile with rows of `columns` 16-bit entries.

    It cuts the tile into pieces of 8 rows, which tensor cores and `ldmatrix` read without bank conflicts.
    """
    width = swizzle_bytes(columns)
    return plgpu.TilingTransform((8, width // 2)), plgpu.SwizzleTransform(width)


def tile_index(linear: Array, row_tiles: int, token_tiles: int, raster: int) -> tuple[Array, Array]:
    """(row tile, token tile) of the `linear`-th block.

    It goes through `raster` rows of tiles at a time, so that blocks that run at the same time share operands in the
    cache.
    """
    raster = min(raster, row_tiles)
    band, inside = lax.div(linear, raster * token_tiles), lax.rem(linear, raster * token_tiles)
    rows = jnp.minimum(raster, row_tiles - band * raster) if row_tiles % raster else raster  # the last band is narrower
    return band * raster + lax.rem(inside, rows), lax.div(inside, rows)


def interpreter() -> Any:
    """What `plgpu.kernel(interpret=)` takes to run on a CPU, with outputs that start as NaN."""
    if InterpretGPUParams is None:
        raise NotImplementedError(f"jax {jax.__version__} has no interpreter for Mosaic GPU")
    return InterpretGPUParams()


def constant(value: int, bits: int = 32) -> Any:
    """An integer constant of the MLIR program being built."""
    kind = ir.IntegerType.get_signless(bits)
    return arith.constant(kind, value)  # type: ignore[arg-type]


def thread_index() -> Any:
    """Index of the thread in its block, as a 32-bit integer."""
    index = utils.thread_idx()
    i32 = ir.IntegerType.get_signless(32)
    return arith.index_cast(i32, index) if isinstance(index.type, ir.IndexType) else index


def assemble(results: Sequence[Any], operands: Sequence[Any], ptx: str, constraints: str, pure: bool = False) -> list:
    """Inline PTX with any number of results, as LLVM numbers its operands: results first."""
    if not results:
        kind = ir.Type.parse("!llvm.void")
    elif len(results) == 1:
        kind = results[0]
    else:
        kind = llvm.StructType.get_literal(list(results))
    made = llvm.inline_asm(kind, list(operands), ptx, constraints, asm_dialect=0, has_side_effects=not pure)
    if len(results) <= 1:
        return [made] * len(results)
    return [llvm.extractvalue(result, made, [k]) for k, result in enumerate(results)]  # type: ignore[arg-type]
