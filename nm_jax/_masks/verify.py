"""What every leaf of a tree really is: checks that a network has the pattern that it should have."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from nm_jax._core.axes import matrix_groups, same_groups
from nm_jax._core.nonzero import nonzero
from nm_jax._core.paths import empty
from nm_jax._core.rules import DenseLeaf, KnowsAxes, Rules, SparseLeaf, resolve
from nm_jax._core.select import largest, tally
from nm_jax._core.sharding import partitioned
from nm_jax._core.tables import aligned, row_of, shape_text
from nm_jax._masks.trees import dense_leaves, leaves_by_path
from nm_jax.solvers import Proof
from nm_jax.solvers.base import order_key


@functools.partial(
    jax.tree_util.register_dataclass,
    meta_fields=("leaf", "judged"),
    data_fields=("ok", "kept", "contraction", "output", "retained", "against_unstructured", "nan", "proof"),
)
@dataclasses.dataclass(frozen=True)
class LeafReport:
    """What one sparse leaf really is.

    Attributes:
      leaf: path, shape, pattern and axes.
      ok: whether no tile breaks the pattern, and no judge says that the axes are others.
      kept: fraction of nonzero (or, of a mask, True) entries.
      contraction: most kept entries in a group of m along the contraction axis; `None` for unstructured patterns.
      output: most kept entries in a group of m along the output axis, that is in W^T.
      retained: kept share of the l1 norm of the dense weights; `None` when these are not given.
      against_unstructured: the same, relative to the unstructured mask that keeps as many entries (the paper's
        Fig. 3b).
      nan: whether the scores of the mask had NaN (from `compute_masks`).
      proof: what is proved of the mask (from `compute_masks`).
      judged: what a judge of the axes has against them, or `""`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> row = nm.verify({"kernel": jnp.ones((4, 4))}, "2:4")["kernel"]
      >>> bool(row.ok), int(row.contraction)
      (False, 4)
    """

    leaf: SparseLeaf
    ok: Bool[Array, ""]
    kept: Float[Array, ""]
    contraction: Int[Array, ""] | None = None
    output: Int[Array, ""] | None = None
    retained: Float[Array, ""] | None = None
    against_unstructured: Float[Array, ""] | None = None
    nan: Bool[Array, ""] | None = None
    proof: Proof | None = None
    judged: str = ""

    @property
    def path(self) -> str:
        """'/'-joined keys of the leaf."""
        return self.leaf.path

    def cells(self) -> dict[str, str]:
        """The row as it is printed."""
        pattern = self.leaf.pattern
        cells = {
            "path": self.path,
            "shape": shape_text(self.leaf.shape),
            "axes": self.leaf.axes,
            "pattern": str(pattern),
        }
        cells["kept"] = _percent(self.kept)
        if self.contraction is not None and self.output is not None and pattern.tile is not None:
            m = pattern.tile[0]
            cells |= {"W": f"{int(self.contraction)}/{m}", "W^T": f"{int(self.output)}/{m}"}
        if self.retained is not None:
            cells |= {"retained": _percent(self.retained), "of US": _percent(self.against_unstructured)}
        remarks = [] if self.ok or self.judged else [f"VIOLATES {pattern}"]
        remarks += [self.judged] if self.judged else []
        if self.nan is not None and self.nan:
            remarks.append("scores had NaN")
        if self.proof is not None:
            remarks.append(self.proof.remark())
        return cells | {"remark": ", ".join(filter(None, remarks)), "axes by": self.leaf.source}


@functools.partial(jax.tree_util.register_dataclass, data_fields=("rows",), meta_fields=("dense",))
@dataclasses.dataclass(frozen=True)
class Report:
    """What every leaf of a tree is: print it, or ask `.ok`. It is a pytree, so `verify` can run under `jit`.

    Attributes:
      rows: what each sparse leaf is.
      dense: the leaves that stay dense, and why.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> report = nm.verify({"kernel": jnp.eye(4)}, "2:4-T")
      >>> report.ok, [row.path for row in report.rows]
      (True, ['kernel'])
    """

    rows: list[LeafReport]
    dense: tuple[DenseLeaf, ...]

    @property
    def ok(self) -> bool:
        """Whether every leaf that should be sparse has its pattern."""
        return all(bool(row.ok) for row in self.rows)

    def __getitem__(self, path: str) -> LeafReport:
        return row_of(self.rows, path, "among the sparse leaves")

    def __str__(self) -> str:
        broken = sum(not row.ok for row in self.rows)
        verdict = f"{broken} of them VIOLATE their pattern" if broken else "all have their pattern"
        lines = [
            f"{len(self.rows)} sparse {'leaf' if len(self.rows) == 1 else 'leaves'}, {verdict}",
            *aligned([row.cells() for row in self.rows]),
        ]
        if self.dense:
            reasons = [{"path": d.path, "shape": shape_text(d.shape), "because": d.reason} for d in self.dense]
            lines += ["", f"{len(self.dense)} dense {'leaf' if len(self.dense) == 1 else 'leaves'}", *aligned(reasons)]
        return "\n".join(lines)


def _percent(share) -> str:
    return f"{100 * float(share):.1f}%"


def verify(
    params_or_masks: PyTree,
    rules: Rules,
    *,
    dense: PyTree | None = None,
    partial: str = "skip",
    judge: KnowsAxes | None = None,
) -> Report:
    """Checks that parameters (their nonzeros) or masks have the pattern that the rules say, leaf by leaf.

    Args:
      params_or_masks: parameters, or boolean masks as `compute_masks` returns them.
      rules: the rules they were made with.
      dense: the dense weights, for the retained magnitude.
      partial: as in `compute_masks`.
      judge: a plan or a trace of the model (`nm_jax.plan`, `nm_jax.trace`). The same rules repeat their own mistakes: a
        mask along a wrong axis has its pattern along that axis. A judge knows the axes from the model; where the rules
        group a leaf otherwise, or one that the model does not contract, the leaf is not ok.

    Returns:
      A report: `.ok`, a row per leaf, and a readable table as its string. A pattern holds when no group keeps *more*
      than n; along both axes where it is transposable. Each row says on what its axes rest. Works under `jit`.
      Quantised weights (int8) are taken as they are.

    Raises:
      ValueError: for rules that do not fit the tree.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> nm.verify({"kernel": jnp.eye(8)}, "2:4-T").ok
      True
    """
    originals = {} if dense is None else leaves_by_path(dense)
    leaves = resolve(params_or_masks, rules, partial, floating=False)
    known = None if judge is None else judge.known_axes()
    rows = []
    for leaf, value in zip(leaves, jax.tree.leaves(params_or_masks), strict=True):
        if isinstance(leaf, SparseLeaf):
            original: Any = originals.get(leaf.path)
            if empty(original):
                original = None
            elif jnp.shape(original) != leaf.shape:
                raise ValueError(f"{leaf.path}: dense has shape {jnp.shape(original)}, the leaf has {leaf.shape}")
            row = report_leaf(leaf, value, original)
            judged = "" if known is None else _judged(leaf, known)
            ok = jnp.logical_and(row.ok, not judged)
            rows.append(dataclasses.replace(row, leaf=leaf, ok=ok, judged=judged))
    return Report(rows, dense_leaves(leaves))


def _judged(leaf: SparseLeaf, known: Mapping[str, tuple[str | None, str]]) -> str:
    """What a judge has against the axes of a leaf."""
    if leaf.path not in known:
        raise ValueError(f"the judge knows no {leaf.path}; plan or trace the model that has these parameters")
    axes, reason = known[leaf.path]
    if axes is None:
        return f"by the judge {reason}"
    return "" if same_groups(leaf.shape, leaf.axes, axes, leaf.pattern) else f"WRONG AXES: {axes} by the judge"


@functools.partial(jax.jit, static_argnums=0)
def report_leaf(leaf: SparseLeaf, value: Array, original: Array | None) -> LeafReport:
    return partitioned(functools.partial(_examine, leaf), PartitionSpec(), value, original)


def _examine(leaf: SparseLeaf, value: Array, original: Array | None) -> LeafReport:
    kept = nonzero(value)
    pattern, count = leaf.pattern, tally(kept)
    row = LeafReport(
        leaf, ok=jnp.all(pattern.allows(leaf.tiling.split(kept))), kept=count.as_float() / float(kept.size)
    )
    if pattern.tile is not None:
        contraction, output = matrix_groups(kept, leaf.axes, pattern.tile[0])
        row = dataclasses.replace(row, contraction=jnp.max(contraction), output=jnp.max(output))
    if original is not None:
        magnitude = jnp.abs(original).astype(jnp.float32)
        retained = jnp.sum(jnp.where(kept, magnitude, 0))
        as_many = largest(order_key(magnitude).reshape(-1), count)
        unstructured = jnp.sum(jnp.where(as_many, magnitude.reshape(-1), 0))
        total = jnp.sum(magnitude)
        share = functools.partial(_share, retained)
        row = dataclasses.replace(row, retained=share(total), against_unstructured=share(unstructured))
    return row


def _share(part: Float[Array, ""], whole: Float[Array, ""]) -> Float[Array, ""]:
    """part / whole; nothing of nothing is all of it."""
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 1)
