"""The largest of very many, against sorting; counts that do not fit 32 bits, by their shapes and by arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nm_jax as nm
from nm_jax._core import select
from nm_jax._core.select import Count, largest, tally, tally_first


def by_sorting(keys, count):
    order = np.argsort(-keys.astype(np.int64), axis=0, kind="stable")
    mask = np.zeros(keys.shape, bool)
    np.put_along_axis(mask, order[:count], True, axis=0)
    return mask


@pytest.mark.parametrize("piece", [8, 1 << 15])
@pytest.mark.parametrize("shape", [(1,), (240,), (241,), (96, 2, 3), (0, 2)])
def test_largest_is_what_sorting_gives(monkeypatch, shape, piece):
    monkeypatch.setattr(select, "_PIECE", piece)
    rng = np.random.default_rng(0)
    ends = np.iinfo(np.int32)
    for keys in (
        rng.integers(ends.min, ends.max, shape),
        rng.integers(-2, 3, shape),
        np.zeros(shape),
        np.full(shape, ends.min),
        np.full(shape, ends.max),
    ):
        for count in sorted({0, 1, shape[0] // 3, shape[0] // 2, shape[0]} & set(range(shape[0] + 1))):
            found = jax.jit(largest)(jnp.asarray(keys, jnp.int32), Count.of(count))
            np.testing.assert_array_equal(found, by_sorting(keys.astype(np.int32), count))


def test_64_bit_keys():
    with jax.enable_x64(True):
        keys = np.random.default_rng(1).integers(-(2**62), 2**62, 300)
        np.testing.assert_array_equal(largest(jnp.asarray(keys), Count.of(100)), by_sorting(keys, 100))


@pytest.mark.parametrize("shape", [(), (7,), (40_000,), (3, 5, 700), (0, 4)])
def test_tally(shape):
    flags = np.random.default_rng(2).random(shape) < 0.7
    for count in (tally(jnp.asarray(flags)), tally_first(jnp.asarray(flags).reshape(-1))):
        assert int(count.high) * 256 + int(count.low) == flags.sum()
        assert float(count.as_float()) == flags.sum()


def test_counts_beyond_32_bits():
    parts = jnp.full((100,), 2**31 - 1, jnp.int32)
    count = Count.sum(parts)
    total = 100 * (2**31 - 1)
    assert int(count.high) * 256 + int(count.low) == total
    assert bool(count.reaches(Count.of(total)))
    assert not bool(count.reaches(Count.of(total + 1)))
    assert int(Count.of(total + 70_000).minus(count)) == 70_000


SHAPES = [(16, 8192, 16384), (80, 8192, 28672)]


@pytest.mark.unchecked
@pytest.mark.parametrize("shape", SHAPES, ids=["2^31", "1.9e10"])
@pytest.mark.parametrize("pattern", ["2:4", "2:4-S", "2:4-T", "1:2-T", "US-0.5"])
def test_leaves_of_2_to_the_31_entries(pattern, shape):
    """By their shapes alone: what is traced has no number that its type cannot hold."""
    weight = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    rules = [("w", pattern, "bio")]
    masks, report = jax.eval_shape(lambda p: nm.compute_masks(p, rules, return_report=True), weight)
    assert masks["w"].shape == shape
    assert report.rows[0].kept.dtype == jnp.float32
    again = jax.eval_shape(lambda p, d: nm.verify(p, rules, dense=d), weight, weight)
    assert again.rows[0].against_unstructured.shape == ()
