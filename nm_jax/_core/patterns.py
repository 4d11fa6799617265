"""Sparsity patterns: what a mask may look like, how to name one, and how many masks it allows.

Throughout this library **n:m means n kept of m**, as NVIDIA and SR-STE write it. The paper (Hubara et al., 2021)
counts zeros instead; at 50 % the two agree. A mask is boolean and `True` means kept.
"""

import abc
import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from nm_jax._core.select import Count, tally_first

_MOST_LISTED = 16  # entries of a tile whose masks can be listed


class Group(NamedTuple):
    """What a pattern says of m consecutive entries along one axis: `n` of them are kept, or at most `n`."""

    n: int
    m: int
    exactly: bool = True

    @property
    def two_of_four(self) -> bool:
        """Whether no four consecutive entries (from a multiple of 4 on) keep more than two: sparse tensor cores read
        no other weights."""
        return 4 % self.m == 0 and self.n * (4 // self.m) <= 2


class Pattern(abc.ABC):
    """What a mask may look like inside one tile of a weight matrix laid out as (contraction, output).

    To add a pattern:

    1. Write one frozen dataclass here with `tile`, `density`, `allows` and `full`; `_parse` and `__str__` if it has a
       spelling (then name it in `_PATTERNS` too), and whatever else below it can answer.
    2. Add a line with an instance to `PATTERNS` of `tests/helpers.py`: the contract suites of patterns and solvers
       then cover it.

    Nothing else asks which pattern it is. Tiles of up to 16 entries have an exact solver at once, `Enumeration`.

    Examples:
      >>> import nm_jax as nm
      >>> pattern = nm.parse_pattern("2:4-T")
      >>> pattern.tile, pattern.contraction_groups, pattern.relaxed
      ((4, 4), Group(n=2, m=4, exactly=True), TransposableNM(n=2, m=4, at_most=True))
    """

    @property
    @abc.abstractmethod
    def tile(self) -> tuple[int, int] | None:
        """Rows (contraction axis) and columns (output axis) that are constrained together; `None`: the whole leaf."""

    @property
    @abc.abstractmethod
    def density(self) -> float:
        """Fraction of the entries that a full mask keeps."""

    @abc.abstractmethod
    def allows(self, kept: Bool[Array, "rows cols *tiles"]) -> Bool[Array, "*tiles"]:
        """Whether hardware that supports the pattern can run each tile: no group holds *more* than n kept entries."""

    @abc.abstractmethod
    def full(self, kept: Bool[Array, "rows cols *tiles"]) -> Bool[Array, "*tiles"]:
        """Whether each tile is a mask of the pattern: `allows`, and nothing that must be kept is missing."""

    @property
    def contraction_groups(self) -> Group | None:
        """What it promises of every group along the contraction axis; `None`: nothing. With a promise the forward
        product, which contracts this axis of W, can run sparse."""
        return None

    @property
    def output_groups(self) -> Group | None:
        """The same along the output axis, for the input gradient, which contracts this axis of W^T."""
        return None

    @property
    def tile_limit(self) -> int | None:
        """n, if a tile is allowed just when it keeps at most n entries, wherever they are; else `None`."""
        return None

    @property
    def relaxed(self) -> "Pattern | None":
        """The pattern that keeps at most as many (itself, if it does already); `None` if there is none."""
        return None

    def masks(self, allowed: bool = False) -> Bool[np.ndarray, "masks rows cols"] | None:
        """Every mask of one tile, or everything that it allows; `None` for tiles of more than 16 entries, or without
        tiles."""
        return _every_mask(self, allowed)

    def _count(self, tiles: int, size: int, exact: bool) -> int:
        """Number of masks of so many tiles, `size` entries in all: exactly, or by Eq. 2 of the paper."""
        del size, exact
        masks = self.masks()
        if masks is None:
            raise ValueError(f"the masks of {self} cannot be counted")
        return len(masks) ** tiles

    @classmethod
    def _parse(cls, text: str) -> "Pattern | None":
        """The pattern that a string names, `None` if it names another."""
        del text
        return None


@functools.cache
def _every_mask(pattern: Pattern, allowed: bool) -> Bool[np.ndarray, "masks rows cols"] | None:
    if pattern.tile is None or math.prod(pattern.tile) > _MOST_LISTED:
        return None
    entry = np.arange(math.prod(pattern.tile)).reshape(pattern.tile)
    every = (np.arange(1 << entry.size) >> entry[..., None]) & 1 == 1
    with jax.ensure_compile_time_eval():
        return np.moveaxis(
            every[..., np.asarray((pattern.allows if allowed else pattern.full)(jnp.asarray(every)))], -1, 0
        )


@dataclasses.dataclass(frozen=True)
class _Grouped(Pattern):
    """n kept of every m consecutive entries along the contraction axis."""

    n: int
    m: int

    def __post_init__(self):
        for name in ("n", "m"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} must be an integer, got {value!r}")
        if not 1 <= self.n < self.m:
            raise ValueError(
                f"n:m keeps n of m and needs 1 <= n < m, got {self.n}:{self.m}; "
                "to keep everything, leave the weight dense (pattern None)"
            )

    @property
    def tile(self) -> tuple[int, int]:
        return (self.m, 1)

    @property
    def density(self) -> float:
        return self.n / self.m

    @property
    def contraction_groups(self) -> Group:
        return Group(self.n, self.m)

    @classmethod
    def _parse(cls, text: str) -> "Pattern | None":
        found = re.fullmatch(r"(\d+):(\d+)" + cls._suffix, text)
        return cls(int(found[1]), int(found[2])) if found else None

    _suffix = ""

    def __str__(self) -> str:
        return f"{self.n}:{self.m}{self._suffix}"


@dataclasses.dataclass(frozen=True)
class NM(_Grouped):
    """`"n:m"`: exactly n of every m consecutive entries along the contraction axis are kept.

    Args:
      n: entries kept in a group, 1 <= n < m.
      m: group size.

    Examples:
      >>> import nm_jax as nm
      >>> str(nm.NM(2, 4)), nm.NM(2, 4).density
      ('2:4', 0.5)
    """

    @property
    def tile_limit(self):
        return self.n

    def allows(self, kept):
        return jnp.all(jnp.sum(kept, axis=0) <= self.n, axis=0)

    def full(self, kept):
        return jnp.all(jnp.sum(kept, axis=0) == self.n, axis=0)

    def _count(self, tiles, size, exact):
        del size, exact  # Eq. 2 is the true count
        return math.comb(self.m, self.n) ** tiles


@dataclasses.dataclass(frozen=True)
class TransposableNM(_Grouped):
    """`"n:m-T"`: every m x m block keeps n entries in each row *and* each column (Eq. 3 of the paper).

    W and W^T then both have the n:m pattern, so the forward and the backward product can both run on sparse
    tensor cores.

    Args:
      n: entries kept in every row and column of a block, 1 <= n < m.
      m: block size.
      at_most: keep *at most* n instead, which is all that hardware asks for. It can retain slightly more.

    Examples:
      >>> import nm_jax as nm
      >>> nm.parse_pattern("2:4-T") == nm.TransposableNM(2, 4)
      True
      >>> str(nm.TransposableNM(2, 4, at_most=True))
      '2:4-T-at-most'
    """

    at_most: bool = False

    _suffix = "-T"

    @property
    def tile(self):
        return (self.m, self.m)

    @property
    def contraction_groups(self):
        return Group(self.n, self.m, exactly=not self.at_most)

    @property
    def output_groups(self):
        return self.contraction_groups

    @property
    def relaxed(self):
        return dataclasses.replace(self, at_most=True)

    def allows(self, kept):
        rows, cols = jnp.sum(kept, axis=1), jnp.sum(kept, axis=0)
        return jnp.all(rows <= self.n, axis=0) & jnp.all(cols <= self.n, axis=0)

    def full(self, kept):
        if self.at_most:
            return self.allows(kept)
        rows, cols = jnp.sum(kept, axis=1), jnp.sum(kept, axis=0)
        return jnp.all(rows == self.n, axis=0) & jnp.all(cols == self.n, axis=0)

    def _count(self, tiles, size, exact):
        del size
        if exact:
            # Zeros and kept entries may change places, which counts faster when few are kept.
            n = self.n if self.at_most else min(self.n, self.m - self.n)
            states = math.comb(n + self.m, n) * ((n + 1) ** 2 if self.at_most else 1)
            if states > _MOST_STATES:
                raise ValueError(
                    f"the masks of {self} are too many to be counted exactly; "
                    "Eq. 2 (exact=False) is an upper bound where n are kept"
                )
            return _count_transposable(n, self.m, self.at_most) ** tiles
        if self.at_most:
            raise ValueError("Eq. 2 has no formula for at most n kept; ask for exact=True")
        zeros = self.m - self.n
        return math.prod(math.factorial(self.m - k) for k in range(zeros)) ** tiles

    @classmethod
    def _parse(cls, text):
        at_most = text.endswith(_AT_MOST)
        pattern = super()._parse(text.removesuffix(_AT_MOST))
        return dataclasses.replace(pattern, at_most=at_most) if pattern else None

    def __str__(self):
        return super().__str__() + (_AT_MOST if self.at_most else "")


_AT_MOST = "-at-most"
_MOST_STATES = 50_000  # of a count that is over in seconds


@dataclasses.dataclass(frozen=True)
class SequentialNM(_Grouped):
    """`"n:m-S"`: the m - n zeros of every group of m along the contraction axis are consecutive.

    Args:
      n: entries kept in a group, 1 <= n < m.
      m: group size.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> nm.solve(jnp.array([[3.0], [1.0], [2.0], [4.0]]), nm.SequentialNM(2, 4))[:, 0].tolist()
      [True, False, False, True]
    """

    _suffix = "-S"

    def _window_free(self, kept):
        """Whether some window of m - n consecutive entries of the group keeps nothing."""
        zeros = self.m - self.n
        windows = [~jnp.any(kept[start : start + zeros], axis=0) for start in range(self.n + 1)]
        return functools.reduce(jnp.logical_or, windows)

    def allows(self, kept):
        return jnp.all(self._window_free(kept), axis=0)

    def full(self, kept):
        return jnp.all(self._window_free(kept) & (jnp.sum(kept, axis=0) == self.n), axis=0)

    def _count(self, tiles, size, exact):
        del size, exact  # Eq. 2 is the true count
        return (self.n + 1) ** tiles


@dataclasses.dataclass(frozen=True)
class Unstructured(Pattern):
    """`"US-s"`: a fraction s of a whole leaf is zero, anywhere.

    Args:
      sparsity: fraction of zeros, 0 < sparsity < 1.

    Examples:
      >>> import nm_jax as nm
      >>> nm.Unstructured(0.9).kept(1000)
      100
    """

    sparsity: float

    def __post_init__(self):
        if not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity is the fraction of zeros and needs 0 < sparsity < 1, got {self.sparsity!r}")

    @property
    def tile(self):
        return None

    @property
    def density(self):
        return 1 - self.sparsity

    def kept(self, size: int) -> int:
        """How many of `size` entries a mask keeps: all but round(sparsity * size), and at least one."""
        return max(size - round(self.sparsity * size), 1)

    def allows(self, kept):
        return self._limit(kept).reaches(self._counts(kept))

    def full(self, kept):
        return self.allows(kept) & self._counts(kept).reaches(self._limit(kept))

    def _limit(self, kept) -> Count:
        return Count.of(self.kept(kept.shape[0] * kept.shape[1]))

    def _counts(self, kept) -> Count:
        return tally_first(jnp.asarray(kept).reshape(kept.shape[0] * kept.shape[1], *kept.shape[2:]))

    def _count(self, tiles, size, exact):
        del tiles, exact  # Eq. 2 is the true count
        return math.comb(size, self.kept(size))

    @classmethod
    def _parse(cls, text):
        found = re.fullmatch(r"US-(0?\.\d+)", text)
        return cls(float(found[1])) if found else None

    def __str__(self):
        return f"US-{np.format_float_positional(self.sparsity)}"


_PATTERNS: tuple[type[Pattern], ...] = (NM, TransposableNM, SequentialNM, Unstructured)


def parse_pattern(pattern: str | Pattern) -> Pattern:
    """The pattern that a string of the paper's tables names.

    Args:
      pattern: `"2:4"`, `"2:4-T"` (transposable), `"4:8-S"` (sequential), `"US-0.5"` (unstructured, 50 % zeros), or
        `"2:4-T-at-most"`. A `Pattern` is returned as it is. n is what is kept.

    Raises:
      ValueError: if the string names no pattern.

    Examples:
      >>> import nm_jax as nm
      >>> nm.parse_pattern("4:8-T")
      TransposableNM(n=4, m=8, at_most=False)
    """
    if isinstance(pattern, Pattern):
        return pattern
    if isinstance(pattern, str):
        for kind in _PATTERNS:
            if (parsed := kind._parse(pattern.strip())) is not None:
                return parsed
    raise ValueError(
        f"{pattern!r} is not a sparsity pattern; write 'n:m' (n kept of m), 'n:m-T' (transposable), "
        "'n:m-S' (sequential) or 'US-0.5' (unstructured, with the fraction of zeros)"
    )


def mask_diversity(pattern: str | Pattern, shape: Sequence[int], exact: bool = False) -> int:
    """Number of different masks of a pattern on a matrix (Section 3, Eq. 2 and Table 1 of the paper).

    Eq. 2 over-counts transposable masks: it gives 1.76e13 for 4:8 on one 8 x 8 block, where there are
    116,963,796,250. Both are offered; for all other patterns they agree.

    Args:
      pattern: a pattern or its string.
      shape: (contraction, output) shape of the matrix; tiles of the pattern must fit it.
      exact: count the masks of a transposable pattern, by dynamic programming over column sums, instead of using the
        formula of the paper. Any n:m up to m = 8 takes less than a second.

    Returns:
      The count, a Python integer of any size.

    Raises:
      ValueError: for a shape that tiles do not fit, or masks that cannot be counted exactly in seconds (8:16-T).

    Examples:
      >>> import nm_jax as nm
      >>> nm.mask_diversity("2:4", (4, 4)), nm.mask_diversity("2:4-T", (4, 4), exact=True)
      (1296, 90)
    """
    pattern = parse_pattern(pattern)
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"shape must be (contraction, output) with positive sizes, got {tuple(shape)}")
    size, (rows, cols) = math.prod(shape), pattern.tile or tuple(shape)
    if shape[0] % rows or shape[1] % cols:
        raise ValueError(f"tiles of {rows} x {cols} ({pattern}) do not fit the shape {tuple(shape)}; give multiples")
    return pattern._count(size // (rows * cols), size, exact)


@functools.cache
def _count_transposable(n: int, m: int, at_most: bool) -> int:
    """0/1 matrices of m x m with row and column sums n (or at most n).

    Rows are placed one after another. Which columns still have room for how many entries is all that matters, and
    columns with the same room are interchangeable: the state is a count of columns per remaining room.
    """
    states: Counter[tuple[int, ...]] = Counter({(0,) * n + (m,): 1})
    for _ in range(m):
        following: Counter[tuple[int, ...]] = Counter()
        for state, ways in states.items():
            for row_sum in range(n + 1) if at_most else (n,):
                for after, choices in _place_row(state, row_sum):
                    following[after] += ways * choices
        states = following
    return sum(states.values()) if at_most else states[(m,) + (0,) * n]


def _place_row(state: tuple[int, ...], row_sum: int):
    """All ways to put `row_sum` entries into columns: (state after, number of ways); state[r] columns have room r."""

    def choose(room: int, left: int, after: tuple[int, ...], ways: int):
        if room == 0:
            if left == 0:
                yield after, ways
            return
        for taken in range(min(state[room], left) + 1):
            moved = list(after)
            moved[room] -= taken
            moved[room - 1] += taken
            yield from choose(room - 1, left - taken, tuple(moved), ways * math.comb(state[room], taken))

    yield from choose(len(state) - 1, row_sum, state, 1)
