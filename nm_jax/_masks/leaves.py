"""Solving the leaves of a tree together: one compilation per pattern, and no weight moves between devices.

Tiles are independent, so a device can solve those that it holds. `jax.jit` does not know that: joining or reordering
sharded leaves would gather them. The solve is therefore an operation of its own for the partitioner, which runs on
each device's part. With explicit meshes it is a `jax.shard_map`; inside one, arrays are local already.

    solve_leaves
      tiled patterns    _solve_where_they_are     on which devices?
          one device, or inside a shard_map          _solve_here
          a mesh with explicit axes                  jax.shard_map of _solve_part
          a mesh that the compiler partitions        _partitioned: custom_partitioning of _solve_part
      whole leaves      _solve_here
    _solve_part  = _solve_here on this device's part, and sums over the devices
    _solve_here  = solve_matrices for each pattern
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from nm_jax._core.axes import Tiling
from nm_jax._core.patterns import Pattern
from nm_jax._core.rules import SparseLeaf
from nm_jax._core.sharding import meshes
from nm_jax.solvers import Proof, Solved, Solver, default_solver, solve_matrices


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SolvedLeaf:
    """The mask of one leaf and what its solver says of it.

    Attributes:
      mask: True = kept, in the shape of the leaf.
      nan: whether its scores had NaN.
      proof: what is proved of all its tiles.
    """

    mask: Bool[Array, "..."]
    nan: Bool[Array, ""]
    proof: Proof


class _Solve(NamedTuple):
    """Static configuration of a solve."""

    solver: Solver | None
    transform: Callable[[Array], Array] | None


def solve_leaves(
    leaves: Sequence[SparseLeaf],
    scores: Sequence[Float[Array, "..."]],
    solver: Solver | None,
    transform: Callable[[Array], Array] | None = None,
    beside: Sequence[Array] = (),
) -> list[SolvedLeaf]:
    """The masks of sparse leaves. Leaves with one pattern share one solve.

    Args:
      leaves: what the rules say of them.
      scores: what to keep the most of, one array per leaf.
      solver: solver for all, `None` takes the default for each pattern.
      transform: elementwise function from `scores` to the scores (`jnp.abs`), which saves a copy of them.
      beside: other arrays of the same program, which may be on another mesh.

    Works under `jit` with leaves sharded over a mesh, `vmap` and `shard_map`. Where shards end on the boundaries of
    tiles, no weights move, and masks are those of one device; otherwise a warning names the leaf and the axis, and the
    leaf is gathered along it. Unstructured masks compare all entries of a leaf, and gather it.
    """
    # Masks have no gradient, and the arithmetic of solvers need not be differentiable.
    scores = [jax.lax.stop_gradient(score) for score in scores]
    tiled = [k for k, leaf in enumerate(leaves) if leaf.pattern.tile is not None]
    whole = [k for k, leaf in enumerate(leaves) if leaf.pattern.tile is None]
    solved: dict[int, SolvedLeaf] = {}
    gathered = bool(tiled) and _on_several_meshes([*scores, *beside])
    in_place = _solve_gathered if gathered else _solve_where_they_are
    for members, solve in ((tiled, in_place), (whole, _solve_here)):
        if members:
            chosen = tuple(leaves[k] for k in members)
            masks, sums = solve(chosen, _Solve(solver, transform), [scores[k] for k in members])
            for k, mask, (*proof, nan) in zip(members, masks, sums, strict=True):
                solved[k] = SolvedLeaf(mask, nan > 0, Proof(*proof))
    return [solved[k] for k in range(len(leaves))]


def _on_several_meshes(arrays: Sequence[Array]) -> bool:
    """Whether the arrays of a program are on meshes that differ, which a warning then says."""
    found = meshes(arrays)
    if len(found) < 2 or any(AxisType.Explicit in mesh.axis_types for mesh in found):
        return False
    names = " and ".join(str(mesh.axis_names) for mesh in found)
    warnings.warn(
        f"the parameters are on {len(found)} meshes, {names}: inside `jit` leaves are gathered to find their masks; "
        "use one mesh that has all the axes",
        stacklevel=3,
    )
    return True


def _solve_where_they_are(leaves: tuple[SparseLeaf, ...], how: _Solve, scores: list[Array]):
    """`_solve_here` on every device's own part of the leaves."""
    if jax.sharding.get_abstract_mesh().manual_axes:
        return _solve_here(leaves, how, scores)
    shardings = [jax.typeof(score).sharding for score in scores]
    explicit = [s for s in shardings if AxisType.Explicit in s.mesh.axis_types]
    if explicit:
        mesh = explicit[0].mesh
        specs = [_aligned(leaf, s.spec, s.mesh) for leaf, s in zip(leaves, shardings, strict=True)]
        scores = [
            jax.sharding.reshard(score, NamedSharding(mesh, spec)) for score, spec in zip(scores, specs, strict=True)
        ]
        local = functools.partial(_solve_part, leaves, how, specs)
        specs_out = (specs, [PartitionSpec()] * len(leaves))
        return jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=specs_out, check_vma=False)(scores)
    if jax.device_count() == 1:
        return _solve_here(leaves, how, scores)
    flat = _partitioned(leaves, how)(*scores)
    return list(flat[: len(leaves)]), list(flat[len(leaves) :])


