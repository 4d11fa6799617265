"""The metadata of a 2:4 matrix in the order in which the lanes of a warp hand it to a sparse tensor core.

`mma.sp.m16n8k32` takes 16 rows of A, and `wgmma.sp.m64nNk32` takes four times that, 16 rows from each warp. With
g = lane // 4 and t = lane % 4, the lane gives one 32-bit word: row g in its low half, row g + 8 in its high half, each
16 columns in the order of `SparseMatrix.metadata`. An instruction covers 32 columns and reads the words of two of the
four t, chosen by its selector: t = 0, 1 (the first 16 columns, the second) or t = 2, 3. One word in each lane therefore
covers 64 columns, two instructions, and nothing is wasted (PTX ISA, "Matrix fragments for sparse mma.m16n8k32" and
"Sparse wgmma").
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped, UInt16

CHUNK = 64  # columns that one word in each lane covers
EMPTY_WORD = 0x4444  # metadata of 16 columns of padding: positions 0 and 1 of each group, ascending as they must be

_WARP_ROWS = 16  # rows whose metadata one warp holds
_LANES = (8, 4)  # (g, t)


def lane_words(metadata: UInt16[Array, "rows words"], warps: int) -> Int32[Array, "tiles chunks lanes"]:
    """The words that `warps` warps, 16 rows each, hand over for every 64 columns.

    Runs in XLA; reads and writes one bit for each entry of the dense matrix.

    Args:
      metadata: of a `SparseMatrix` whose rows are a multiple of `16 * warps`, and whose columns are of 64.
      warps: warps that share a tile: lane l of warp w reads word `32 * w + l` of its tile and chunk.
    """
    rows, words = metadata.shape
    tiles, chunks = rows // (_WARP_ROWS * warps), words // 4
    halves = metadata.astype(jnp.uint32).reshape(tiles, warps, 2, _LANES[0], chunks, _LANES[1])
    joined = halves[:, :, 0] | (halves[:, :, 1] << 16)  # tiles, warps, g, chunks, t
    ordered = jnp.transpose(joined, (0, 3, 1, 2, 4)).reshape(tiles, chunks, warps * 32)
    return jax.lax.bitcast_convert_type(ordered, jnp.int32)


def expand(values: Shaped[Array, "rows kept"], words: Int32[Array, "chunks lanes"]) -> Float[Array, "rows k"]:
    """The dense float32 tile that a sparse tensor core sees in values and lane words: for runs without one."""
    rows, kept = values.shape
    chunks, warps = words.shape[0], words.shape[1] // 32
    word = jax.lax.bitcast_convert_type(words, jnp.uint32).reshape(chunks, warps, *_LANES)
    halves = jnp.stack([word & 0xFFFF, word >> 16], axis=2)  # chunks, warps, half, g, t
    halves = jnp.transpose(halves, (1, 2, 3, 0, 4)).reshape(rows, kept // 8, 1)
    nibbles = (halves >> jnp.arange(0, 16, 4, dtype=jnp.uint32).reshape(1, 1, 4)) & 15
    nibbles = nibbles.reshape(rows, kept // 2, 1)
    column = jnp.arange(4, dtype=jnp.uint32).reshape(1, 1, 4)
    pairs = values.astype(jnp.float32).reshape(rows, kept // 2, 2, 1)
    first = jnp.where(nibbles & 3 == column, pairs[:, :, 0], 0)
    second = jnp.where(nibbles >> 2 == column, pairs[:, :, 1], 0)
    return (first + second).reshape(rows, 2 * kept)


def add_product(
    sums: Float[Array, "rows tokens"],
    values: Shaped[Array, "rows kept"],
    words: Int32[Array, "chunks lanes"],
    x: Float[Array, "tokens k"],
) -> Float[Array, "rows tokens"]:
    """Sums plus A X^T, as the instructions of a stage give them: for runs without a sparse tensor core."""
    return sums + jnp.matmul(expand(values, words), x.astype(jnp.float32).T, precision="highest")
