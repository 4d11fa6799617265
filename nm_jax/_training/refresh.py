"""When masks are found anew, and what that changed."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nm_jax._core.rules import SparseLeaf
from nm_jax._core.sharding import by_mesh
from nm_jax._masks.compute import Scores
from nm_jax._masks.leaves import SolvedLeaf, solve_leaves
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
      every: updates between two refreshes; `None`: the masks of `begin_step` stay.
      begin_step: updates before the first masks.
      end_step: no refresh after this many updates.
      solver: solver for every leaf; `None` takes the default for each pattern.
      scores: function of a dense weight that says what its mask keeps the most of; `None`: `abs`.
      packed: whether positions of what masks keep are found with them.
    """

    every: int | None
    begin_step: int
    end_step: int | None
    solver: Solver | None
    scores: Scores | None
    packed: bool

    def start(self, leaves: Sequence[SparseLeaf], dense: Weights) -> tuple[Masks, RefreshStats]:
        """The first masks, compiled as one; all True where there are dense updates before.

        Raises:
          ValueError: for NaN among concrete weights.
        """
        if self.begin_step > 0 or not leaves:
            masks = [jnp.ones(leaf.shape, bool) for leaf in leaves]
            return masks, _stats(masks, masks, dense, None)

        @functools.partial(jax.jit, static_argnums=0)
        def find(leaves, dense):
            masks, solved = self._find(leaves, dense)
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
        beside: Sequence[Array],
    ) -> tuple[Masks, RefreshStats, Any]:
        """The masks, their statistics and positions after update number `step`: new ones when they are due. `beside`:
        the other arrays of the program.

        A loop of no turn or one: unlike the branches of `lax.cond`, it leaves masks that stay where they are (XLA would
        copy them, twice, on every step). Nothing in it has a gradient; an update as a whole still does.
        """
        due = self._due(step)
        if due is None or not leaves:
            return masks, stats, positions
        frozen, stats = jax.lax.stop_gradient((dense, stats))
        entries, containers = jax.tree.flatten(positions)

        def find(carry):
            _, old, _, _ = carry
            found, solved = self._find(leaves, frozen, beside)
            new = _stats(old, found, frozen, solved)._replace(drift=stats.drift)
            where = None if positions is None else self.positions(leaves, found)
            return jnp.zeros((), bool), found, new, jax.tree.leaves(where)

        _, masks, stats, entries = jax.lax.while_loop(lambda carry: carry[0], find, (due, masks, stats, entries))
        return masks, stats, jax.tree.unflatten(containers, entries)

    def positions(self, leaves: Sequence[SparseLeaf], masks: Masks) -> list[PackedWeight | None] | None:
        """What `nm.pack_params` needs of the masks: `None` for a leaf that is not packed.

        Raises:
          ValueError: if none is.
        """
        if not self.packed:
            return None
        found = [_positions(leaf, mask) for leaf, mask in zip(leaves, masks, strict=True)]
        if leaves and all(where is None for where in found):
            raise ValueError(
                "packed=True, and no leaf can be packed: that takes a 2:4 pattern, sizes that 4 divides, and "
                "dimensions of a batch before the others; use packed=False"
            )
        return found

    def _due(self, step: Int[Array, ""]) -> Bool[Array, ""] | None:
        """Whether masks are found after this update; `None` when they never are."""
        if self.every is None:
            return step == self.begin_step if self.begin_step > 0 else None
        due = (step >= self.begin_step) & ((step - self.begin_step) % self.every == 0)
        return due if self.end_step is None else due & (step <= self.end_step)

    def _find(
        self, leaves: Sequence[SparseLeaf], dense: Weights, beside: Sequence[Array] = ()
    ) -> tuple[Masks, list[SolvedLeaf]]:
        if self.scores is None:
            solved = solve_leaves(leaves, dense, self.solver, jnp.abs, beside)
        else:
            solved = solve_leaves(leaves, [self.scores(weight) for weight in dense], self.solver, None, beside)
        return [s.mask for s in solved], solved


def _positions(leaf: SparseLeaf, mask: Bool[Array, "..."]) -> PackedWeight | None:
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
    flip_rate = each(lambda a, b: jnp.mean((a != b).astype(jnp.float32)), old, new)
    return RefreshStats(
        flip_rate=flip_rate,
        retained=each(retained, new, dense),
        proof=Proof(*[each(lambda proof, k=k: proof[k], proofs) for k in range(len(Proof._fields))]),
        nan=each(lambda nan: nan, nans, dtype=bool),
        drift=blank(flip_rate.shape, jnp.float32, flip_rate),
    )


def _raise_for_nan(leaves: Sequence[SparseLeaf], stats: RefreshStats) -> None:
    if isinstance(stats.nan, jax.core.Tracer):
        return
    for leaf, nan in zip(leaves, stats.nan, strict=True):
        if nan:
            raise ValueError(f"{leaf.path}: the parameter or its scores are NaN; check the initialisation")
