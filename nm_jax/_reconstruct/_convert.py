"""From the sparsity that a network has to the one that hardware runs (Section 5 and A.1 of the paper).

A network may be dense, unstructured, or N:M with other numbers. How far it is from a pattern can be told before
anything is changed: by Eq. 4 from its sparsity alone, or by counting (`pattern_violations`). `convert` then does the
whole: masks, AdaPrune, check.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, PyTree

from nm_jax._core.nonzero import nonzero
from nm_jax._core.patterns import NM, Pattern, TransposableNM
from nm_jax._core.rules import Rules, SparseLeaf, path_of, resolve
from nm_jax._core.sharding import partitioned
from nm_jax._core.tables import aligned
from nm_jax._masks.compute import Scores, compute_masks
from nm_jax._masks.trees import fill, leaves_by_path
from nm_jax._masks.verify import Report, verify
from nm_jax._reconstruct._adaprune import PruneReport, adaprune
from nm_jax.solvers import Solver


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


def pattern_violations(params: PyTree[Array], rules: Rules, *, partial: str = "skip") -> list[Violations]:
    """How many groups, and how many weights, of a sparse model break the pattern that it should get.

    Args:
      params: parameters; zeros are what is pruned already.
      rules: as in `nm_jax.compute_masks`.
      partial: as in `nm_jax.compute_masks`.

    Returns:
      One row per parameter that the rules make sparse.

    Raises:
      ValueError: for rules that do not fit.
    """
    leaves = resolve(params, rules, partial)
    # The mask that keeps as many nonzero weights as it can.
    masks = leaves_by_path(compute_masks(params, rules, scores=_is_nonzero, partial=partial))
    rows = []
    for leaf, value in zip(leaves, jax.tree.leaves(params), strict=True):
        if isinstance(leaf, SparseLeaf):
            active = nonzero(value)
            count = int(jnp.sum(active))
            sparsity = 1 - count / active.size
            rows.append(
                Violations(
                    leaf,
                    sparsity,
                    tiles=float(_broken(leaf, active)),
                    weights=int(jnp.sum(active & ~masks[leaf.path])) / max(count, 1),
                    expected=_expected(leaf.pattern, sparsity),
                )
            )
    return rows


def _expected(pattern: Pattern, sparsity: float) -> float | None:
    """Eq. 4, for patterns whose tiles ask for nothing but few enough entries."""
    if pattern.tile is None or pattern.tile_limit is None:
        return None
    return violation_probability(pattern.tile_limit, math.prod(pattern.tile), sparsity)


@functools.partial(jax.jit, static_argnums=0)
def _broken(leaf: SparseLeaf, active: Bool[Array, "..."]) -> Float[Array, ""]:
    """The fraction of the tiles that hold more than the pattern allows."""

    def broken(active):
        return jnp.mean(~leaf.pattern.allows(leaf.tiling.split(active)))

    return partitioned(broken, PartitionSpec(), active)


def _is_nonzero(w: Array) -> Array:
    return nonzero(w).astype(jnp.float32)


def choose_patterns(
    params: PyTree[Array], rules: Rules, percent: float, *, m: int = 8, transposable: bool = False
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
    """
    if not 0 <= percent <= 100:
        raise ValueError(f"percent must be between 0 and 100, got {percent!r}")
    kind = TransposableNM if transposable else NM
    chosen: list[tuple[str, Pattern | None, str | None]] = []
    for leaf, value in zip(resolve(params, rules), jax.tree.leaves(params), strict=True):
        if isinstance(leaf, SparseLeaf):
            sparsity = 1 - float(np.count_nonzero(nonzero(np.asarray(value)))) / value.size
            fits = (n for n in range(1, m) if 100 * violation_probability(n, m, sparsity) <= percent)
            n = next(fits, m)
            pattern = kind(n, m) if n < m else None
            chosen.append((f"^{re.escape(leaf.path)}$", pattern, leaf.axes if pattern else None))
    return chosen


def fit_masks(
    params: PyTree[Array],
    rules: Rules,
    *,
    scores: PyTree | Scores | None = None,
    solver: Solver | None = None,
    partial: str = "skip",
) -> PyTree[Bool[Array, "..."] | None]:
    """Masks of a pattern for a model that is sparse already: a leaf that has the pattern keeps the mask it has.

    Args:
      params: parameters; zeros are what is pruned already.
      rules, scores, solver, partial: as in `nm_jax.compute_masks`, which finds the other masks. A weight that is zero
        may be kept there, and AdaPrune may use it.

    Returns:
      A tree like `params` of masks, `None` for a leaf that stays dense.

    Raises:
      ValueError: as `nm_jax.compute_masks`.
    """
    leaves = resolve(params, rules, partial)
    found = leaves_by_path(compute_masks(params, rules, scores=scores, solver=solver, partial=partial))
    values, treedef = jax.tree.flatten(params)
    masks = []
    for leaf, value in zip(leaves, values, strict=True):
        if isinstance(leaf, SparseLeaf):
            active = nonzero(value)
            masks.append(found[leaf.path] if _broken(leaf, active) > 0 else active)
    return fill(treedef, leaves, masks, None)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What `convert` did; its string says it layer by layer.

    Attributes:
      masks: of the new parameters.
      violations: how far each leaf was from its pattern.
      layers: how well each layer's output is kept; layers that had their pattern are not among them.
      check: of the new parameters, by `nm_jax.verify`.
    """

    masks: PyTree[Bool[Array, "..."] | None]
    violations: tuple[Violations, ...]
    layers: PruneReport
    check: Report

    def __str__(self) -> str:
        header = "groups (tiles) that broke the pattern, as counted and by Eq. 4, and nonzero weights that had to go"
        return "\n".join([header, *aligned([row.cells() for row in self.violations]), "", str(self.layers)])


def convert(
    apply: Callable,
    params: PyTree[Array],
    rules: Rules,
    batches: Iterable[Any],
    *,
    scores: PyTree | Scores | None = None,
    solver: Solver | None = None,
    partial: str = "skip",
    **options: Any,
) -> tuple[PyTree[Array], Conversion]:
    """A model with the pattern that the hardware supports, from whatever sparsity it has, without training.

    Dense -> N:M, unstructured -> N:M (`choose_patterns` gives the rules), 4:8 -> 2:4 -> 1:2, transposable or not: the
    same three steps, `fit_masks`, `adaprune` and `verify`. Layers that have the pattern already stay as they are.

    Args:
      apply: the model's forward pass, `apply(params, *inputs)`, in evaluation mode.
      params: parameters; zeros are what is pruned already.
      rules: a pattern, rules, or a plan (`nm_jax.plan`), which leaves the first and the last layer dense.
      batches: calibration inputs.
      scores, solver, partial: as in `nm_jax.compute_masks`.
      **options: as in `nm_jax.adaprune`.

    Returns:
      The new parameters, and what happened to each layer. A network with batch norm gains by having it tuned
      afterwards (`nm_jax.tune_batch_norm`).

    Raises:
      ValueError: as `nm_jax.compute_masks` and `nm_jax.adaprune`.
    """
    violations = tuple(pattern_violations(params, rules, partial=partial))
    masks = fit_masks(params, rules, scores=scores, solver=solver, partial=partial)
    changed = {row.leaf.path for row in violations if row.tiles > 0}
    layers = PruneReport(())
    if changed:
        new_masks = jax.tree_util.tree_map_with_path(lambda keys, m: m if path_of(keys) in changed else None, masks)
        params, layers = adaprune(apply, params, new_masks, batches, **options)
    return params, Conversion(masks, violations, layers, verify(params, rules, partial=partial))
