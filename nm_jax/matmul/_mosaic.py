"""What the two GPU kernels share: jax's unstable interfaces, imported in one place.

Pallas Mosaic GPU may change with every release of jax. Where a release lacks something that the kernels need, this
module still imports, and `UNAVAILABLE` says what was missing.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from nm_jax.matmul._tiles import swizzle_bytes

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


def unavailable() -> str | None:
    """What this release of jax lacks of what the kernels need, or `None`."""
    return UNAVAILABLE


__all__ = ["arith", "fragmented_array", "ir", "llvm", "memref", "nvvm", "pl", "plgpu", "utils"]


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
