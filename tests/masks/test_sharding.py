"""Parameters sharded over 8 virtual devices: the masks of one device, and no weight moves to find them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nm_jax as nm

MOVES = r"all-gather|all-to-all|collective-permute"
SPECS = {
    "rows": P("x"),
    "columns": P(None, "y"),
    "both": P("x", "y"),
    "both swapped": P("y", "x"),
    "rows over both": P(("x", "y")),
    "replicated": P(),
}
RULES = [("bias", None), ("conv", "2:4-T", "bbio"), ("query", "2:4-T", "ioo"), ("plain", "2:4"), ("kernel", "2:4-T")]


def mesh(kind):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind), devices=jax.devices()[:8])


def make_params():
    keys = jax.random.split(jax.random.key(0), 5)
    return {
        "a": {"kernel": jax.random.normal(keys[0], (64, 128)), "bias": jnp.zeros(128)},
        "b": {"kernel": jax.random.normal(keys[1], (128, 64))},
        "conv": jax.random.normal(keys[2], (3, 3, 32, 64)),
        "query": jax.random.normal(keys[3], (64, 8, 16)),
        "plain": jax.random.normal(keys[4], (64, 64)),
    }


def shardings(the_mesh, spec):
    return {
        "a": {"kernel": NamedSharding(the_mesh, spec), "bias": NamedSharding(the_mesh, P())},
        "b": {"kernel": NamedSharding(the_mesh, spec)},
        "conv": NamedSharding(the_mesh, P(None, None, *spec)),
        "query": NamedSharding(the_mesh, spec),
        "plain": NamedSharding(the_mesh, spec),
    }


def on_one_device(function, *args):
    return jax.tree.map(np.asarray, jax.jit(function)(*args))


KINDS = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(AxisType.Auto, id="auto"),
        pytest.param(AxisType.Explicit, id="explicit", marks=pytest.mark.slow),
    ],
)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", SPECS)
def test_masks_are_those_of_one_device_and_nothing_moves(kind, spec):
    params, the_mesh = make_params(), mesh(kind)

    def find(params):
        return nm.compute_masks(params, RULES)

    expected = on_one_device(find, params)
    with jax.set_mesh(the_mesh):
        sharded = jax.device_put(params, shardings(the_mesh, SPECS[spec]))
        compiled = jax.jit(find).lower(sharded).compile()
        assert not re.findall(MOVES, compiled.as_text())
        found = compiled(sharded)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        where = found["a"]["kernel"].sharding
        assert where.is_equivalent_to(sharded["a"]["kernel"].sharding, 2)


@pytest.mark.slow
@KINDS
def test_the_report_of_sharded_leaves(kind):
    params, the_mesh = make_params(), mesh(kind)
    _, expected = nm.compute_masks(params, RULES, return_report=True)
    with jax.set_mesh(the_mesh):
        sharded = jax.device_put(params, shardings(the_mesh, P("x", "y")))
        _, report = jax.jit(lambda p: nm.compute_masks(p, RULES, return_report=True))(sharded)
    assert str(report) == str(expected)
    assert re.search(r"optimal to \de-0\d, proved", str(report))


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("spec", ["rows", "columns", "both"])
def test_a_training_step_moves_no_weights_to_refresh(kind, spec):
    """The whole update, refresh included, on gradients sharded as the parameters are."""
    params, the_mesh = make_params(), mesh(kind)
    tx = nm.sparse_training(optax.adam(0.1), RULES, refresh_every=2)

    def step(params, state):
        updates, state = tx.update(jax.tree.map(lambda p: 0.1 * p + 0.01, params), state, params)
        return optax.apply_updates(params, updates), state

    expected, expected_state = params, tx.init(params)
    for _ in range(4):
        expected, expected_state = jax.jit(step)(expected, expected_state)

    with jax.set_mesh(the_mesh):
        sharded = jax.device_put(params, shardings(the_mesh, SPECS[spec]))
        state = jax.jit(tx.init)(sharded)
        assert state.dense["a"]["kernel"].sharding.is_equivalent_to(sharded["a"]["kernel"].sharding, 2)
        assert not re.findall(MOVES, jax.jit(step).lower(sharded, state).compile().as_text())
        for _ in range(4):
            sharded, state = jax.jit(step)(sharded, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6), sharded, expected)
    np.testing.assert_allclose(nm.refresh_stats(state).flip_rate, nm.refresh_stats(expected_state).flip_rate, rtol=1e-5)
    np.testing.assert_allclose(nm.refresh_stats(state).retained, nm.refresh_stats(expected_state).retained, rtol=1e-5)


@KINDS
@pytest.mark.parametrize(
    ("axes", "shape", "spec", "message"),
    [
        ("io", (24, 16), P("x"), "w: the contraction axis is sharded in pieces of 6, which 4 does not divide"),
        ("io", (16, 12), P(None, "y"), "w: the output axis is sharded in pieces of 6, which 4 does not divide"),
        ("oi", (24, 16), P("x"), "w: the output axis is sharded in pieces of 6"),
        ("iio", (8, 12, 16), P(None, "x"), "w: the contraction axis is sharded in pieces of 3"),
    ],
)
def test_shards_that_end_inside_a_tile_are_named(kind, axes, shape, spec, message):
    weight, the_mesh = jax.random.normal(jax.random.key(0), shape), mesh(kind)
    expected = nm.compute_masks({"w": weight}, [("w", "2:4-T", axes)])
    with jax.set_mesh(the_mesh):
        sharded = {"w": jax.device_put(weight, NamedSharding(the_mesh, spec))}
        with pytest.warns(UserWarning, match=message):
            found = nm.compute_masks(sharded, [("w", "2:4-T", axes)])
    np.testing.assert_array_equal(found["w"], expected["w"])


@pytest.mark.parametrize(
    ("axes", "shape", "spec"),
    [
        ("iio", (8, 6, 16), P("y")),  # whole heads: 4 * 6 entries in a row
        ("iio", (4, 16, 16), P(None, "x")),  # parts of heads: 4 entries in a row
        ("ioo", (16, 4, 8), P(None, "x")),
        ("bio", (8, 6, 16), P("x")),
        ("oibb", (16, 16, 3, 3), P("x", "y")),
    ],
)
def test_shards_that_end_between_tiles_stay(axes, shape, spec):
    weight, the_mesh = jax.random.normal(jax.random.key(0), shape), mesh(AxisType.Auto)
    rules = [("w", "2:4-T", axes)]
    partial = "pad" if axes == "bio" else "skip"
    expected = nm.compute_masks({"w": weight}, rules, partial=partial)
    with jax.set_mesh(the_mesh):
        sharded = {"w": jax.device_put(weight, NamedSharding(the_mesh, spec))}
        find = jax.jit(lambda p: nm.compute_masks(p, rules, partial=partial))
        assert not re.findall(MOVES, find.lower(sharded).compile().as_text())
        np.testing.assert_array_equal(find(sharded)["w"], expected["w"])


def test_without_a_mesh_in_context():
    """Shardings that come with the arguments alone, as most training loops have them."""
    params, the_mesh = make_params(), mesh(AxisType.Auto)
    expected = on_one_device(lambda p: nm.compute_masks(p, RULES), params)
    sharded = jax.device_put(params, shardings(the_mesh, P("x", "y")))
    find = jax.jit(lambda p: nm.compute_masks(p, RULES))
    assert not re.findall(MOVES, find.lower(sharded).compile().as_text())
    jax.tree.map(np.testing.assert_array_equal, find(sharded), expected)
    jax.tree.map(np.testing.assert_array_equal, nm.compute_masks(sharded, RULES), expected)


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(check_vma):
    """In a manual region a leaf is what the device holds."""
    weight, the_mesh = jax.random.normal(jax.random.key(0), (64, 32)), mesh(AxisType.Auto)
    expected = nm.compute_masks({"w": weight}, [("w", "2:4-T")])["w"]
    local = jax.shard_map(
        lambda w: nm.compute_masks({"w": w}, [("w", "2:4-T")])["w"],
        mesh=the_mesh,
        in_specs=P("x", "y"),
        out_specs=P("x", "y"),
        check_vma=check_vma,
    )
    np.testing.assert_array_equal(jax.jit(local)(weight), expected)


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_training_step_inside_shard_map(check_vma):
    """Every device trains the part that it holds; the refresh is due on the second step."""
    weight, the_mesh = jax.random.normal(jax.random.key(0), (64, 32)), mesh(AxisType.Auto)
    tx = nm.sparse_training(optax.sgd(0.1), [("w", "2:4-T")], refresh_every=2)

    def train(w):
        params, state = {"w": w}, tx.init({"w": w})
        for _ in range(2):
            updates, state = tx.update({"w": jnp.roll(w, 1, axis=0)}, state, params)
            params = optax.apply_updates(params, updates)
        return params["w"]

    specs = {"in_specs": P("x", "y"), "out_specs": P("x", "y"), "check_vma": check_vma}
    found = jax.jit(jax.shard_map(train, mesh=the_mesh, **specs))(weight)
    parts = [[jax.jit(train)(part) for part in jnp.split(rows, 2, axis=1)] for rows in jnp.split(weight, 4)]
    np.testing.assert_allclose(found, np.block(parts), rtol=1e-6)


def test_nan_on_one_device_is_flagged_everywhere():
    the_mesh = mesh(AxisType.Auto)
    weight = jnp.ones((64, 32)).at[50, 3].set(jnp.nan)
    sharded = {"w": jax.device_put(weight, NamedSharding(the_mesh, P("x", "y")))}
    _, report = jax.jit(lambda p: nm.compute_masks(p, [("w", "2:4-T")], return_report=True))(sharded)
    assert report["w"].nan
    with pytest.raises(ValueError, match="w: scores are NaN"):
        nm.compute_masks(sharded, [("w", "2:4-T")])


def test_unstructured_masks_are_those_of_one_device():
    weight, the_mesh = jax.random.normal(jax.random.key(0), (64, 32)), mesh(AxisType.Auto)
    expected = nm.compute_masks({"w": weight}, [("w", "US-0.75")])["w"]
    sharded = jax.device_put(weight, NamedSharding(the_mesh, P("x", "y")))
    np.testing.assert_array_equal(nm.compute_masks({"w": sharded}, [("w", "US-0.75")])["w"], expected)


@pytest.mark.unchecked
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("shape, axes", [pytest.param((16, 32), "io", marks=pytest.mark.slow), ((2, 8, 32), "iio")])
def test_a_reconstruction_stays_sharded_by_its_outputs(kind, shape, axes):
    draw = np.random.default_rng(0)
    w = jnp.asarray(draw.normal(size=shape), jnp.float32)
    gram = nm.Gram.from_inputs(jnp.asarray(draw.normal(size=(100, 16)) @ draw.normal(size=(16, 16)), jnp.float32), axes)
    mask = jnp.asarray(draw.random(shape) < 0.5)
    expected = nm.reconstruct(w, gram, mask, bias=jnp.zeros(32))
    the_mesh = mesh(kind)
    with jax.set_mesh(the_mesh):
        outputs = NamedSharding(the_mesh, P(*[None] * (len(shape) - 1), "x"))
        whole = NamedSharding(the_mesh, P())
        args = jax.device_put((w, gram, mask), (outputs, whole, outputs))
        bias = jax.device_put(jnp.zeros(32), NamedSharding(the_mesh, P("x")))
        found = nm.reconstruct(*args, bias=bias)
        assert not re.findall(MOVES, jax.jit(nm.reconstruct).lower(*args, bias=bias).compile().as_text())
        others = {
            "error": nm.output_error(args[0], found.weight, args[1]),
            "bias fix": nm.absorb_mean(args[0], args[2], "2:4", axes),
            "Wanda": nm.wanda(args[0], args[1]),
            "OBC": nm.obc(args[0], args[1]),
        }
    for leaf in (found.weight, others["bias fix"], others["Wanda"], others["OBC"]):
        assert leaf.sharding.is_equivalent_to(outputs, len(shape))
    np.testing.assert_allclose(found.weight, expected.weight, atol=1e-4)
    np.testing.assert_allclose(found.bias, expected.bias, atol=1e-4)
    np.testing.assert_allclose(found.after, expected.after, rtol=1e-3)
    np.testing.assert_allclose(others["error"], nm.output_error(w, expected.weight, gram), rtol=1e-3)
    np.testing.assert_allclose(others["bias fix"], nm.absorb_mean(w, mask, "2:4", axes), atol=1e-6)
    np.testing.assert_allclose(others["Wanda"], nm.wanda(w, gram), rtol=1e-5)
    np.testing.assert_allclose(others["OBC"], nm.obc(w, gram), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("images", [P("x"), P()], ids=["data", "outputs"])
def test_a_sharded_model_is_converted_as_on_one_device(kind, images):
    """Over images, or over the outputs of the kernels."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "conv": jax.random.normal(keys[0], (3, 3, 4, 16)),
        "layers": jax.random.normal(keys[1], (2, 16, 16)) / 4,
        "head": {"kernel": jax.random.normal(keys[2], (16, 32)), "bias": jnp.zeros(32)},
    }
    x = jax.random.normal(keys[3], (32, 6, 6, 4)) + 0.5
    rules = [("conv", "2:4-T", "bbio"), ("layers", "2:4-T", "bio"), ("head/kernel", "4:8-T", "io")]

    def apply(params, x):
        x = jax.lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x, _ = jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x.mean((1, 2)), params["layers"])
        return x @ params["head"]["kernel"] + jnp.broadcast_to(params["head"]["bias"], (len(x), 32))

    expected, report = nm.convert(apply, params, rules, [x, x[:16] + 1])
    the_mesh = mesh(kind)
    with jax.set_mesh(the_mesh):
        outputs = P(None, "x") if images == P() else P()
        specs = {"conv": P(), "layers": P(), "head": {"kernel": outputs, "bias": P(*outputs[1:])}}
        shard = functools.partial(jax.tree.map, lambda leaf, spec: jax.device_put(leaf, NamedSharding(the_mesh, spec)))
        batches = [jax.device_put(part, NamedSharding(the_mesh, images)) for part in (x, x[:16] + 1)]
        found, again = nm.convert(apply, shard(params, specs), rules, batches)
    assert again.check.ok
    assert found["head"]["kernel"].sharding.is_equivalent_to(NamedSharding(the_mesh, outputs), 2)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), found, expected)
    for ours, theirs in zip(again.layers.layers, report.layers.layers, strict=True):
        assert ours.path == theirs.path and ours.rows == theirs.rows
        assert ours.after == pytest.approx(theirs.after, rel=1e-2)


