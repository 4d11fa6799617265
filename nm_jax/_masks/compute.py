"""The masks of a tree of parameters."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from nm_jax._core.paths import empty
from nm_jax._core.rules import Rules, SparseLeaf, resolve
from nm_jax._core.sharding import by_mesh
from nm_jax._masks.leaves import SolvedLeaf, solve_leaves
from nm_jax._masks.trees import dense_leaves, fill, leaves_by_path
from nm_jax._masks.verify import Report, report_leaf
from nm_jax.solvers import Solver

Scores: TypeAlias = Callable[[Array], Array]


def compute_masks(
    params: PyTree,
    rules: Rules,
    *,
    scores: PyTree | Scores | None = None,
    solver: Solver | None = None,
    partial: str = "skip",
    return_report: bool = False,
) -> PyTree | tuple[PyTree, Report]:
    """The masks that keep the most of the scores of every parameter that the rules make sparse.

    Args:
      params: parameters, in any container.
      rules: a pattern such as `"2:4-T"`, or `(path regex, pattern or None, optional axes)`.
      scores: what a mask keeps the most of. `None`: `abs(w)`. A function: `scores(w)`. Or a tree like `params` (leaves
        that stay dense may be `None`). Used as given, negatives included.
      solver: solver for every leaf; `None` takes the default for each pattern.
      partial: leaves whose sizes m does not divide: `"skip"` (they stay dense), `"pad"` (edge tiles hold at most n) or
        `"error"`.
      return_report: also return the report of `verify`, with retained magnitude, NaN flags and proofs of optimality.

    Returns:
      A tree like `params` of boolean masks, True = kept, and `None` for a leaf that stays dense.

    Raises:
      ValueError: naming the leaf, for rules that do not fit or scores that are NaN. Under `jit`, where values are not
        known, NaN counts as the lowest score and the report says so.

    Works under `jit`. On many leaves it is worth it to call it once for all: leaves with one pattern share one solve.

    Examples:
      >>> import jax
      >>> import nm_jax as nm
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 8)), "bias": jax.numpy.zeros(8)}
      >>> masks = nm.compute_masks(params, "2:4-T")
      >>> masks["kernel"].sum().item(), masks["bias"]
      (32, None)
    """
    leaves = resolve(params, rules, partial)
    values, treedef = jax.tree.flatten(params)
    weights = [value for leaf, value in zip(leaves, values, strict=True) if isinstance(leaf, SparseLeaf)]
    sparse = tuple(leaf for leaf in leaves if isinstance(leaf, SparseLeaf))
    transform = jnp.abs if scores is None else None
    solved = _solve_compiled(sparse, _scores(sparse, weights, scores), solver, transform)
    for leaf, solution in zip(sparse, solved, strict=True):
        if not isinstance(solution.nan, jax.core.Tracer) and bool(solution.nan):
            raise ValueError(f"{leaf.path}: scores are NaN; find out where they come from before computing masks")
    tree = fill(treedef, leaves, [s.mask for s in solved], None)
    if not return_report:
        return tree
    rows = [
        dataclasses.replace(report_leaf(leaf, s.mask, weight), nan=s.nan, proof=s.proof)
        for leaf, s, weight in zip(sparse, solved, weights, strict=True)
    ]
    return tree, Report(rows, dense_leaves(leaves))


def _scores(leaves: Sequence[SparseLeaf], weights: list[Array | np.ndarray], scores) -> list[Array | np.ndarray]:
    if scores is None:
        given = weights  # their magnitudes, taken by the solve
    elif callable(scores):
        given = [scores(w) for w in weights]
    else:
        by_path = leaves_by_path(scores)
        for leaf in leaves:
            if empty(by_path.get(leaf.path)):
                raise ValueError(f"scores has no leaf for {leaf.path}; give a tree with the structure of params")
        given = [by_path[leaf.path] for leaf in leaves]
    for leaf, score in zip(leaves, given, strict=True):
        if jnp.shape(score) != leaf.shape:
            raise ValueError(f"{leaf.path}: scores have shape {jnp.shape(score)}, the parameter has {leaf.shape}")
    return given


def _solve_compiled(
    leaves: Sequence[SparseLeaf], scores: list[Array | np.ndarray], solver, transform
) -> list[SolvedLeaf]:
    solved: dict[int, SolvedLeaf] = {}
    for group in by_mesh(scores):
        found = _solve_leaves_jit(tuple(leaves[k] for k in group), [scores[k] for k in group], solver, transform)
        solved |= dict(zip(group, found, strict=True))
    return [solved[k] for k in range(len(leaves))]


_solve_leaves_jit = jax.jit(solve_leaves, static_argnums=(0, 2, 3))
