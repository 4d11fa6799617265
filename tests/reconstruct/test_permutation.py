"""Orders of channels in which patterns keep more."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import nm_jax as nm
from nm_jax._reconstruct._gains import Channels
from nm_jax._reconstruct._permutation import improved

PATTERNS = ["1:2", "2:4", "2:4-T", "3:4-S", "1:2-T"]


def magnitudes(*shape, seed=0):
    return np.abs(np.random.default_rng(seed).standard_normal(shape, np.float32))


def kept(scores, pattern, axes="io"):
    return float(np.where(nm.solve(jnp.asarray(scores), pattern, axes=axes), scores, 0).sum(dtype=np.float64))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gains_are_what_the_solver_keeps_with_each_candidate(pattern):
    parsed, scores = nm.parse_pattern(pattern), magnitudes(8, 8) - 0.3  # some are negative
    layer, size = Channels(jnp.asarray(scores), parsed), parsed.tile[0]
    groups = np.random.default_rng(1).permutation(8).reshape(-1, size)
    for place in range(size):
        gains = layer.gains(groups, place)
        for group, candidate in itertools.product(range(len(groups)), repeat=2):
            rows = groups[group].copy()
            rows[place] = groups[candidate, place]
            np.testing.assert_allclose(gains[group, candidate], kept(scores[rows], pattern), rtol=1e-5)
    assert layer.exact


SLOW = [pytest.param(pattern, marks=pytest.mark.slow) for pattern in ("1:2-T", "4:8-T", "2:4-T-at-most")]


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "2:4-T", "3:4-S", *SLOW])
def test_no_order_is_worse_than_the_given_one(pattern):
    scores = magnitudes(16, 16, seed=2) ** 3
    found = nm.find_permutation(scores, pattern)
    permuted = scores[found.inputs]
    if found.outputs is not None:
        permuted = permuted[:, found.outputs]
        assert sorted(found.outputs) == list(range(16))
    assert (found.outputs is not None) == ("-T" in pattern)
    assert sorted(found.inputs) == list(range(16))
    np.testing.assert_allclose(kept(scores, pattern) / scores.sum(), found.before, rtol=1e-5)
    np.testing.assert_allclose(kept(permuted, pattern) / scores.sum(), found.after, rtol=1e-5)
    assert found.after > found.before


def test_scores_that_fit_in_some_order_fit_in_the_order_found():
    scores = np.kron(np.eye(4, dtype=np.float32), np.ones((2, 1), np.float32))  # two of eight channels for each output
    scores = scores[[0, 2, 1, 3, 4, 6, 5, 7]]  # a group of 1:2 has two outputs' worth in some places
    assert nm.find_permutation(np.repeat([3.0, 2.0, 0.0, 0.0], 2).reshape(8, 1), "1:2").after == 1
    assert nm.find_permutation(scores, "1:2").after == 1


def test_one_seed_gives_one_order():
    scores = magnitudes(16, 8, seed=3)
    first, second, other = (nm.find_permutation(scores, "2:4", seed=seed).inputs for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_all_positions_of_a_kernel_move_together():
    scores = magnitudes(3, 16, 4, seed=4)
    found = nm.find_permutation(scores, "2:4", axes="bio")
    assert found.after == pytest.approx(kept(scores[:, found.inputs], "2:4", "bio") / scores.sum())
    assert found.outputs is None
    transposed = nm.find_permutation(scores.transpose(2, 1, 0), "2:4", axes="oib")
    np.testing.assert_array_equal(found.inputs, transposed.inputs)


def test_outputs_stay_when_asked_and_rounds_are_reported():
    shares = []
    found = nm.find_permutation(magnitudes(8, 8), "2:4-T", outputs=False, on_round=shares.append)
    assert found.outputs is None
    assert shares == sorted(shares) and shares[-1] == pytest.approx(found.after)


def test_layers_with_the_same_channels_gain_together_and_none_loses():
    layers = [
        Channels(jnp.asarray(magnitudes(32, 8, seed=seed) ** 3), nm.parse_pattern(pattern))
        for seed, pattern in enumerate(("2:4", "1:2"))
    ]
    order = improved(layers, np.arange(32), np.random.default_rng(0))
    gains = [layer.kept(order) - layer.kept(np.arange(32)) for layer in layers]
    assert all(gain >= -1e-5 for gain in gains) and max(gains) > 0.1


def test_whole_leaves_have_no_order():
    found = nm.find_permutation(magnitudes(8, 8), "US-0.5")
    np.testing.assert_array_equal(found.inputs, np.arange(8))
    assert found.before == found.after > 0.5


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("scores", "pattern", "message"),
    [
        (magnitudes(6, 8), "2:4", "contraction axis has size 6, and 4 does not divide it"),
        (magnitudes(8, 6), "2:4-T", "output axis has size 6"),
        (np.full((8, 8), np.nan, np.float32), "2:4", "not finite"),
        (np.ones((8, 8), np.int32), "2:4", "floating point"),
    ],
)
def test_what_does_not_fit_is_refused(scores, pattern, message):
    with pytest.raises(ValueError, match=message):
        nm.find_permutation(scores, pattern)
