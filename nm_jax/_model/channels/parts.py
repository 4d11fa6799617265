"""What dimensions are made of: channels, products of what a reshape merged, and what a concatenation put in a row.

Two dimensions whose entries meet are the same dimension, index by index: `unify`. What one was made of, the other is
made of then, too: a bias that meets heads that were merged has heads. What has to stay where it is, is *fixed*, with a
reason.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(eq=False)
class Part:
    """A dimension of a value, or a part of one.

    Attributes:
      size: how many indices it has.
      reason: why its indices stay where they are, or `""`; of a whole.
      factors: what it is the product of, the last runs fastest.
      pieces: what it is the concatenation of.
      same: what it has turned out to be.

    Without factors and pieces it is a *whole*.
    """

    size: int
    reason: str = ""
    factors: tuple["Part", ...] = ()
    pieces: tuple["Part", ...] = ()
    same: "Part | None" = None

    @property
    def found(self) -> "Part":
        """What it is known to be."""
        part = self
        while part.same is not None:
            part = part.same
        return part

    @property
    def is_whole(self) -> bool:
        return not self.factors and not self.pieces


def factors(part: Part) -> list[Part]:
    """What a part is a product of; none of them a product itself, nor of size 1."""
    part = part.found
    if part.factors:
        return [factor for one in part.factors for factor in factors(one)]
    return [] if part.size == 1 else [part]


def _pieces(part: Part) -> list[Part]:
    part = part.found
    return [piece for one in part.pieces for piece in _pieces(one)] if part.pieces else [part]


def product(parts: Iterable[Part]) -> Part:
    """The dimension that several are merged to."""
    several = [factor for part in parts for factor in factors(part)]
    if len(several) == 1:
        return several[0]
    return Part(math.prod(part.size for part in several), factors=tuple(several))


def joined(parts: Iterable[Part]) -> Part:
    """The dimension that several are concatenated to."""
    several = [piece for part in parts if part.size for piece in _pieces(part)]
    if len(several) == 1:
        return several[0]
    return Part(sum(part.size for part in several), pieces=tuple(several))


def fix(part: Part, reason: str) -> None:
    """Says that the indices of a part stay where they are."""
    for whole in wholes(part):
        whole.reason = whole.reason or reason


def wholes(part: Part) -> list[Part]:
    """The wholes that a part is made of."""
    part = part.found
    return [part] if part.is_whole else [w for one in (*part.factors, *part.pieces) for w in wholes(one)]


def unify(one: Part, other: Part, reason: str) -> None:
    """Says that two parts of one size are the same; where that cannot be, both are fixed for this reason."""
    one, other = one.found, other.found
    if one is other:
        return
    if not one.is_whole:
        one, other = other, one
    if one.is_whole:
        if one.reason:
            fix(other, one.reason)
        one.same = other
    elif one.pieces and other.pieces:
        _align_pieces(one, other, reason)
    elif one.factors and other.factors:
        _align_factors(one, other, reason)
    else:
        _align_both(*((one, other) if one.factors else (other, one)), reason)


def _align_pieces(one: Part, other: Part, reason: str) -> None:
    ours, theirs = _pieces(one)[::-1], _pieces(other)[::-1]
    while ours and theirs:
        a, b = ours.pop(), theirs.pop()
        size = min(a.size, b.size)
        first, second = cut(a, size), cut(b, size)
        if first is None or second is None:
            fix(one, reason)
            fix(other, reason)
            return
        unify(first[0], second[0], reason)
        ours += [first[1]] if first[1].size else []
        theirs += [second[1]] if second[1].size else []


def _align_factors(one: Part, other: Part, reason: str) -> None:
    ours, theirs = factors(one), factors(other)
    while ours and theirs:
        a, b = ours.pop(), theirs.pop()
        size = min(a.found.size, b.found.size)
        first, second = _split(a, size), _split(b, size)
        if first is None or second is None:
            fix(one, reason)
            fix(other, reason)
            return
        ours += factors(first[0])
        theirs += factors(second[0])
        unify(first[1], second[1], reason)


def _align_both(merged: Part, concatenated: Part, reason: str) -> None:
    """A product that is a concatenation as well: every piece is made of the inner factors; the outer one is fixed."""
    outer, *inner = factors(merged)
    size = math.prod(part.size for part in inner)
    for piece in _pieces(concatenated):
        if piece.size % size:
            fix(merged, reason)
            fix(concatenated, reason)
            return
    fix(outer, reason)
    for piece in _pieces(concatenated):
        unify(piece, product([Part(piece.size // size, reason), *inner]), reason)


def _split(part: Part, inner: int) -> tuple[Part, Part] | None:
    """A part as a product whose inner factor has this size; `None` if it is none."""
    part = part.found
    if part.size == inner:
        return Part(1), part
    if part.size % inner or not part.is_whole:
        return None
    part.factors = (Part(part.size // inner, part.reason), Part(inner, part.reason))
    return part.factors[0], part.factors[1]


def cut(part: Part, at: int) -> tuple[Part, Part] | None:
    """A part as the concatenation of two; `None` if it is none. One of size 0 may be left."""
    part = part.found
    if at in (0, part.size):
        return (Part(0), part) if at == 0 else (part, Part(0))
    if part.pieces:
        before: list[Part] = []
        for k, piece in enumerate(several := _pieces(part)):
            if at <= piece.size:
                two = cut(piece, at)
                return two and (joined([*before, two[0]]), joined([two[1], *several[k + 1 :]]))
            before.append(piece)
            at -= piece.size
    if part.factors:
        outer, *inner = factors(part)
        size = math.prod(one.size for one in inner)
        two = None if at % size else cut(outer, at // size)
        return two and (product([two[0], *inner]), product([two[1], *inner]))
    part.pieces = (Part(at, part.reason), Part(part.size - at, part.reason))
    return part.pieces[0], part.pieces[1]


def reshaped(dims: Sequence[Part], shape: Sequence[int]) -> list[Part] | None:
    """The dimensions after a reshape; `None` where they cannot be told."""
    if 0 in shape:
        return None
    left = [factor for dim in dims for factor in factors(dim)]
    out: list[Part] = []
    for size in reversed(shape):
        taken: list[Part] = []
        missing = size
        while missing > 1:
            last = left.pop().found
            if missing % last.size == 0:
                taken.append(last)
                missing //= last.size
            elif (two := _split(last, missing)) is not None:
                taken.append(two[1])
                left.append(two[0])
                missing = 1
            else:
                return None
        out.append(product(reversed(taken)))
    return out[::-1]


# ------------------------------------------------------------------------------------------------- permuting a part


def order(part: Part, orders: Mapping[Part, Int[np.ndarray, " size"]]) -> Int[np.ndarray, " indices"]:
    """What stands where in a dimension when some of its wholes are permuted."""
    part = part.found
    if part.pieces:
        ends = np.cumsum([0, *(piece.size for piece in part.pieces)])
        return np.concatenate([end + order(one, orders) for end, one in zip(ends[:-1], part.pieces, strict=True)])
    if part.factors:
        index = np.zeros(1, np.int64)
        for one in part.factors:
            index = (index[:, None] * one.size + order(one, orders)).reshape(-1)
        return index
    return orders.get(part, np.arange(part.size))


def places(part: Part, whole: Part) -> Int[np.ndarray, "size others"] | None:
    """Where the indices of a whole are in a dimension: one row for each, one column for each choice of the others.
    `None` for a product of the whole with itself."""
    part = part.found
    if part is whole:
        return np.arange(part.size)[:, None]
    if whole not in wholes(part):
        return np.zeros((whole.size, 0), np.int64)
    if part.pieces:
        ends = np.cumsum([0, *(piece.size for piece in part.pieces)])
        found = [places(one, whole) for one in part.pieces]
        shifted = [end + own for end, own in zip(ends[:-1], found, strict=True) if own is not None]
        return np.concatenate(shifted, axis=1) if len(shifted) == len(found) else None
    if sum(whole in wholes(one) for one in part.factors) > 1:
        return None
    index = np.zeros((1, 1), np.int64)  # (whole or 1, others)
    for one in part.factors:
        own = places(one, whole) if whole in wholes(one) else np.arange(one.size)[None]
        if own is None:
            return None
        index = (index[:, :, None] * one.size + own[:, None, :]).reshape(max(len(index), len(own)), -1)
    return index
