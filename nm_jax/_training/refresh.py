"""Masks that are found anew when they are due, and what that changed."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nm_jax._core.rules import SparseLeaf
from nm_jax._core.sharding import by_mesh
from nm_jax._masks.compute import Scores
from nm_jax._masks.leaves import SolvedLeaf, solve_leaves
from nm_jax._training.due import Due
from nm_jax._training.phases import Phases
from nm_jax._training.sparse_leaves import SparseLeaves
from nm_jax._training.state import RefreshStats
from nm_jax.matmul import PackedWeight
from nm_jax.matmul._parameter import positions
from nm_jax.solvers import Proof, Solver
from nm_jax.solvers.base import blank

Masks = list[Bool[Array, "..."]]
Weights = list[Float[Array, "..."]]


@dataclasses.dataclass(frozen=True)
class Refresh:
    """Finds masks of the dense weights at the start, and again when they are due.

    Attributes:
      due: after which updates.
      phases: which pattern masks have when.
      solver: solver for every leaf; `None` takes the default for each pattern.
      scores: function of a dense weight that says what its mask keeps the most of; `None`: `abs`.
      packed: whether positions of what masks keep are found with them.
    """

    due: Due
    phases: Phases
    solver: Solver | None
    scores: Scores | None
    packed: bool

    def start(self, sparse: SparseLeaves, dense: Weights) -> tuple[Masks, RefreshStats, Any]:
        """The first masks, their statistics, and a tree of their positions, if these are asked for.

        Raises:
          ValueError: for NaN among concrete weights; if positions are asked for and none can be.
        """
        masks, stats = self._start(self.phases.leaves(sparse.leaves)[0], dense)
        return masks, stats, sparse.only(self._positions(sparse.leaves, masks)) if self.packed else None

    def _start(self, leaves: Sequence[SparseLeaf], dense: Weights) -> tuple[Masks, RefreshStats]:
        """Compiled as one; all True where there are dense updates before."""
        if self.due.begin_step > 0 or not leaves:
            masks = [jnp.ones(leaf.shape, bool) for leaf in leaves]
            return masks, _stats(masks, masks, dense, None)

        @functools.partial(jax.jit, static_argnums=0)
        def find(leaves, dense):
            masks, solved = self._solve(leaves, dense)
            return masks, _stats(masks, masks, dense, solved)

        groups = by_mesh(dense)
        parts = [find(tuple(leaves[k] for k in group), [dense[k] for k in group]) for group in groups]
        order = [k for group in groups for k in group]
        found = dict(zip(order, [mask for part, _ in parts for mask in part], strict=True))
        masks = [found[k] for k in range(len(leaves))]
        stats = jax.tree.map(lambda *values: jnp.concatenate(values)[np.argsort(order)], *[stats for _, stats in parts])
        _raise_for_nan(leaves, stats)
        return masks, stats

    def __call__(
        self,
        step: Int[Array, ""],
        leaves: Sequence[SparseLeaf],
        dense: Weights,
        masks: Masks,
        stats: RefreshStats,
        positions: Any,
        moves: Callable[[], Float[Array, " leaves"]],
        beside: Sequence[Array],
    ) -> tuple[Masks, RefreshStats, Any]:
        """The masks, their statistics and positions after update number `step`: new ones when they are due. `moves`:
        how far the update moved each weight, relative, asked for then only; `beside`: the other arrays of the program.

        A loop of no turn or one: unlike the branches of `lax.cond`, it leaves masks that stay where they are (XLA would
        copy them, twice, on every step). Nothing in it has a gradient; an update as a whole still does.
        """
        if not leaves:
            return masks, stats, positions
        due = self.due(step, stats, tuple(math.prod(leaf.shape) for leaf in leaves))
        if due is None:
            return masks, stats, positions
        frozen, stats = jax.lax.stop_gradient((dense, stats))
        entries, containers = jax.tree.flatten(positions)

        def find(carry):
            _, old, _, _ = carry
            found, solved = self._find(step, leaves, frozen, beside)
            new = _stats(old, found, frozen, solved)._replace(move=jax.lax.stop_gradient(moves()), drift=stats.drift)
            where = self._positions(leaves, found) if self.packed else None
            new = new._replace(phase=new.phase + self.phases.ended(step))
            new = new.after(stats, step, (step > self.due.begin_step) & ~self.phases.changes(step))
            return jnp.zeros((), bool), found, new, jax.tree.leaves(where)

        _, masks, stats, entries = jax.lax.while_loop(lambda carry: carry[0], find, (due, masks, stats, entries))
        return masks, stats, jax.tree.unflatten(containers, entries)

    def _positions(self, leaves: Sequence[SparseLeaf], masks: Masks) -> list[PackedWeight | None]:
        """What `nm.pack_params` needs of the masks: `None` for a leaf that is not packed."""
        found = [_packed_at(leaf, mask) for leaf, mask in zip(leaves, masks, strict=True)]
        if leaves and all(where is None for where in found):
            raise ValueError(
                "packed=True, and no leaf can be packed: that takes a 2:4 pattern, sizes that 4 divides, and "
                "dimensions of a batch before the others; use packed=False"
            )
        return found

    def _find(
        self, step: Int[Array, ""], leaves: Sequence[SparseLeaf], dense: Weights, beside: Sequence[Array]
    ) -> tuple[Masks, list[SolvedLeaf]]:
        """With the patterns that masks have after update number `step`."""
        phases = self.phases.leaves(leaves)
        if len(phases) == 1:
            return self._solve(leaves, dense, beside)
        solves = [functools.partial(self._solve, phase) for phase in phases]
        return jax.lax.switch(self.phases.ended(step), solves, dense, beside)

    def _solve(
        self, leaves: Sequence[SparseLeaf], dense: Weights, beside: Sequence[Array] = ()
    ) -> tuple[Masks, list[SolvedLeaf]]:
        if self.scores is None:
            solved = solve_leaves(leaves, dense, self.solver, jnp.abs, beside)
        else:
            solved = solve_leaves(leaves, [self.scores(weight) for weight in dense], self.solver, None, beside)
        return [s.mask for s in solved], solved


def _packed_at(leaf: SparseLeaf, mask: Bool[Array, "..."]) -> PackedWeight | None:
    groups, across = leaf.pattern.contraction_groups, leaf.pattern.output_groups
    if groups is None or not groups.two_of_four:
        return None
    return positions(mask, leaf.axes, across is not None and across.two_of_four)


def _stats(old: Masks, new: Masks, dense: Weights, solved: list[SolvedLeaf] | None) -> RefreshStats:
    def each(function, *lists, dtype=jnp.float32):
        return jnp.array([function(*items) for items in zip(*lists, strict=True)], dtype).reshape(-1)

    def retained(mask, weight):
        magnitude = jnp.abs(weight).astype(jnp.float32)
        total = jnp.sum(magnitude)
        return jnp.where(total > 0, jnp.sum(jnp.where(mask, magnitude, 0)) / jnp.where(total > 0, total, 1), 1)

    proofs = [Proof.none(jnp.float32(0)) for _ in new] if solved is None else [s.proof for s in solved]
    nans = [jnp.any(jnp.isnan(d)) for d in dense] if solved is None else [s.nan for s in solved]
    flip_rate, share = each(lambda a, b: jnp.mean((a != b).astype(jnp.float32)), old, new), each(retained, new, dense)
    nothing = blank(flip_rate.shape, jnp.float32, flip_rate)
    return RefreshStats(
        flip_rate=flip_rate,
        retained=share,
        proof=Proof(*[each(lambda proof, k=k: proof[k], proofs) for k in range(len(Proof._fields))]),
        nan=each(lambda nan: nan, nans, dtype=bool),
        drift=nothing,
        step=blank(flip_rate.shape, jnp.int32, flip_rate),
        phase=blank(flip_rate.shape, jnp.int32, flip_rate) + int(solved is not None),
        move=nothing,
        largest_flip_rate=nothing,
        largest_retained=nothing if solved is None else share,
        largest_move=nothing,
    )


def _raise_for_nan(leaves: Sequence[SparseLeaf], stats: RefreshStats) -> None:
    if isinstance(stats.nan, jax.core.Tracer):
        return
    for leaf, nan in zip(leaves, stats.nan, strict=True):
        if nan:
            raise ValueError(f"{leaf.path}: the parameter or its scores are NaN; check the initialisation")
