"""Masks over pytrees: compute them, apply them, and check that a network really has the pattern it should have."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from nm_jax.axes import matrix_groups
from nm_jax.leaves import solve_leaves
from nm_jax.rules import DenseLeaf, Leaf, Rules, SparseLeaf, empty, path_of, resolve
from nm_jax.sharding import partitioned
from nm_jax.solvers import Solver
from nm_jax.tables import aligned

Scores: TypeAlias = Callable[[Array], Array]


def compute_masks(
    params: PyTree[Float[Array, "..."]],
    rules: Rules,
    *,
    scores: PyTree | Scores | None = None,
    solver: Solver | None = None,
    partial: str = "skip",
    return_report: bool = False,
) -> PyTree[Bool[Array, "..."] | None] | tuple[PyTree, "Report"]:
    """The masks that keep the most of the scores of every parameter that the rules make sparse.

    Args:
      params: parameters, in any container.
      rules: a pattern such as `"2:4-T"`, or `(path regex, pattern or None, optional axes)` (see `nm_jax.rules`).
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
    """
    leaves = resolve(params, rules, partial)
    values, treedef = jax.tree.flatten(params)
    weights = [value for leaf, value in zip(leaves, values, strict=True) if isinstance(leaf, SparseLeaf)]
    sparse = tuple(leaf for leaf in leaves if isinstance(leaf, SparseLeaf))
    transform = jnp.abs if scores is None else None
    solved = _solve_leaves_jit(sparse, _scores(sparse, weights, scores), solver, transform)
    for leaf, solution in zip(sparse, solved, strict=True):
        if not isinstance(solution.nan, jax.core.Tracer) and bool(solution.nan):
            raise ValueError(f"{leaf.path}: scores are NaN; find out where they come from before computing masks")
    tree = fill(treedef, leaves, [s.mask for s in solved], None)
    if not return_report:
        return tree
    rows = [
        dataclasses.replace(_report_leaf(leaf, s.mask, weight), nan=s.nan, gap=s.gap)
        for leaf, s, weight in zip(sparse, solved, weights, strict=True)
    ]
    return tree, Report(rows, _dense(leaves))


def _scores(leaves: Sequence[SparseLeaf], weights: list[Array], scores) -> list[Array]:
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


def fill(treedef: Any, leaves: Sequence[Leaf], values: Iterable[Any], otherwise: Any) -> PyTree:
    """A tree with the next value for every sparse leaf, and `otherwise` for the others."""
    remaining = iter(values)
    return treedef.unflatten([next(remaining) if isinstance(leaf, SparseLeaf) else otherwise for leaf in leaves])


def _dense(leaves: Sequence[Leaf]) -> tuple[DenseLeaf, ...]:
    return tuple(leaf for leaf in leaves if isinstance(leaf, DenseLeaf))


_solve_leaves_jit = jax.jit(solve_leaves, static_argnums=(0, 2, 3))


def apply_masks(params: PyTree[Array], masks: PyTree[Bool[Array, "..."] | None]) -> PyTree[Array]:
    """`mask * param` for every leaf that has a mask; the others as they are.

    Args:
      params: parameters.
      masks: a tree of masks with the same paths; `None` where a leaf stays dense.

    Returns:
      A tree like `params`, exact zeros where pruned. Its gradient is zero for pruned entries (hard masking); use
      `nm_jax.ste` for the straight-through one. Works under `jit`, `vmap` and `grad`.
    """
    by_path = leaves_by_path(masks)
    known = set()

    def apply(keys, param):
        path = path_of(keys)
        if path not in by_path:
            raise ValueError(f"masks has no entry for {path}; compute them for this tree (None for a dense leaf)")
        known.add(path)
        mask = by_path[path]
        if empty(mask):
            return param
        if jnp.shape(mask) != jnp.shape(param):
            raise ValueError(f"{path}: the mask has shape {jnp.shape(mask)}, the parameter has {jnp.shape(param)}")
        return jnp.where(mask, param, 0)

    masked = jax.tree_util.tree_map_with_path(apply, params)
    for path, mask in by_path.items():
        if path not in known and not empty(mask):
            raise ValueError(f"masks has an entry for {path}, which is not among the parameters")
    return masked


def leaves_by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their path, nodes that stand for 'no leaf here' included. Containers do not matter, so
    that the masks in the state of an optimiser fit the parameters of any framework."""
    nodes = jax.tree_util.tree_flatten_with_path(tree, is_leaf=empty)[0]
    return {path_of(keys): leaf for keys, leaf in nodes}


