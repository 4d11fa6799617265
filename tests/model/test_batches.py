"""Batches have one reading, or are refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from nm_jax._model._batches import argument_tuples

x = jnp.ones((4, 8))


@pytest.mark.parametrize(
    "batches, expected",
    [
        ([x, (x, x)], [(x,), (x, x)]),
        ((x,), [(x,)]),
        (((x, x), (x,)), [(x, x), (x,)]),
        (iter([x]), [(x,)]),
        ([{"ids": x}], [({"ids": x},)]),
        ([], []),
    ],
    ids=["list", "one", "tuples", "iterator", "dict as an input", "none"],
)
def test_a_batch_is_a_tuple_of_arguments(batches, expected):
    assert list(argument_tuples(batches)) == expected


@pytest.mark.parametrize(
    "batches, message",
    [
        (x, r"one array of shape \(4, 8\), and not a list of batches: give \[x\] for one batch"),
        (np.ones((4, 8)), "one array of shape"),
        ({"ids": x}, r"a dict, and not a list of batches: give \[x\]"),
        (3, "a int, and not a list"),
        ((x, x), r"2 inputs, which may be one batch or 2: give \[\(a, b\)\] for one .* or \[a, b\] for 2 batches"),
        (({"ids": x}, x, x, x), r"give \[\(a, b, c, \.\.\.\)\]"),
    ],
)
def test_what_may_be_two_things_is_refused(batches, message):
    with pytest.raises(ValueError, match=f"held_out is .*{message}"):
        argument_tuples(batches, "held_out")
