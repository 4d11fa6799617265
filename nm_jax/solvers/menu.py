"""The choice of a solver, and solving one matrix."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from nm_jax._core.axes import Tiling
from nm_jax._core.patterns import Pattern, parse_pattern
from nm_jax._core.sharding import partitioned, spec
from nm_jax.solvers._slabs import solve_matrices
from nm_jax.solvers.base import Solver
from nm_jax.solvers.enumeration import Enumeration
from nm_jax.solvers.exact import Exact
from nm_jax.solvers.flow import MinCostFlow
from nm_jax.solvers.greedy import Greedy
from nm_jax.solvers.integer import IntegerProgram
from nm_jax.solvers.meet_in_the_middle import MeetInTheMiddle
from nm_jax.solvers.topk import TopK, Window

# To add a solver, add a line. The first that supports a pattern is its default: the optimum, and fast.
MENU: tuple[Solver, ...] = (
    TopK(),
    Window(),
    MeetInTheMiddle(),
    Exact(),
    MinCostFlow(),  # blocks beyond m = 32 go to the host
    Enumeration(),
    Greedy(),
    IntegerProgram(),
)


def default_solver(pattern: Pattern) -> Solver:
    """The solver that `solver=None` means for a pattern: the first of the menu that supports it.

    Raises:
      ValueError: if none does: a pattern of your own with tiles of more than 16 entries needs `solver=`.

    Examples:
      >>> import nm_jax as nm
      >>> nm.solvers.default_solver(nm.parse_pattern("2:4-T"))
      MeetInTheMiddle()
    """
    for solver in MENU:
        if solver.supports(pattern):
            return solver
    raise ValueError(f"no solver is known for {pattern!r}; pass solver=")


def solve(
    scores: Float[Array, "..."],
    pattern: str | Pattern,
    solver: Solver | None = None,
    *,
    axes: str = "io",
    partial: str = "error",
) -> Bool[Array, "..."]:
    """The mask of one weight that keeps the most of its scores.

    max sum(mask * scores)  such that  the mask has the pattern

    Args:
      scores: what to keep the most of, for instance `abs(w)`; used as given, negatives included. Any float dtype.
      pattern: a pattern or its string; n:m means n kept of m.
      solver: one of `nm_jax.solvers`; `None` picks the default for the pattern.
      axes: one letter per dimension; `"io"` is (contraction, output).
      partial: what to do with sizes that m does not divide: `"error"`, or `"pad"` (edge tiles hold at most n).

    Returns:
      Boolean mask of the scores' shape, True = kept.

    Raises:
      ValueError: for NaN among the scores (when they are concrete; under `jit` NaN counts as the lowest score),
        integer scores, axes or a pattern that do not fit.

    Works under `jit` and `vmap`; masks have no gradient.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> nm.solve(jnp.abs(jnp.array([[0.1], [-3.0], [2.0], [0.5]])), "2:4")[:, 0].tolist()
      [False, True, True, False]
    """
    pattern = parse_pattern(pattern)
    scores = jax.lax.stop_gradient(jnp.asarray(scores))
    if partial not in ("error", "pad"):
        raise ValueError(f"partial must be 'error' or 'pad' for one matrix, got {partial!r}")
    tiling = Tiling.of(scores.shape, axes, pattern)
    if partial == "error":
        for axis, size, tile in tiling.ragged:
            raise ValueError(f"the {axis} axis has size {size}, which {tile} does not divide; pass partial='pad'")
    mask, nan = _solve_matrix(scores, tiling, pattern, solver or default_solver(pattern))
    if not isinstance(nan, jax.core.Tracer) and bool(nan):
        raise ValueError(f"{int(jnp.isnan(scores).sum())} scores are NaN; remove them before finding a mask")
    return mask


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _solve_matrix(scores, tiling: Tiling, pattern: Pattern, solver: Solver) -> tuple[Array, Array]:
    """The mask, sharded as the scores are, and the number of tiles with NaN."""

    def find(scores):
        solved = solve_matrices([scores], [tiling], pattern, solver)[0]
        return solved.mask, solved.nan

    return partitioned(find, (spec(scores), PartitionSpec()), scores)
