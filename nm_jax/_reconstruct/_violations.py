"""How far a network is from a pattern, before anything is changed: by Eq. 4 from its sparsity alone, or by counting."""

import dataclasses
import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, PyTree

from nm_jax._core.nonzero import nonzero
from nm_jax._core.patterns import NM, Pattern, TransposableNM
from nm_jax._core.rules import DenseLeaf, Leaf, LeafRules, Rule, Rules, SparseLeaf, resolve
from nm_jax._core.sharding import partitioned
from nm_jax._masks.compute import compute_masks
from nm_jax._masks.trees import fill, leaves_by_path
from nm_jax._reconstruct._counting import count, share


def violation_probability(n: int, m: int, sparsity: float) -> float:
    """Probability that a group of an unstructured sparse matrix breaks n:m, n kept of m: one minus Eq. 4.

    P = sum over i < m - n of binom(m, i) sparsity^i (1 - sparsity)^(m - i)

    Args:
      n: entries that may be kept.
      m: group size.
      sparsity: fraction of zeros, anywhere and independent of each other.

    Raises:
      ValueError: unless 0 <= n <= m and 0 <= sparsity <= 1.

    Source: Section 5, Eq. 4, which counts zeros: its N is m - n.

    Examples:
      >>> import nm_jax as nm
      >>> nm.violation_probability(2, 4, sparsity=0.5)
      0.3125
    """
    if not 0 <= n <= m or m < 1:
        raise ValueError(f"n:m keeps n of m and needs 0 <= n <= m, got {n}:{m}")
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is a fraction of zeros between 0 and 1, got {sparsity!r}")
    return math.fsum(math.comb(m, i) * sparsity**i * (1 - sparsity) ** (m - i) for i in range(m - n))


@dataclasses.dataclass(frozen=True)
class Violations:
    """How far one leaf is from its pattern.

    Attributes:
      leaf: path, shape, pattern and axes.
      sparsity: fraction of its weights that are zero.
      tiles: fraction of its groups (of its blocks, when transposable) that hold more than the pattern allows.
      weights: fraction of its nonzero weights that have to go, at least: the paper's pattern violations.
      expected: what `tiles` would be if the zeros were independent (Eq. 4); `None` for other patterns than n:m.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> (row,) = nm.pattern_violations({"kernel": jnp.eye(8)}, "2:4")
      >>> row.leaf.path, row.sparsity, row.tiles
      ('kernel', 0.875, 0.0)
    """

    leaf: SparseLeaf
    sparsity: float
    tiles: float
    weights: float
    expected: float | None

    def cells(self) -> dict[str, str]:
        """The row as it is printed."""
        shares = {"zeros": self.sparsity, "tiles": self.tiles, "Eq. 4": self.expected, "weights": self.weights}
        head = {"path": self.leaf.path, "pattern": str(self.leaf.pattern)}
        return head | {name: f"{100 * share:.2f}%" for name, share in shares.items() if share is not None}


@dataclasses.dataclass(frozen=True)
class Resolved(LeafRules):
    """What rules were found to say of the leaves of one tree."""

    leaves: tuple[Leaf, ...]

    def as_rules(self) -> tuple[Rule, ...]:
        exact = [(f"^{re.escape(leaf.path)}$", leaf) for leaf in self.leaves]
        return tuple(
            Rule(regex, leaf.pattern, leaf.axes) if isinstance(leaf, SparseLeaf) else Rule(regex, None)
            for regex, leaf in exact
        )

    def resolve(self, tree: PyTree, partial: str) -> list[Leaf]:
        del tree, partial
        return list(self.leaves)


class Survey(NamedTuple):
    """What every leaf of a tree is, and how far from its pattern.

    Attributes:
      rules: the leaves.
      active: the nonzero entries of the sparse leaves, by path.
      tiles: the fraction of the tiles of each that hold more than the pattern allows.
    """

    rules: Resolved
    active: dict[str, Array]
    tiles: dict[str, float]

    @classmethod
    def of(cls, params: PyTree, rules: Rules, partial: str) -> "Survey":
        leaves = resolve(params, rules, partial)
        active, tiles = {}, {}
        for leaf, value in zip(leaves, jax.tree.leaves(params), strict=True):
            if isinstance(leaf, SparseLeaf):
                active[leaf.path] = nonzero(value)
                tiles[leaf.path] = share(_broken(leaf, active[leaf.path]))
        return cls(Resolved(tuple(leaves)), active, tiles)

    @property
    def broken(self) -> Resolved:
        """The same, with the leaves that have their pattern left as they are."""
        keep = [isinstance(leaf, DenseLeaf) or self.tiles[leaf.path] > 0 for leaf in self.rules.leaves]
        return Resolved(
            tuple(
                leaf if kept else DenseLeaf(leaf.path, leaf.shape, "it has its pattern")
                for leaf, kept in zip(self.rules.leaves, keep, strict=True)
            )
        )

    def all_masks(self, params: PyTree, found: PyTree[Array | None]) -> PyTree[Array | None]:
        """The masks that were found, and those that the other leaves have."""
        by_path = leaves_by_path(found)
        paths = [leaf.path for leaf in self.rules.leaves if isinstance(leaf, SparseLeaf)]
        masks = [self.active[path] if by_path[path] is None else by_path[path] for path in paths]
        return fill(jax.tree.structure(params), self.rules.leaves, masks, None)

    def violations(self, params: PyTree) -> list[Violations]:
        """The rows of `pattern_violations`."""
        # The mask that keeps as many nonzero weights as it can.
        masks = leaves_by_path(compute_masks(params, self.broken, scores=_is_nonzero))
        rows = []
        for leaf in self.rules.leaves:
            if isinstance(leaf, SparseLeaf):
                active, mask = self.active[leaf.path], masks[leaf.path]
                nonzeros = count(active)
                sparsity = 1 - nonzeros / active.size
                gone = 0 if mask is None else count(active & ~mask)
                expected = _expected(leaf.pattern, sparsity)
                rows.append(Violations(leaf, sparsity, self.tiles[leaf.path], gone / max(nonzeros, 1), expected))
        return rows