@pytest.mark.slow
def test_arrays_with_explicit_axes_bring_their_mesh_along():
    """Nobody has to set a mesh: `jax.make_mesh` has explicit axes by default, and arrays know theirs."""
    the_mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:8])
    w, x = (jax.random.normal(jax.random.key(k), (size, 64)) for k, size in enumerate((64, 8)))
    columns = {"kernel": jax.device_put(w, NamedSharding(the_mesh, P(None, "x")))}
    whole = {"kernel": jax.device_put(w, NamedSharding(the_mesh, P()))}
    batches = [jax.device_put(x, NamedSharding(the_mesh, P("x", None)))]

    def apply(params, x):
        return x @ params["kernel"]

    masks = nm.compute_masks(columns, "2:4-T")
    expected = nm.compute_masks({"kernel": w}, "2:4-T")
    np.testing.assert_array_equal(masks["kernel"], expected["kernel"])
    np.testing.assert_array_equal(nm.solve(abs(columns["kernel"]), "2:4-T"), expected["kernel"])
    assert nm.verify(masks, "2:4-T").ok
    assert nm.pattern_violations(columns, "2:4-T")[0].tiles == 1
    tx = nm.sparse_training(optax.adamw(1e-3), "2:4-T", refresh_every=1)
    updates, _ = jax.jit(tx.update)(columns, tx.init(columns), columns)
    assert nm.verify(optax.apply_updates(columns, updates), "2:4-T").ok
    _, report = nm.convert(apply, whole, "2:4-T", batches)
    assert report.check.ok
