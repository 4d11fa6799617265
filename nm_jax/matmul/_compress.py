"""2:4 matrices as sparse tensor cores read them: the kept values, and two bits of position for each."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped, UInt16

from nm_jax._core.nonzero import as_bits

GROUP = 4  # consecutive columns of which two are kept
WORD = 16  # columns that one word of metadata covers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseMatrix:
    """The left operand A of a sparse product: a matrix that keeps two of every four consecutive columns.

    Args:
      values: (rows, k / 2), the two kept entries of every group of four columns, in the order of their columns. Columns
        are padded with groups of zeros to a multiple of 16.
      metadata: (rows, k / 16) in uint16, one word for 16 columns: four nibbles, the first group in the lowest. The low
        two bits of a nibble are the position of the first kept entry in its group, the high two bits that of the
        second, which is larger (the order of the PTX ISA).
      k: columns of the matrix, without padding.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> a = nm.pack(jnp.array([[0.0, 5.0, 0.0, 6.0]]), orientation="backward").backward.matrix
      >>> print(a.values[0, :2], f"{int(a.metadata[0, 0]) & 15:04b}", a.k)  # positions 3 and 1
      [5. 6.] 1101 4
    """

    values: Any  # an array, but for what jax puts in its place in trees
    metadata: Any
    k: int = dataclasses.field(metadata={"static": True})

    @property
    def rows(self) -> int:
        return self.values.shape[-2]


@jax.jit
def compress(
    dense: Float[Array, "rows k"], kept: Bool[Array, "rows k"]
) -> tuple[SparseMatrix, Bool[Array, "rows groups"]]:
    """The sparse matrix of the kept entries, and which groups had more than two of them."""
    a, _, overfull = select(dense, kept)
    return a, overfull


def select(dense, kept):
    """The sparse matrix of the kept entries, which are kept of each group, and which groups had more than two."""
    values, flags = entries(dense), entries(kept)
    overfull = jnp.sum(jnp.stack(flags), axis=0) > 2
    flags = _two_largest(values, flags)
    first, second = positions(flags)
    # What a mask prunes must not leak through a group that keeps fewer than two.
    values = [jnp.where(flag, value, jnp.zeros_like(value)) for value, flag in zip(values, flags, strict=True)]
    return SparseMatrix(pick(values, first, second), words(first, second), dense.shape[1]), flags, overfull


def to_dense(a: SparseMatrix) -> Float[Array, "rows k"]:
    """The matrix, zeros included."""
    first, second = decode(a.metadata)
    low, high = a.values[:, 0::2], a.values[:, 1::2]
    entries = [jnp.where(first == i, low, jnp.where(second == i, high, 0)) for i in range(GROUP)]
    return jnp.stack(entries, axis=-1).reshape(a.rows, -1)[:, : a.k]


def entries(matrix: Shaped[Array, "rows k"]) -> list[Shaped[Array, "rows groups"]]:
    """First, second, third and fourth entry of every group, after padding with zeros to whole words."""
    padded = jnp.pad(matrix, ((0, 0), (0, -matrix.shape[1] % WORD)))
    return [padded[:, i::GROUP] for i in range(GROUP)]


def _two_largest(values, flags):
    """`flags` without those that two larger entries beat; nothing changes where there are two at most."""
    sizes = [_size(value) for value in values]

    def beaten(i):
        rivals = [flags[j] & (sizes[j] >= sizes[i] if j < i else sizes[j] > sizes[i]) for j in range(GROUP) if j != i]
        return sum(rival.astype(jnp.int8) for rival in rivals)

    return [flags[i] & (beaten(i) < 2) for i in range(GROUP)]


def _size(value: Float[Array, "*shape"]) -> Array:
    """Integers in the order of magnitudes, NaN the largest; comparisons of floats may take subnormals for zero."""
    bits = as_bits(value)
    size = bits & np.array(np.iinfo(bits.dtype).max >> 1, bits.dtype)
    return jnp.where(jnp.isnan(value), np.array(np.iinfo(bits.dtype).max, bits.dtype), size)


def positions(flags):
    """Two ascending positions for each group that include its kept entries, of which there are two at most."""
    zero, one, two, three = flags
    second = jnp.where(three, 3, jnp.where(two, 2, 1)).astype(jnp.uint8)
    first = jnp.where(zero, 0, jnp.where(one & (two | three), 1, jnp.where(two & three, 2, 0))).astype(jnp.uint8)
    return first, second


def pick(entries, first, second) -> Shaped[Array, "rows kept"]:
    """Of every group, the entries at two positions."""
    zero, one, two, three = entries
    low = jnp.where(first == 0, zero, jnp.where(first == 1, one, two))
    high = jnp.where(second == 1, one, jnp.where(second == 2, two, three))
    return jnp.stack([low, high], axis=-1).reshape(first.shape[0], -1)


def words(first, second) -> UInt16[Array, "rows words"]:
    nibbles = (first | (second << 2)).reshape(first.shape[0], -1, WORD // GROUP)
    shifted = [nibbles[..., j].astype(jnp.uint16) << (4 * j) for j in range(WORD // GROUP)]
    return functools.reduce(jnp.bitwise_or, shifted)


def decode(metadata: UInt16[Array, "rows words"]):
    """First and second position of every group."""
    nibbles = jnp.stack([(metadata >> (4 * j)) & 15 for j in range(WORD // GROUP)], axis=-1)
    nibbles = nibbles.reshape(metadata.shape[0], -1)
    return nibbles & 3, nibbles >> 2