def _solve_gathered(leaves: tuple[SparseLeaf, ...], how: _Solve, scores: list[Array]):
    """`_solve_here` on whole leaves that are on several meshes: one after the other, never two joined in one array."""
    solved: dict[int, tuple] = {}
    for mesh in {jax.typeof(score).sharding.mesh: None for score in scores}:
        members = [k for k, score in enumerate(scores) if jax.typeof(score).sharding.mesh == mesh]
        masks, sums = _solve_here(tuple(leaves[k] for k in members), how, [scores[k] for k in members])
        masks = [mask & jnp.full_like(scores[k], True, dtype=bool) for k, mask in zip(members, masks, strict=True)]
        solved |= dict(zip(members, zip(masks, sums, strict=True), strict=True))
    return [solved[k][0] for k in range(len(leaves))], [solved[k][1] for k in range(len(leaves))]


def _solve_here(leaves: tuple[SparseLeaf, ...], how: _Solve, scores: Sequence[Array]):
    """Masks, and for each leaf what is summed over its tiles: the fields of its proof, and how many have NaN."""
    groups: dict[Pattern, list[int]] = {}
    for k, leaf in enumerate(leaves):
        groups.setdefault(leaf.pattern, []).append(k)
    solved: dict[int, Solved] = {}
    for pattern, members in groups.items():
        # A device may hold a part of a leaf: what counts is the shape that is here.
        tilings = [Tiling.of(scores[k].shape, leaves[k].axes, pattern) for k in members]
        solver = how.solver or default_solver(pattern)
        found = solve_matrices([scores[k] for k in members], tilings, pattern, solver, how.transform)
        solved |= dict(zip(members, found, strict=True))
    ordered = [solved[k] for k in range(len(leaves))]
    return [s.mask for s in ordered], [jnp.stack([*s.proof, s.nan]) for s in ordered]


# ------------------------------------------------------------------------------------------------------- sharding


def _solve_part(leaves, how, specs, scores):
    """`_solve_here`, with the sums taken over all devices."""
    masks, sums = _solve_here(leaves, how, scores)
    return masks, [jax.lax.psum(s, _names(spec)) if _names(spec) else s for s, spec in zip(sums, specs, strict=True)]


def _names(spec: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes that a spec uses."""
    return tuple(name for part in spec for name in ((part,) if isinstance(part, str) else part or ()))


def _aligned(leaf: SparseLeaf, spec: PartitionSpec, mesh) -> PartitionSpec:
    """The spec, without the axes along which shards end inside a tile; these are named in a warning."""
    parts = list(spec) + [None] * (len(leaf.shape) - len(spec))
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    local = [
        size // math.prod(sizes[name] for name in _names(PartitionSpec(part)))
        for size, part in zip(leaf.shape, parts, strict=True)
    ]
    assert leaf.pattern.tile is not None
    for letter, name, tile in zip("io", ("contraction", "output"), leaf.pattern.tile, strict=True):
        dims = [k for k, axis in enumerate(leaf.axes) if axis == letter]
        sharded = [k for k in dims if parts[k] is not None]
        # Entries that follow each other on one device: whole minor dimensions, and a part of the first sharded one.
        run = math.prod(local[k] for k in dims if sharded and k >= sharded[-1])
        if sharded and run % tile:
            warnings.warn(
                f"{leaf.path}: the {name} axis is sharded in pieces of {run}, which {tile} does not divide; the leaf "
                f"is gathered along it to find its mask: shard it on multiples of {tile}",
                stacklevel=2,
            )
            for k in dims:
                parts[k] = None
    return PartitionSpec(*parts)


@functools.cache
def _partitioned(leaves: tuple[SparseLeaf, ...], how: _Solve):
    """`_solve_here` as an operation that the partitioner of `jit` runs on each device's part of its arguments."""
    count = len(leaves)

    def whole(*scores):
        masks, sums = _solve_here(leaves, how, scores)
        return (*masks, *sums)

    def partition(mesh, arguments, results):
        del results
        specs = [_aligned(leaf, a.sharding.spec, mesh) for leaf, a in zip(leaves, arguments, strict=True)]

        def local(*scores):
            masks, sums = _solve_part(leaves, how, specs, scores)
            return (*masks, *sums)

        sharded = tuple(NamedSharding(mesh, spec) for spec in specs)
        return mesh, local, (*sharded, *[NamedSharding(mesh, PartitionSpec())] * count), sharded

    def infer(mesh, arguments, results):
        del results
        return (*(a.sharding for a in arguments), *[NamedSharding(mesh, PartitionSpec())] * count)

    def factors(mesh, values, results):
        """Masks are sharded as their leaves, whatever these are; the sums are not."""
        del mesh, results
        leaf_factors = [" ".join(f"l{k}d{d}" for d in range(len(v.shape))) for k, v in enumerate(values)]
        sums = [f"s{k}" for k in range(count)]
        return f"{', '.join(leaf_factors)} -> {', '.join([*leaf_factors, *sums])}"

    operation = custom_partitioning(whole)
    operation.def_partition(partition=partition, infer_sharding_from_operands=infer, sharding_rule=factors)
    batched = jax.custom_batching.custom_vmap(operation)

    @batched.def_vmap
    def _(axis_size, in_batched, *scores):
        axes = [0 if is_batched else None for is_batched in in_batched]
        return jax.vmap(whole, in_axes=axes, axis_size=axis_size)(*scores), (True,) * (2 * count)

    return batched
