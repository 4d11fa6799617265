"""Every solver under the modes of jax that people run their programs in."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nm_jax as nm
from nm_jax import solvers
from tests.helpers import check_mask

pytestmark = pytest.mark.slow
PATTERNS = ["2:4", "2:4-S", "2:4-T", "2:4-T-at-most", "US-0.5"]
PAIRS = [(s, p) for p in PATTERNS for s in solvers.MENU if s.supports(nm.parse_pattern(p))]
MODES = {
    "x64": lambda: jax.enable_x64(True),
    "disable_jit": jax.disable_jit,
    "strict": lambda: jax.numpy_dtype_promotion("strict"),
    "debug_infs": lambda: jax.debug_infs(True),
    "debug_nans": lambda: jax.debug_nans(True),
}
SCORES = np.abs(np.random.default_rng(0).normal(size=(10, 12))).astype(np.float32)


@contextlib.contextmanager
def mode(name):
    with MODES[name]():
        yield


@pytest.mark.parametrize(("solver", "pattern"), PAIRS, ids=str)
@pytest.mark.parametrize("name", MODES)
def test_masks_and_reports(solver, pattern, name):
    """Whole tiles and edges; the same masks as without the mode."""
    if name == "disable_jit" and isinstance(solver, solvers.Enumeration):
        pytest.skip("a loop over 2,000 masks takes too long without compilation")
    params = {"kernel": jnp.asarray(SCORES)}
    expected = nm.compute_masks(params, pattern, solver=solver, partial="pad")["kernel"]
    with mode(name):
        params = {"kernel": jnp.asarray(SCORES)}
        masks, report = nm.compute_masks(params, pattern, solver=solver, partial="pad", return_report=True)
        again = nm.verify(nm.apply_masks(params, masks), pattern, dense=params, partial="pad")
        assert str(report)
        assert str(again)
    assert report.ok
    assert again.ok
    np.testing.assert_array_equal(masks["kernel"], expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_compiled_solve_moves_nothing_between_host_and_device(pattern):
    scores = jnp.asarray(SCORES[:8])
    run = jax.jit(lambda s: nm.solve(s, pattern))
    run(scores)
    with jax.transfer_guard("disallow"):
        mask = run(scores)
    assert check_mask(mask, nm.parse_pattern(pattern))
