"""The largest of very many, and counts beyond 2^31, without sorting and without 64-bit integers."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

_PIECE = 1 << 15  # entries that are counted together
_SHORTEST = 128  # pieces, before padding is better


class Count(NamedTuple):
    """`high * 256 + low`, low < 256: enough for leaves of 2^38 entries."""

    high: Int[Array, "*tiles"]
    low: Int[Array, "*tiles"]

    @classmethod
    def of(cls, number: int) -> "Count":
        """A number that is known."""
        return cls(jnp.int32(number >> 8), jnp.int32(number & 255))

    @classmethod
    def sum(cls, counts: Int[Array, " parts *tiles"]) -> "Count":
        """The sum along the first axis, of up to 2^23 parts."""
        return cls._carry(jnp.sum(counts >> 8, axis=0), jnp.sum(counts & 255, axis=0))

    @classmethod
    def _carry(cls, high: Array, low: Array) -> "Count":
        return cls((high + (low >> 8)).astype(jnp.int32), (low & 255).astype(jnp.int32))

    def reaches(self, other: "Count") -> Bool[Array, "*tiles"]:
        """self >= other."""
        return (self.high > other.high) | ((self.high == other.high) & (self.low >= other.low))

    def minus(self, other: "Count") -> Int[Array, "*tiles"]:
        """A difference that is small."""
        return ((self.high - other.high) << 8) + (self.low - other.low)

    def as_float(self) -> Float[Array, "*tiles"]:
        """Rounded to float32."""
        return self.high.astype(jnp.float32) * 256 + self.low.astype(jnp.float32)


def tally(flags: Bool[Array, "*shape"]) -> Count:
    """How many are true. The longest axis is counted last, and nothing is reshaped that has others, so that sharded
    arrays stay where they are."""
    if flags.ndim < 2:
        return Count.sum(jnp.sum(_pieces(flags.reshape(-1), False), axis=1, dtype=jnp.int32))
    longest = max(range(flags.ndim), key=lambda k: flags.shape[k])
    others = tuple(k for k in range(flags.ndim) if k != longest)
    return Count.sum(jnp.sum(flags, axis=others, dtype=jnp.int32))


def tally_first(flags: Bool[Array, " size *tiles"]) -> Count:
    """How many are true along the first axis, which may be very long."""
    return Count.sum(jnp.sum(_pieces(flags, False), axis=1, dtype=jnp.int32))


def largest(keys: Int[Array, " size *tiles"], count: Count) -> Bool[Array, " size *tiles"]:
    """Where the `count` largest along the first axis are; ties go to the lower index.

    Cost: a pass for each bit of the keys. Temporary memory: none that grows with the size, but a copy of the keys where
    it has no divisor that suits.
    """
    size, bits, lowest = keys.shape[0], 8 * keys.dtype.itemsize, jnp.iinfo(keys.dtype).min
    if not size:
        return jnp.zeros(keys.shape, bool)
    pieces = _pieces(keys, lowest)

    def counts(flags):
        return jnp.sum(flags, axis=1, dtype=jnp.int32)

    def settle(k, threshold):
        """The highest threshold that enough keys reach, bit by bit: the sign comes first, from negative to positive."""
        place = jnp.asarray(bits - 1 - k, keys.dtype)
        higher = threshold ^ (jnp.ones((), keys.dtype) << place)
        enough = Count.sum(counts(pieces >= higher[None, None])).reaches(count)
        return jnp.where(enough, higher, threshold)

    threshold = jax.lax.fori_loop(0, bits, settle, jnp.full(keys.shape[1:], lowest, keys.dtype))
    above, tied = pieces > threshold[None, None], pieces == threshold[None, None]
    more = Count.sum(counts(above))
    wanted = Count._carry(count.high - more.high, count.low - more.low)
    # Ties are taken piece by piece: all of the first ones, and of the next one as many as are still wanted.
    ties = counts(tied)
    upto = Count._carry(jnp.cumsum(ties >> 8, axis=0), jnp.cumsum(ties & 255, axis=0))
    whole = jnp.sum(Count(*(x[None] for x in wanted)).reaches(upto), axis=0, dtype=jnp.int32)
    before = Count(*(jnp.where(whole > 0, _at(x, whole - 1), 0) for x in upto))
    next_piece = _at(tied, whole)
    upto_entry = jnp.cumsum(next_piece, axis=0, dtype=jnp.int32)
    entries = jnp.sum(upto_entry <= wanted.minus(before)[None], axis=0, dtype=jnp.int32)
    piece = jax.lax.broadcasted_iota(jnp.int32, pieces.shape, 0)
    entry = jax.lax.broadcasted_iota(jnp.int32, pieces.shape, 1)
    taken = (piece < whole[None, None]) | ((piece == whole[None, None]) & (entry < entries[None, None]))
    return (above | (tied & taken)).reshape(-1, *keys.shape[1:])[:size]


def _at(parts: Shaped[Array, " parts *rest"], index: Int[Array, "*tiles"]) -> Shaped[Array, "*rest"]:
    """The part that each tile's index points at; the nearest where there is none."""
    expanded = index.reshape(1, *[1] * (parts.ndim - 1 - index.ndim), *index.shape)
    return jnp.take_along_axis(parts, expanded, axis=0, mode="clip")[0]


def _pieces(values: Shaped[Array, " size *tiles"], fill) -> Shaped[Array, "parts piece *tiles"]:
    """The first axis in pieces of one length, filled up where it must be."""
    size = values.shape[0]
    length = next(k for k in range(min(size, _PIECE), 0, -1) if size % k == 0) if size else 1
    if length < min(size, _SHORTEST):
        length = _PIECE
        values = jnp.pad(values, ((0, -size % length), *[(0, 0)] * (values.ndim - 1)), constant_values=fill)
    return values.reshape(math.ceil(size / length), length, *values.shape[1:])
