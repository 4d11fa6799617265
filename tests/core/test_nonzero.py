"""One meaning of "nonzero", on the bits: subnormal weights are weights everywhere."""

import fractions

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nm_jax as nm
from nm_jax._core.nonzero import nonzero

FLOATS = [
    jnp.float32,
    jnp.bfloat16,
    jnp.float16,
    jnp.float8_e4m3fn,
    jnp.float8_e5m2,
    jnp.float8_e4m3fnuz,
    jnp.float8_e4m3b11fnuz,
    jnp.float8_e8m0fnu,
]


def is_zero(value):
    """Exactly, in Python."""
    number = float(value)
    return np.isfinite(number) and fractions.Fraction(number) == 0


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize("where", ["host", "device", "jit"])
def test_every_bit_pattern(dtype, where):
    """Minus zero, subnormals, NaN, dtypes without a minus zero and without a zero."""
    dtype = np.dtype(dtype)
    bits = np.arange(1 << 8 * min(dtype.itemsize, 2), dtype=f"u{min(dtype.itemsize, 2)}")
    if dtype.itemsize == 4:
        bits = np.concatenate([bits.astype("u4"), bits.astype("u4") << 16])
    values = bits.view(dtype)
    found = {"host": nonzero, "device": lambda x: nonzero(jnp.asarray(x)), "jit": jax.jit(nonzero)}[where](values)
    np.testing.assert_array_equal(found, [not is_zero(value) for value in values])
    assert isinstance(found, np.ndarray) == (where == "host")


def test_float64_and_integers():
    np.testing.assert_array_equal(nonzero(np.array([0.0, -0.0, 5e-324, np.nan, 1.0])), [0, 0, 1, 1, 1])
    for values in ([0, 3, -1], [False, True, True]):
        np.testing.assert_array_equal(nonzero(np.array(values)), [0, 1, 1])
        np.testing.assert_array_equal(nonzero(jnp.array(values)), [0, 1, 1])


@pytest.mark.parametrize(
    ("dtype", "value"), [("float32", 1e-42), ("float32", -1e-40), ("float32", -0.0), ("bfloat16", -1e-40)]
)
def test_all_agree_on_weights_of_the_smallest_size(tmp_path, dtype, value):
    """`verify`, `pattern_violations`, `fit_masks`, `choose_patterns`, a state and a checkpoint, on the same weights."""
    kept = np.arange(64).reshape(8, 8) % 4 < 2 if value else np.zeros((8, 8), bool)
    rules = [("kernel", "2:4", "oi")]
    fits = {"kernel": jnp.asarray(np.where(kept, value, 0).astype(jnp.dtype(dtype)))}
    full = {"kernel": jnp.asarray(np.full((8, 8), value).astype(jnp.dtype(dtype)))}

    assert nm.verify(fits, rules).ok
    assert nm.verify(full, rules).ok == (value == 0)
    np.testing.assert_array_equal(nm.verify(full, rules)["kernel"].kept, float(value != 0))
    np.testing.assert_array_equal(nm.fit_masks(fits, rules)["kernel"], kept)
    (violations,) = nm.pattern_violations(full, rules)
    assert (violations.sparsity, violations.tiles, violations.weights) == ((0, 1, 0.5) if value else (1, 0, 0))
    (chosen,) = nm.choose_patterns(full, [("kernel", "4:8", "oi")], 0)
    assert chosen[1] == (None if value else nm.NM(1, 8))

    for name, params in (("fits", fits), ("full", full)):
        path = tmp_path / f"{name}.safetensors"
        nm.save_checkpoint(path, fits, rules=rules)
        weight = np.asarray(params["kernel"]).tobytes()  # the last bytes of the file
        path.write_bytes(path.read_bytes()[: -len(weight)] + weight)
        assert nm.verify_checkpoint(path).ok == (name == "fits" or value == 0)


@pytest.mark.parametrize("value", [1e-42, -1e-40])
def test_edits_of_the_smallest_size_reach_the_dense_weights(value):
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 8))}
    state = nm.sparse_training(optax.sgd(0.1), "2:4").init(params)
    edited = jnp.asarray(np.full((8, 8), value, np.float32))
    dense = nm.dense_params(nm.with_params(state, {"kernel": edited}), params)["kernel"]
    np.testing.assert_array_equal(np.asarray(dense).view("u4"), np.asarray(edited).view("u4"))