@functools.partial(jax.jit, static_argnums=0)
def _broken(leaf: SparseLeaf, active: Bool[Array, "..."]) -> Bool[Array, "..."]:
    """The tiles that hold more than the pattern allows."""
    return partitioned(lambda active: ~leaf.pattern.allows(leaf.tiling.split(active)), PartitionSpec(), active)


def _is_nonzero(w: Array) -> Array:
    return nonzero(w).astype(jnp.float32)


def _expected(pattern: Pattern, sparsity: float) -> float | None:
    """Eq. 4, for patterns whose tiles ask for nothing but few enough entries."""
    if pattern.tile is None or pattern.tile_limit is None:
        return None
    return violation_probability(pattern.tile_limit, math.prod(pattern.tile), sparsity)


def pattern_violations(params: PyTree, rules: Rules, *, partial: str = "skip") -> list[Violations]:
    """How many groups, and how many weights, of a sparse model break the pattern that it should get.

    Args:
      params: parameters; zeros are what is pruned already.
      rules: as in `nm_jax.compute_masks`.
      partial: as in `nm_jax.compute_masks`.

    Returns:
      One row per parameter that the rules make sparse.

    Raises:
      ValueError: for rules that do not fit.

    Costs one solve of the leaves that break their pattern. Not for use inside `jit`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> params = {"kernel": jnp.zeros((8, 4)).at[:4, 0].set(1.0)}
      >>> (row,) = nm.pattern_violations(params, "2:4")
      >>> row.tiles, row.weights
      (0.125, 0.5)
    """
    return Survey.of(params, rules, partial).violations(params)


def choose_patterns(
    params: PyTree, rules: Rules, percent: float | int, *, m: int = 8, transposable: bool = False
) -> list[tuple[str, Pattern | None, str | None]]:
    """For every layer of an unstructured sparse model the sparsest n:m whose violation is improbable enough.

    n = min {n : 100 * violation_probability(n, m, sparsity of the layer) <= percent}

    Args:
      params: parameters; zeros are what is pruned already.
      rules: which layers, and their axes; their own patterns only say which sizes fit (`"4:8"` for m = 8).
      percent: the probability that a group breaks the pattern, in percent; 0 leaves all but empty layers dense.
      m: group size; 8 in the paper.
      transposable: choose n:m-T instead, with the same n, which bounds the probability of one group along either axis.

    Returns:
      Rules, in the form that `nm_jax.compute_masks` takes. A layer for which even n = m - 1 is too small stays dense.

    Raises:
      ValueError: for rules that do not fit, or a percentage out of range.

    Source: Section 5, Fig. 5b.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> params = {"kernel": jnp.tile(jnp.eye(8), (2, 2))}  # 7 of 8 are zero
      >>> [(regex, str(pattern), axes) for regex, pattern, axes in nm.choose_patterns(params, "4:8", percent=10)]
      [('^kernel$', '2:8', 'io')]
    """
    if not 0 <= percent <= 100:
        raise ValueError(f"percent must be between 0 and 100, got {percent!r}")
    kind = TransposableNM if transposable else NM
    chosen: list[tuple[str, Pattern | None, str | None]] = []
    for leaf, value in zip(resolve(params, rules), jax.tree.leaves(params), strict=True):
        if isinstance(leaf, SparseLeaf):
            sparsity = 1 - share(nonzero(value))
            fits = (n for n in range(1, m) if 100 * violation_probability(n, m, sparsity) <= percent)
            n = next(fits, m)
            pattern = kind(n, m) if n < m else None
            chosen.append((f"^{re.escape(leaf.path)}$", pattern, leaf.axes if pattern else None))
    return chosen
