"""The training loops of Linen, NNX, Equinox and plain JAX, unchanged but for the optimiser, over 200 updates.

Sparsity is measured here by slicing numpy arrays along the dimensions that each layer contracts and produces: no code
of the library is involved.
"""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import nm_jax as nm
from tests.helpers import worst_group

STEPS = 200
X = jax.random.normal(jax.random.key(0), (16, 8, 8, 4))
Y = jax.random.randint(jax.random.key(1), (16,), 0, 8)


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()


def assert_transposable(weight, contracted, produced):
    """No 4 consecutive entries along the contracted, nor along the produced dimensions hold more than 2 nonzeros;
    several dimensions are one, in their order."""
    weight = np.asarray(weight, np.float32)
    for dims in (contracted, produced):
        rest = [k for k in range(weight.ndim) if k not in dims]
        flat = weight.transpose(*dims, *rest).reshape(-1, *[weight.shape[k] for k in rest])
        assert worst_group(flat, 0, 4) <= 2
    assert (weight != 0).mean() == pytest.approx(0.5, abs=0.02)


# The dimensions that are contracted and produced, by the name of the layer.
FLAX_DIMENSIONS = {
    "conv": ((2,), (3,)),
    "dense": ((0,), (1,)),
    "query": ((0,), (1, 2)),
    "key": ((0,), (1, 2)),
    "value": ((0,), (1, 2)),
    "out": ((0, 1), (2,)),
    "experts": ((1,), (2,)),
}
RULES = [("stem|head", None), ("experts", "2:4-T", "bio"), ("kernel", "2:4-T")]


def check_flax(kernels):
    """kernels: path -> array; every layer of the table must be among them."""
    seen = set()
    for path, kernel in kernels.items():
        path = path.removesuffix("/value")  # the array inside a variable of NNX
        for name, (contracted, produced) in FLAX_DIMENSIONS.items():
            if name in path.split("/") and "bias" not in path:
                assert_transposable(kernel, contracted, produced)
                seen.add(name)
    assert seen == set(FLAX_DIMENSIONS)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        x = nn.relu(nn.Conv(16, (3, 3), strides=2, name="conv")(x))
        x = x.reshape(len(x), -1, 16)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(x)
        experts = self.param("experts", nn.initializers.lecun_normal(batch_axis=0), (2, 16, 16))
        x = x + nn.relu(jnp.einsum("bti,eio->bto", x, experts))
        x = nn.relu(nn.Dense(32, name="dense")(x.mean(1)))
        return nn.Dense(10, name="head")(x)


def paths(tree):
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(k, simple=True, separator="/"): leaf for k, leaf in flat}


def test_linen_train_state():
    model = LinenNet()
    tx = nm.sparse_training(optax.adamw(3e-3), RULES)
    state = TrainState.create(apply_fn=model.apply, params=model.init(jax.random.key(0), X)["params"], tx=tx)

    @jax.jit
    def train_step(state):
        def loss_fn(params):
            return cross_entropy(state.apply_fn({"params": params}, X))

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(STEPS):
        state, loss = train_step(state)
        losses.append(float(loss))
        check_flax(paths(state.params))
    assert losses[-1] < 0.3 * losses[0]
    assert train_step._cache_size() <= 2  # the step of a new TrainState is a Python integer, later an array
    assert nm.verify(state.params, RULES).ok
    assert (np.asarray(state.params["stem"]["kernel"]) != 0).all()
    # The same rules fit the whole collection of variables.
    assert nm.verify({"params": state.params}, RULES).ok


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(4, 8, (3, 3), rngs=rngs)
        self.conv = nnx.Conv(8, 16, (3, 3), strides=2, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs)
        self.experts = nnx.Param(jax.random.normal(rngs.params(), (2, 16, 16)) / 4)
        self.dense = nnx.Linear(16, 32, rngs=rngs)
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv(nnx.relu(self.stem(x))))
        x = x.reshape(len(x), -1, 16)
        x = x + self.attention(x)
        x = x + nnx.relu(jnp.einsum("bti,eio->bto", x, self.experts[...]))
        return self.head(nnx.relu(self.dense(x.mean(1))))


