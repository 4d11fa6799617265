"""What consumers ask of a pattern it answers itself: one that nobody knows is neither refused nor taken for another."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nm_jax as nm
from nm_jax import solvers
from nm_jax._core.patterns import Group, Pattern
from tests.helpers import PATTERNS, all_masks


@dataclasses.dataclass(frozen=True)
class Checker(Pattern):
    """One of the two diagonals of every 2 x 2 block is kept."""

    tile = (2, 2)
    density = 0.5

    def allows(self, kept):
        return ~((kept[0, 0] | kept[1, 1]) & (kept[0, 1] | kept[1, 0]))

    def full(self, kept):
        return self.allows(kept) & (jnp.sum(kept, axis=(0, 1)) == 2)

    def __str__(self):
        return "checker"


def test_a_new_pattern_works_everywhere():
    params = {"l0": {"kernel": jax.random.normal(jax.random.key(0), (8, 8))}}
    masks, report = nm.compute_masks(params, Checker(), return_report=True)
    assert report.ok
    assert "checker" in str(report)
    mask, weight = np.asarray(masks["l0"]["kernel"]), np.abs(np.asarray(params["l0"]["kernel"], np.float64))
    for row in range(0, 8, 2):
        for col in range(0, 8, 2):
            block = weight[row : row + 2, col : col + 2]
            best = max(block[0, 0] + block[1, 1], block[0, 1] + block[1, 0])
            assert block[mask[row : row + 2, col : col + 2]].sum() == pytest.approx(best)
    assert not nm.verify(params, Checker()).ok
    assert nm.mask_diversity(Checker(), (4, 4)) == 2**4
    assert solvers.default_solver(Checker()) == solvers.Enumeration()
    (row,) = nm.pattern_violations(params, Checker())
    assert row.expected is None


def test_an_unknown_pattern_is_not_counted_as_sparse_products():
    params = {name: jnp.ones((8, 8)) for name in "abc"}

    def apply(p, x):
        return x @ p["a"] @ p["b"] @ p["c"]

    shares = {
        str(pattern): nm.plan(apply, params, jnp.ones((1, 8)), pattern=pattern).sparse_flops_share
        for pattern in (Checker(), "2:4", "2:4-T", "US-0.5")
    }
    assert shares == pytest.approx({"checker": 0, "2:4": 1 / 9, "2:4-T": 2 / 9, "US-0.5": 0})
    with pytest.raises(ValueError, match="sparse tensor cores read two kept of every four"):
        nm.nm_matmul(jnp.ones((1, 8)), params["a"], pattern=Checker())


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if p.tile and p.tile[0] * p.tile[1] <= 16], ids=str)
def test_listed_masks_are_all_masks(pattern):
    expected = {mask.astype(bool).tobytes() for mask in all_masks(pattern)}
    found = [np.ascontiguousarray(mask).tobytes() for mask in pattern.masks()]
    assert set(found) == expected
    assert len(found) == len(expected)


@pytest.mark.parametrize("pattern", [*PATTERNS, Checker()], ids=str)
def test_promises_about_groups_hold(pattern):
    """On every mask of a tile, or on random ones."""
    contraction, output = pattern.contraction_groups, pattern.output_groups
    if pattern.tile is None:
        assert contraction is None
        assert output is None
        return
    if (tiles := pattern.masks()) is None:
        scores = jax.random.normal(jax.random.key(0), (*pattern.tile, 200))
        tiles = np.moveaxis(np.asarray(solvers.default_solver(pattern)(scores, pattern).mask), -1, 0)
    for groups, axis in ((contraction, 1), (output, 2)):
        if groups is not None:
            counts = tiles.sum(axis)
            assert tiles.shape[axis] == groups.m
            assert (counts == groups.n).all() if groups.exactly else (counts <= groups.n).all()
    if pattern.relaxed is not None:
        assert bool(pattern.relaxed.full(jnp.asarray(np.moveaxis(tiles, 0, -1))).all())
        assert pattern.relaxed.relaxed == pattern.relaxed
        assert not pattern.relaxed.contraction_groups.exactly


def test_which_groups_sparse_tensor_cores_read():
    read = [(n, m) for m in range(2, 9) for n in range(1, m) if Group(n, m).two_of_four]
    assert read == [(1, 2), (1, 4), (2, 4)]


@pytest.mark.parametrize("sparsity", [0.5, 0.123456789, 1 / 3, 0.9999999, 1e-7, 0.1 + 0.2])
def test_unstructured_strings_keep_every_digit(sparsity):
    pattern = nm.Unstructured(sparsity)
    assert nm.parse_pattern(str(pattern)) == pattern
    plan = nm.plan(lambda p, x: x @ p, jnp.ones((64, 64)), jnp.ones((1, 64)), pattern=pattern, first=pattern)
    assert nm.Plan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["leaves"][0]["pattern"] == str(pattern)
