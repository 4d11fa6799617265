"""What training costs, as its docstring says: bytes of the state, and what a step between refreshes computes."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.extend import core

import nm_jax as nm

PARAMS = {"kernel": jnp.ones((32, 64)), "half": {"kernel": jnp.ones((32, 64), jnp.bfloat16)}, "bias": jnp.ones(64)}
WEIGHTS = 2 * 32 * 64


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_a_dense_copy_and_a_byte_of_mask_for_each_sparse_weight():
    state = nm.sparse_training(optax.sgd(0.1), "2:4").init(PARAMS)
    assert nbytes(state.dense) == 4 * WEIGHTS
    assert nbytes(state.masks) == WEIGHTS
    assert nbytes(state) == nbytes((state.dense, state.masks, state.stats, state.step, state.inner))
    assert nbytes(state.stats) < 2 * 100  # some numbers for each leaf
    fixed = nm.sparse_training(optax.sgd(0.1), "2:4", refresh_every=None).init(PARAMS)
    assert fixed.dense is None and nbytes(fixed.masks) == WEIGHTS


@pytest.mark.parametrize(("pattern", "products"), [("2:4", 1), ("2:4-T", 2)])
def test_positions_take_an_eighth_of_a_byte_for_each_weight_and_product(pattern, products):
    tx = nm.sparse_training(optax.sgd(0.1), pattern, packed=True)
    state = jax.eval_shape(tx.init, PARAMS)
    plain = jax.eval_shape(nm.sparse_training(optax.sgd(0.1), pattern).init, PARAMS)
    assert nbytes(state.packed) == products * WEIGHTS / 8
    assert nbytes(state) - nbytes(state.packed) == nbytes(plain)


def test_reading_a_state_copies_nothing():
    state = nm.sparse_training(optax.sgd(0.1), "2:4").init(PARAMS)
    assert nm.masks(state)["kernel"] is state.masks["kernel"]
    assert nm.masks(state, PARAMS)["kernel"] is state.masks["kernel"]
    assert nm.dense_params(state)["kernel"] is state.dense["kernel"]
    assert nm.dense_params(state, PARAMS)["bias"] is PARAMS["bias"]


def operations(jaxpr):
    """The names of all primitives of arrays with as many entries as a weight, without those inside loops."""
    for eqn in jaxpr.eqns:
        inner = [p for value in eqn.params.values() for p in (value if isinstance(value, tuple) else (value,))]
        bodies = [p.jaxpr if isinstance(p, core.ClosedJaxpr) else p for p in inner]
        bodies = [body for body in bodies if isinstance(body, core.Jaxpr)]
        if eqn.primitive.name != "while":
            for body in bodies:
                yield from operations(body)
        if not bodies and any(getattr(var.aval, "size", 0) >= 32 * 64 for var in eqn.invars):
            yield eqn.primitive.name


@pytest.mark.parametrize("pattern", ["2:4", "4:8-T", "US-0.5"])
def test_steps_between_refreshes_add_elementwise_work_only(pattern):
    """What finds masks, or looks for drift, is inside loops of no turn; sums are those of the decay."""
    tx = nm.sparse_training(optax.sgd(0.1), pattern)
    program = jax.make_jaxpr(tx.update)(PARAMS, jax.eval_shape(tx.init, PARAMS), PARAMS)
    assert any(eqn.primitive.name == "while" for eqn in program.eqns)
    found = set(operations(program.jaxpr))
    elementwise = {"add", "sub", "mul", "neg", "integer_pow", "square", "select_n", "not", "convert_element_type"}
    elementwise |= {"broadcast_in_dim", "copy_p", "copy", "stop_gradient", "eq", "ne", "abs", "and", "or"}
    assert "select_n" in found and found - elementwise <= {"reduce_sum"}, found
