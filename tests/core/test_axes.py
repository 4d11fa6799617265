import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nm_jax import NM, TransposableNM, Unstructured, parse_pattern
from nm_jax._core.axes import Tiling, check_axes, matrix_groups, same_groups

SPECS = ["io", "oi", "bbio", "ioo", "iio", "bio", "oibb", "oib", "iiio", "obi", "i", "ib", "ibo", "bob" + "i", "iioo"]


def element(leaf, axes, batch, row, col):
    """The entry of a leaf at flattened (batch, contraction, output) positions, by nested loops over indices."""
    sizes = {letter: [s for s, a in zip(leaf.shape, axes, strict=True) if a == letter] for letter in "bio"}
    positions = {"b": batch, "i": row, "o": col}
    where = {k: list(np.unravel_index(positions[k], sizes[k])) if sizes[k] else [] for k in "bio"}
    return leaf[tuple(where[a].pop(0) for a in axes)]


@pytest.mark.parametrize("axes", SPECS)
@pytest.mark.parametrize(("rows", "cols"), [(2, 2), (2, 1), (1, 2), (3, 3)])
def test_tiles_hold_the_right_entries_and_come_back(axes, rows, cols):
    shape = tuple(range(2, 2 + len(axes)))
    leaf = np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)
    tiling = Tiling(shape, axes, rows, cols)
    cut = np.asarray(tiling.split(jnp.asarray(leaf)))
    batch, tall, wide = tiling.matrix_shape
    assert batch * tall * wide == leaf.size
    assert cut.shape == (rows, cols, batch, -(-tall // rows), -(-wide // cols))
    for b, i, o in itertools.product(range(batch), range(tall), range(wide)):
        assert cut[i % rows, o % cols, b, i // rows, o // cols] == element(leaf, axes, b, i, o)
    assert (cut != 0).sum() == leaf.size  # the rest is padding
    np.testing.assert_array_equal(tiling.join(jnp.asarray(cut)), leaf)
    valid = tiling.valid()
    assert (valid is None) == (cut.size == leaf.size)
    if valid is not None:
        np.testing.assert_array_equal(valid, cut != 0)


def test_under_jit_and_vmap():
    tiling = Tiling((3, 8, 8), "bio", 4, 4)
    leaf = jax.random.normal(jax.random.key(0), (5, 3, 8, 8))
    plain = jnp.stack([tiling.join(tiling.split(x)) for x in leaf])
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda x: tiling.join(tiling.split(x))))(leaf), plain)


def test_ragged_sizes_are_named():
    assert Tiling((6, 8), "io", 4, 4).ragged == (("contraction", 6, 4),)
    assert Tiling((6, 6), "io", 4, 1).ragged == (("contraction", 6, 4),)
    assert Tiling((8, 6), "oi", 4, 4).ragged == (("contraction", 6, 4),)
    assert Tiling((6, 7), "io", 4, 4).ragged == (("contraction", 6, 4), ("output", 7, 4))
    assert Tiling((8, 8), "io", 4, 4).ragged == ()


def test_tiling_of_a_pattern():
    assert Tiling.of((8, 16), "io", NM(2, 4)) == Tiling((8, 16), "io", 4, 1)
    assert Tiling.of((8, 16), "io", TransposableNM(2, 4)) == Tiling((8, 16), "io", 4, 4)
    assert Tiling.of((2, 8, 16), "bio", Unstructured(0.5)) == Tiling((2, 8, 16), "iii", 256, 1)


def test_groups_are_counted_along_both_axes():
    mask = np.zeros((8, 8), bool)
    mask[:3, 0] = True
    mask[5, 4:8] = True
    contraction, output = matrix_groups(jnp.asarray(mask), "io", 4)
    assert contraction.max() == 3
    assert output.max() == 4
    contraction, output = matrix_groups(jnp.asarray(mask), "oi", 4)
    assert (contraction.max(), output.max()) == (4, 3)


@pytest.mark.parametrize("pattern", ["2:4", "2:4-T", "US-0.5"])
@pytest.mark.parametrize("shape", [(4, 2, 4), (2, 4, 8), (4, 4, 6), (1, 8, 4)])
def test_the_same_groups_are_told_by_their_entries(shape, pattern):
    """Against the sets of entries that share a tile; where sizes are not whole tiles, some hold fewer."""
    pattern = parse_pattern(pattern)
    index = np.arange(np.prod(shape)).reshape(shape)

    def tiles(axes):
        tiling = Tiling.of(shape, axes, pattern)
        if tiling.ragged:
            return None
        cut = np.asarray(tiling.split(index)).reshape(tiling.rows, tiling.cols, -1)
        lines = [*np.moveaxis(cut, -1, 0).swapaxes(1, 2).reshape(-1, tiling.rows)]
        if tiling.cols > 1:
            lines += [*np.moveaxis(cut, -1, 0).reshape(-1, tiling.cols)]
        return {frozenset(map(int, line)) for line in lines}

    letters = ["".join(axes) for axes in itertools.product("iob", repeat=3)]
    whole = [axes for axes in letters if "i" in axes and tiles(axes)]
    for axes, others in itertools.product(whole, whole):
        assert same_groups(shape, axes, others, pattern) == (tiles(axes) == tiles(others)), (axes, others)


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        ("ix", (4, 4), "unknown letters 'x'"),
        ("io", (4, 4, 4), "names 2 dimensions"),
        ("oo", (4, 4), "no 'i'"),
        ("", (), "no 'i'"),
        (7, (4,), "must be a string"),
    ],
)
def test_wrong_axes(axes, shape, message):
    with pytest.raises(ValueError, match=message):
        check_axes(axes, shape)