# ---------------------------------------------------------------------------------------------------------- verify


@functools.partial(
    jax.tree_util.register_dataclass,
    meta_fields=("leaf",),
    data_fields=("ok", "kept", "contraction", "output", "retained", "against_unstructured", "nan", "gap"),
)
@dataclasses.dataclass(frozen=True)
class LeafReport:
    """What one sparse leaf really is.

    Attributes:
      leaf: path, shape, pattern and axes.
      ok: whether no tile breaks the pattern.
      kept: fraction of nonzero (or, of a mask, True) entries.
      contraction: most kept entries in a group of m along the contraction axis; `None` for unstructured patterns.
      output: most kept entries in a group of m along the output axis, that is in W^T.
      retained: kept share of the l1 norm of the dense weights; `None` when these are not given.
      against_unstructured: the same, relative to the unstructured mask that keeps as many entries (the paper's
        Fig. 3b).
      nan: whether the scores of the mask had NaN (from `compute_masks`).
      gap: relative distance to the proved optimum, 0 = optimal, -1 = no proof (from `compute_masks`).
    """

    leaf: SparseLeaf
    ok: Bool[Array, ""]
    kept: Float[Array, ""]
    contraction: Int[Array, ""] | None = None
    output: Int[Array, ""] | None = None
    retained: Float[Array, ""] | None = None
    against_unstructured: Float[Array, ""] | None = None
    nan: Bool[Array, ""] | None = None
    gap: Float[Array, ""] | None = None

    def cells(self) -> dict[str, str]:
        """The row as it is printed."""
        pattern = self.leaf.pattern
        shape = "x".join(map(str, self.leaf.shape))
        cells = {"path": self.leaf.path, "shape": shape, "axes": self.leaf.axes, "pattern": str(pattern)}
        cells["kept"] = _percent(self.kept)
        if self.contraction is not None and self.output is not None and pattern.tile is not None:
            m = pattern.tile[0]
            cells |= {"W": f"{int(self.contraction)}/{m}", "W^T": f"{int(self.output)}/{m}"}
        if self.retained is not None:
            cells |= {"retained": _percent(self.retained), "of US": _percent(self.against_unstructured)}
        remarks = [] if self.ok else [f"VIOLATES {pattern}"]
        if self.nan is not None and self.nan:
            remarks.append("scores had NaN")
        if self.gap is not None and self.gap >= 0:
            remarks.append("optimal, proved" if self.gap == 0 else f"within {float(self.gap):.1e} of the optimum")
        return cells | {"remark": ", ".join(remarks)}


@functools.partial(jax.tree_util.register_dataclass, data_fields=("rows",), meta_fields=("dense",))
@dataclasses.dataclass(frozen=True)
class Report:
    """What every leaf of a tree is: print it, or ask `.ok`. It is a pytree, so `verify` can run under `jit`.

    Attributes:
      rows: what each sparse leaf is.
      dense: the leaves that stay dense, and why.
    """

    rows: list[LeafReport]
    dense: tuple[DenseLeaf, ...]

    @property
    def ok(self) -> bool:
        """Whether every leaf that should be sparse has its pattern."""
        return all(bool(row.ok) for row in self.rows)

    def __getitem__(self, path: str) -> LeafReport:
        for row in self.rows:
            if row.leaf.path == path:
                return row
        raise KeyError(f"{path!r} is not among the sparse leaves")

    def __str__(self) -> str:
        broken = sum(not row.ok for row in self.rows)
        verdict = f"{broken} of them VIOLATE their pattern" if broken else "all have their pattern"
        lines = [
            f"{len(self.rows)} sparse {'leaf' if len(self.rows) == 1 else 'leaves'}, {verdict}",
            *aligned([row.cells() for row in self.rows]),
        ]
        if self.dense:
            reasons = [{"path": d.path, "shape": "x".join(map(str, d.shape)), "because": d.reason} for d in self.dense]
            lines += ["", f"{len(self.dense)} dense {'leaf' if len(self.dense) == 1 else 'leaves'}", *aligned(reasons)]
        return "\n".join(lines)


