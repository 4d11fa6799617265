"""The optimal transposable mask as an integer program, solved on the host (Eq. 3 of the paper): its slow baseline."""

import dataclasses
import functools

import lazy_loader
import numpy as np

from nm_jax._core.patterns import TransposableNM
from nm_jax.solvers.base import Solver
from nm_jax.solvers.flow import on_host

scipy = lazy_loader.load("scipy")  # loaded when a block is solved


@dataclasses.dataclass(frozen=True)
class IntegerProgram(Solver):
    """The optimum, block by block on the host with `scipy.optimize.milp`, as Eq. 3 states it.

    It is here because the paper compares against it. Optimal within the tolerances of the HiGHS solver (about 1e-6 of
    the largest score). Under `jax.jit` it is a host callback.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> scores = jnp.array([[9.0, 1, 1], [1, 9, 1], [1, 1, 9]])
      >>> nm.solve(scores, "1:3-T", nm.solvers.IntegerProgram()).astype(int).tolist()
      [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    """

    def supports(self, pattern):
        return isinstance(pattern, TransposableNM)

    def solve(self, scores, pattern):
        return on_host(functools.partial(_optimum, pattern), scores, pattern), None


def _optimum(pattern: TransposableNM, block: np.ndarray) -> np.ndarray:
    if pattern.at_most:  # what is negative is worth no place, whatever its size
        block = np.maximum(block, -block.max(initial=0))
    scale = np.abs(block).max()
    # HiGHS has absolute tolerances: bring the scores to its own order of magnitude.
    costs = -block.ravel() / scale if scale > 0 else np.zeros(block.size)
    result = scipy.optimize.milp(
        costs,
        integrality=np.ones(block.size),
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=_row_and_column_sums(pattern),
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise RuntimeError(f"the integer program of a {pattern} block failed: {result.message}")
    return result.x.reshape(block.shape) > 0.5


@functools.cache
def _row_and_column_sums(pattern: TransposableNM):
    eye, ones = np.eye(pattern.m), np.ones((1, pattern.m))
    sums = np.concatenate([np.kron(eye, ones), np.kron(ones, eye)])
    return scipy.optimize.LinearConstraint(sums, 0 if pattern.at_most else pattern.n, pattern.n)