@pytest.mark.slow
def test_nnx_optimizer():
    model = NnxNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, nm.sparse_training(optax.adamw(3e-3), RULES), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: cross_entropy(model(X)))(model)
        optimizer.update(model, grads)
        return loss

    losses = []
    for _ in range(STEPS):
        losses.append(float(train_step(model, optimizer)))
        check_flax(paths(nnx.state(model, nnx.Param)))
    assert losses[-1] < 0.3 * losses[0]
    params = nnx.state(model, nnx.Param)
    assert nm.verify(params, RULES, dense=nm.dense_params(optimizer.opt_state)).ok
    masks = nm.masks(optimizer.opt_state)
    masked = nm.apply_masks(params, masks)
    jax.tree.map(np.testing.assert_array_equal, masked, params)
    sparse = nm.sparse_params(optimizer.opt_state, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), sparse, params)
    assert nm.refresh_stats(optimizer.opt_state).retained.min() > 0.5
    computed = nm.compute_masks(params, RULES)
    assert nm.verify(computed, RULES).ok
    nm.with_params(optimizer.opt_state, params)


class EqxNet(eqx.Module):
    conv: eqx.nn.Conv2d
    attention: eqx.nn.MultiheadAttention
    dense: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.conv = eqx.nn.Conv2d(4, 16, 3, stride=2, padding=1, key=keys[0])
        self.attention = eqx.nn.MultiheadAttention(4, 16, key=keys[1])
        self.dense = eqx.nn.Linear(16, 32, key=keys[2])
        self.head = eqx.nn.Linear(32, 10, key=keys[3])

    def __call__(self, x):
        x = jax.nn.relu(self.conv(jnp.moveaxis(x, -1, 0))).reshape(16, -1).T
        x = x + self.attention(x, x, x)
        return self.head(jax.nn.relu(self.dense(x.mean(0))))


@pytest.mark.slow
def test_equinox():
    model = EqxNet(jax.random.key(0))
    tx = nm.sparse_training(optax.adamw(3e-3), [("head", None), ("weight", "2:4-T")])
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def train_step(model, opt_state):
        loss, grads = eqx.filter_value_and_grad(lambda m: cross_entropy(jax.vmap(m)(X)))(model)
        updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), opt_state, loss

    losses = []
    for _ in range(STEPS):
        model, opt_state, loss = train_step(model, opt_state)
        losses.append(float(loss))
        assert_transposable(model.conv.weight, (1,), (0,))
        for linear in (model.dense, model.attention.query_proj, model.attention.output_proj):
            assert_transposable(linear.weight, (1,), (0,))
    assert losses[-1] < 0.3 * losses[0]
    assert nm.verify(eqx.filter(model, eqx.is_array), "2:4-T")["dense/weight"].ok
    # A whole module, functions and all, is a tree too.
    masks = nm.compute_masks(model, [("dense", "2:4-T")])
    assert nm.verify(nm.apply_masks(model, masks), [("dense", "2:4-T")]).ok


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_plain_dicts(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "conv": jax.random.normal(keys[0], (3, 3, 4, 16), dtype) / 6,
        "experts": jax.random.normal(keys[1], (2, 16, 16), dtype) / 4,
        "head": jax.random.normal(keys[2], (16, 10), dtype) / 4,
    }
    tx = nm.sparse_training(optax.adam(3e-3), [("conv", "2:4-T", "bbio"), ("experts", "2:4-T", "bio")])
    opt_state = tx.init(params)

    def apply(params):
        dims = ("NHWC", "HWIO", "NHWC")
        x = jax.nn.relu(
            jax.lax.conv_general_dilated(X.astype(dtype), params["conv"], (2, 2), "SAME", dimension_numbers=dims)
        )
        x = x + jax.nn.relu(jnp.einsum("bhwi,eio->bhwo", x, params["experts"]))
        return (x.mean((1, 2)) @ params["head"]).astype(jnp.float32)

    @jax.jit
    def train_step(params, opt_state):
        loss, grads = jax.value_and_grad(lambda p: cross_entropy(apply(p)))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    losses = []
    for _ in range(STEPS):
        params, opt_state, loss = train_step(params, opt_state)
        losses.append(float(loss))
        assert_transposable(params["conv"], (2,), (3,))
        assert_transposable(params["experts"], (1,), (2,))
    assert losses[-1] < 0.6 * losses[0]
    assert train_step._cache_size() == 1
