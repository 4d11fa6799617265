"""What is proved of masks, from one tile to the state of an optimiser; "no proof" has one form, without infinities."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nm_jax as nm
from nm_jax import solvers
from nm_jax.solvers import Proof
from nm_jax.solvers._grid import proof_on_grid


def proof(*fields):
    return Proof(*(jnp.asarray(field, jnp.float32) for field in fields))


def test_the_proof_of_several_tiles_is_their_sum():
    total = proof([0, 1, 0], [0.5, 0, 0.25], [0.1, 0, 0.2], [10, 20, 30]).total()
    np.testing.assert_allclose([float(field) for field in total], [1, 0.75, 0.3, 60])
    assert not total.proved
    assert bool(proof([0, 0], [0, 0], [0, 0], [1, 2]).total().proved)


@pytest.mark.parametrize(
    ("fields", "remark"),
    [
        ((1, 0, 0, 5), ""),
        ((0, 0, 0, 5), "optimal, proved"),
        ((0, 0, 0, 0), "optimal, proved"),
        ((0, 0, 1e-5, 100), "optimal to 1e-07, proved"),
        ((0, 0.5, 1e-5, 100), "within 5.0e-03 of the optimum"),
    ],
)
def test_remarks_say_what_is_proved(fields, remark):
    assert proof(*fields).remark() == remark


def test_a_gap_never_vanishes_in_small_units():
    """Scores of 1e-42: what is proved of them is not lost where a device flushes subnormal numbers to zero."""
    gap, exponent = jnp.array([1, 1, 0]), jnp.array([-149, -140, -140])
    found = proof_on_grid(gap, exponent, nm.TransposableNM(2, 4), jnp.float32)
    np.testing.assert_array_equal(found.gap > 0, [True, True, False])
    np.testing.assert_array_equal(found.rounding > 0, [False, True, True])


@pytest.mark.parametrize(
    ("solver", "proved"), [(solvers.Greedy(), False), (solvers.Exact(), True), (solvers.MeetInTheMiddle(), True)]
)
def test_reports_and_states_without_infinities(solver, proved):
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 8))}
    with jax.debug_infs(True):
        _, report = nm.compute_masks(params, "2:4-T", solver=solver, return_report=True)
        state = nm.sparse_training(optax.sgd(0.1), "2:4-T", solver=solver).init(params)
        later = nm.sparse_training(optax.sgd(0.1), "2:4-T", begin_step=3).init(params)
    assert ("proved" in str(report)) == proved
    assert bool(report["kernel"].proof.proved) == proved
    np.testing.assert_array_equal(nm.refresh_stats(state).proof.proved, [proved])
    np.testing.assert_array_equal(nm.refresh_stats(later).proof.proved, [False])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(nm.refresh_stats(state)))
    assert nm.verify(params, "2:4-T")["kernel"].proof is None  # `verify` solves nothing