def _percent(share) -> str:
    return f"{100 * float(share):.1f}%"


def verify(
    params_or_masks: PyTree[Array],
    rules: Rules,
    *,
    dense: PyTree[Array] | None = None,
    partial: str = "skip",
) -> Report:
    """Checks that parameters (their nonzeros) or masks have the pattern that the rules say, leaf by leaf.

    Args:
      params_or_masks: parameters, or boolean masks as `compute_masks` returns them.
      rules: the rules they were made with.
      dense: the dense weights, for the retained magnitude.
      partial: as in `compute_masks`.

    Returns:
      A report: `.ok`, a row per leaf, and a readable table as its string. A pattern holds when no group keeps *more*
      than n; along both axes where it is transposable. Works under `jit`.

    Raises:
      ValueError: for rules that do not fit the tree.
    """
    originals = {} if dense is None else leaves_by_path(dense)
    leaves = resolve(params_or_masks, rules, partial)
    rows = []
    for leaf, value in zip(leaves, jax.tree.leaves(params_or_masks), strict=True):
        if isinstance(leaf, SparseLeaf):
            original: Any = originals.get(leaf.path)
            if empty(original):
                original = None
            elif jnp.shape(original) != leaf.shape:
                raise ValueError(f"{leaf.path}: dense has shape {jnp.shape(original)}, the leaf has {leaf.shape}")
            rows.append(_report_leaf(leaf, value, original))
    return Report(rows, _dense(leaves))


@functools.partial(jax.jit, static_argnums=0)
def _report_leaf(leaf: SparseLeaf, value: Array, original: Array | None) -> LeafReport:
    return partitioned(functools.partial(_examine, leaf), PartitionSpec(), value, original)


def _examine(leaf: SparseLeaf, value: Array, original: Array | None) -> LeafReport:
    kept = value if value.dtype == jnp.bool_ else _nonzero(value)
    pattern, count = leaf.pattern, jnp.sum(kept)
    row = LeafReport(leaf, ok=jnp.all(pattern.allows(leaf.tiling.split(kept))), kept=count / kept.size)
    if pattern.tile is not None:
        contraction, output = matrix_groups(kept, leaf.axes, pattern.tile[0])
        row = dataclasses.replace(row, contraction=jnp.max(contraction), output=jnp.max(output))
    if original is not None:
        magnitude = jnp.abs(original).astype(jnp.float32)
        retained = jnp.sum(jnp.where(kept, magnitude, 0))
        largest = jnp.sort(magnitude, axis=None, descending=True)
        unstructured = jnp.sum(jnp.where(jnp.arange(kept.size) < count, largest, 0))
        total = jnp.sum(magnitude)
        share = functools.partial(_share, retained)
        row = dataclasses.replace(row, retained=share(total), against_unstructured=share(unstructured))
    return row


def _share(part: Float[Array, ""], whole: Float[Array, ""]) -> Float[Array, ""]:
    """part / whole; nothing of nothing is all of it."""
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 1)


def _nonzero(value: Float[Array, "..."]) -> Bool[Array, "..."]:
    """`value != 0` on the bits: comparisons of floats may take subnormal numbers for zero."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[value.dtype.itemsize]
    return (jax.lax.bitcast_convert_type(value, unsigned) << 1) != 0
