"""Packing against masks read bit by bit."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nm_jax._core.nonzero import as_bits
from nm_jax.matmul import pack, repack, unpack
from nm_jax.matmul._compress import to_dense
from tests.matmul.cases import PAIRS, all_pairs, refused, transposable, words

DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32]


def kept_values(w, mask):
    """The kept entries of (rows, k), row by row in order."""
    return np.array([row[kept] for row, kept in zip(np.asarray(w, np.float64), mask, strict=True)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_pairs_of_patterns_forward(dtype):
    w, mask = all_pairs(6, 64)
    packed = pack(jnp.asarray(w.T, dtype), jnp.asarray(mask.T), orientation="forward")
    assert packed.backward is None and packed.forward.k == 64 and packed.matrix_shape == (64, 6)
    assert packed.forward.values.dtype == dtype and packed.forward.matrix.metadata.dtype == jnp.uint16
    np.testing.assert_array_equal(packed.forward.matrix.metadata, words(mask))
    np.testing.assert_array_equal(
        np.asarray(packed.forward.values, np.float64), kept_values(jnp.asarray(w, dtype), mask)
    )


def test_all_pairs_of_patterns_backward():
    w, mask = all_pairs(6, 64)
    packed = pack(jnp.asarray(w), jnp.asarray(mask), orientation="backward")
    assert packed.forward is None
    np.testing.assert_array_equal(packed.backward.matrix.metadata, words(mask))
    np.testing.assert_array_equal(packed.backward.values, kept_values(w, mask))


def test_both_orientations_of_a_transposable_mask():
    mask = transposable(32, 48)
    w = np.random.default_rng(0).normal(size=(32, 48)).astype(np.float32)
    packed = pack(jnp.asarray(w), jnp.asarray(mask))
    for a, rows in ((packed.forward, mask.T), (packed.backward, mask)):
        np.testing.assert_array_equal(a.matrix.metadata, words(rows))
        np.testing.assert_array_equal(to_dense(a.matrix), np.where(rows, w if a is packed.backward else w.T, 0))
    np.testing.assert_array_equal(unpack(packed), np.where(mask, w, 0))
    assert not packed.overfull


@pytest.mark.parametrize(
    "shape, orientation",
    [((4, 4), "both"), ((20, 12), "forward"), ((20, 12), "backward"), ((1, 3), "both"), ((33, 18), "both")],
)
def test_unpack_inverts_pack_at_any_size(shape, orientation):
    full = transposable(36, 36)[: shape[0], : shape[1]]
    w = np.where(full, np.random.default_rng(1).normal(size=shape), 0).astype(np.float32)
    packed = pack(jnp.asarray(w), orientation=orientation)
    np.testing.assert_array_equal(unpack(packed), w)
    for a in (packed.forward, packed.backward):
        assert a is None or (a.values.shape[1] % 8 == 0 and a.values.shape[1] == 8 * a.metadata.shape[1])


@pytest.mark.parametrize("kept", [(), (0,), (1,), (2,), (3,), *PAIRS])
def test_every_group_has_two_ascending_positions_and_zeros_fill_it(kept):
    w = np.full((1, 16), np.nan, np.float32)
    mask = np.zeros((1, 16), bool)
    mask[0, [4 + i for i in kept]] = True
    w[mask] = [5.0 + i for i in kept]
    a = pack(jnp.asarray(w), jnp.asarray(mask), orientation="backward").backward.matrix
    nibble = (int(a.metadata[0, 0]) >> 4) & 15
    first, second = nibble & 3, nibble >> 2
    assert first < second and set(kept) <= {first, second}
    found = dict(zip((first, second), map(float, a.values[0, 2:4]), strict=True))
    assert found == {i: 5.0 + i if i in kept else 0.0 for i in (first, second)}
    assert not np.isnan(np.asarray(a.values)).any()  # what the mask prunes is never read


def test_given_only_values_nonzeros_are_kept_and_nan_is_one():
    w = jnp.asarray([[0.0, jnp.nan, -0.0, 2.0]])
    packed = pack(w, orientation="backward")
    np.testing.assert_array_equal(packed.backward.values[0, :2], [jnp.nan, 2.0])
    assert int(packed.backward.matrix.metadata[0, 0]) & 15 == 1 | 3 << 2


@pytest.mark.parametrize(
    "group, kept",
    [
        ([1.0, -3.0, 2.0, 0.0], [1, 2]),
        ([2.0, 2.0, 2.0, 2.0], [0, 1]),
        ([1.0, 2.0, -2.0, 2.0], [1, 2]),
        ([1.0, np.inf, 3.0, np.nan], [1, 3]),
        ([np.nan, 5.0, 1.0, np.nan], [0, 3]),
    ],
)
def test_under_jit_the_two_largest_are_kept_and_a_flag_is_set(group, kept):
    packed = jax.jit(functools.partial(pack, orientation="backward"))(jnp.asarray([group]))
    assert packed.overfull
    expected = [value if i in kept else 0.0 for i, value in enumerate(group)]
    np.testing.assert_array_equal(unpack(packed)[0], np.array(expected, np.float32))


def test_the_flag_of_a_mask_under_jit():
    w, mask = all_pairs(4, 16)
    fits = jax.jit(functools.partial(pack, orientation="backward"))
    assert not fits(w, mask).overfull
    mask[2, 8:12] = True
    assert fits(w, mask).overfull


@pytest.mark.parametrize("given_mask", [False, True])
def test_on_the_host_the_error_names_the_group(given_mask):
    w, mask = all_pairs(8, 16)
    w = np.where(mask, w, 0)
    w[5, 8:12] = [1, 2, 3, 4]
    arguments = (jnp.ones((8, 16)), jnp.asarray(w != 0)) if given_mask else (jnp.asarray(w),)
    with pytest.raises(ValueError, match=r"entries 8 to 11 along the output axis \(row 5 .* keep 4 of 4"):
        pack(*arguments, orientation="backward")
    with pytest.raises(ValueError, match=r"entries 8 to 11 along the input axis \(column 5 .* keep 4 of 4"):
        pack(*(a.T for a in arguments), orientation="forward")


def test_a_mask_that_is_not_transposable_packs_forward_only():
    w = jnp.zeros((8, 8)).at[:2].set(1.0)
    assert pack(w, orientation="forward").backward is None
    with pytest.raises(ValueError, match="orientation='forward' only"):
        pack(w)


@pytest.mark.parametrize(
    "axes, shape", [("oi", (12, 8)), ("ioo", (8, 3, 4)), ("iio", (2, 4, 12)), ("bbio", (1, 1, 8, 12))]
)
def test_layouts(axes, shape):
    w = np.where(transposable(8, 12), np.arange(1, 97).reshape(8, 12), 0).astype(np.float32)
    leaf = w.T if axes == "oi" else w.reshape(shape)
    packed = pack(jnp.asarray(leaf), axes=axes)
    plain = pack(jnp.asarray(w))
    assert packed.matrix_shape == (8, 12)
    np.testing.assert_array_equal(unpack(packed), leaf)
    for mine, theirs in zip(jax.tree.leaves(packed), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_refusals():
    with refused("floating point numbers, got int32"):
        pack(jnp.zeros((4, 4), jnp.int32))
    with refused("hold 3 matrices"):
        pack(jnp.zeros((3, 4, 4)), axes="bio")
    with refused("orientation"):
        pack(jnp.zeros((4, 4)), orientation="input")
    with refused("mask has shape"):
        pack(jnp.zeros((4, 4)), jnp.zeros((4, 8), bool))
    with refused("pack it anew"):
        repack(pack(jnp.zeros((4, 4))), jnp.zeros((4, 8)))


def test_repack_takes_new_values_at_the_old_positions():
    mask = transposable(16, 20)
    generator = np.random.default_rng(0)
    old, new = generator.normal(size=(2, 16, 20)).astype(np.float32)
    packed = pack(jnp.asarray(old), jnp.asarray(mask))
    again = repack(packed, jnp.asarray(new, jnp.bfloat16))
    assert again.forward.values.dtype == jnp.bfloat16
    np.testing.assert_array_equal(unpack(again), np.where(mask, jnp.asarray(new, jnp.bfloat16), 0))
    np.testing.assert_array_equal(again.backward.metadata, packed.backward.metadata)


@pytest.mark.parametrize("pattern", ["1:4", "none"])
def test_what_fills_a_group_stays_zero(pattern):
    """Of a group that keeps fewer than two entries."""
    mask = np.eye(4, dtype=bool) if pattern == "1:4" else np.zeros((4, 4), bool)
    packed = pack(jnp.ones((4, 4)), jnp.asarray(mask))
    np.testing.assert_array_equal(unpack(repack(packed, 7 * jnp.ones((4, 4)))), 7.0 * mask)
    gradient = jax.grad(lambda p: jnp.sum(3 * unpack(p)))(packed)
    for side in (gradient.forward, gradient.backward):
        assert float(side.values.sum()) == 3 * mask.sum()


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpacked_bits(dtype):
    """Kept entries have the bits that they had; what was pruned is +0.0."""
    kept = np.array([-0.0, np.nan, np.inf, -np.inf, float(jnp.finfo(dtype).smallest_subnormal), -1.5, 0.0, 2.0])
    w = np.zeros((16, 4))
    w[::2] = np.resize(kept, (8, 4))
    w[1::2] = -0.0
    mask = np.zeros((16, 4), bool)
    mask[::2] = True
    w = jnp.asarray(w, dtype)
    expected = np.where(mask, np.asarray(as_bits(w)), 0)
    for chosen in (jnp.asarray(mask), None):
        packed = pack(w, chosen, orientation="forward")
        found = np.asarray(as_bits(unpack(packed)))
        if chosen is None:  # a kept -0.0 is a zero like any other
            expected = np.where(np.asarray(w, np.float64) == 0, 0, expected)
        np.testing.assert_array_equal(found, expected)


def test_the_two_largest_of_subnormal_numbers():
    w = np.array([[3, 1, 2, 4]], np.uint32).view(np.float32)
    packed = jax.jit(functools.partial(pack, orientation="backward"))(w)
    np.testing.assert_array_equal(as_bits(unpack(packed)), [[3, 0, 0, 4]])


def test_gradients_go_to_the_kept_entries():
    mask = transposable(16, 8)
    w, target = np.random.default_rng(0).normal(size=(2, 16, 8)).astype(np.float32)
    packed = pack(jnp.asarray(w), jnp.asarray(mask))
    for repacked in (lambda w: pack(w, jnp.asarray(mask)), lambda w: repack(packed, w)):
        gradient = jax.jit(jax.grad(lambda w, f=repacked: jnp.sum(unpack(f(w)) * target)))(w)
        np.testing.assert_array_equal(gradient, np.where(mask, target, 0))


def test_vmap_agrees_with_one_at_a_time():
    mask = np.stack([transposable(16, 8, seed) for seed in range(3)])
    w = np.random.default_rng(0).normal(size=(3, 16, 8)).astype(np.float32)
    together = jax.vmap(pack)(w, mask)
    for i in range(3):
        alone = pack(jnp.asarray(w[i]), jnp.asarray(mask[i]))
        for many, one in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(many[i], one)
    np.testing.assert_array_equal(jax.vmap(unpack)(together), np.where(mask, w, 0))


@settings(max_examples=15, deadline=None)
@given(hnp.arrays(np.float32, (5, 16), elements=st.sampled_from([0.0, 1.0, -2.0, 3.0, np.inf])))
def test_any_values_give_the_two_largest_of_each_group(w):
    packed = jax.jit(functools.partial(pack, orientation="backward"))(w)
    groups = w.reshape(-1, 4)
    order = np.argsort(-np.abs(groups), axis=1, kind="stable")
    expected = groups.copy()
    np.put_along_axis(expected, order[:, 2:], 0.0, axis=1)
    np.testing.assert_array_equal(unpack(packed), expected.reshape(5, 16))
    assert bool(packed.overfull) == bool(((groups != 0).sum(axis=1) > 2).any())


@pytest.mark.parametrize("orientation", ["forward", "both"])
def test_compiled_packing_neither_sorts_nor_gathers(orientation):
    program = jax.jit(functools.partial(pack, orientation=orientation)).lower(jnp.zeros((64, 64))).compile().as_text()
    operations = set(re.findall(r"[ )]([a-z-]+)\(", program))
    assert "select" in operations  # the names are read right
    assert not operations & {"sort", "gather", "scatter", "custom-call", "while", "dynamic-slice"}
