"""Blocks of layers fitted together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nm_jax as nm

RULES = [("up|down", "2:4")]


def network(size=8):
    """Two residual blocks with biases and scales between two layers that stay dense; and correlated inputs."""
    keys = iter(jax.random.split(jax.random.key(0), 16))
    block = {"up": (size, 2 * size), "down": (2 * size, size)}
    params = {
        "stem": jax.random.normal(next(keys), (4, size)),
        **{
            f"block{k}": {name: jax.random.normal(next(keys), shape) / 3 for name, shape in block.items()}
            | {"bias": jnp.zeros(2 * size), "scale": jnp.ones(size)}
            for k in range(2)
        },
        "head": jax.random.normal(next(keys), (size, 3)),
    }
    return params, list(jax.random.normal(next(keys), (10, 16, 4)))


def like(row, x):
    return jnp.broadcast_to(row, (*x.shape[:-1], row.size))


def hidden(p, x):
    y = like(p["scale"], x) * x @ p["up"]
    return x + jax.nn.relu(y + like(p["bias"], y)) @ p["down"]


def states(params, x):
    """Before the first block, behind it, and behind the second."""
    found = [jnp.tanh(x @ params["stem"])]
    for name in ("block0", "block1"):
        found.append(hidden(params[name], found[-1]))
    return found


def apply(params, x):
    return states(params, x)[-1] @ params["head"]


def relative(new, old):
    new, old = (np.asarray(jnp.concatenate(values), np.float64) for values in (new, old))
    return float(np.sum((new - old) ** 2) / np.sum(old**2))


@pytest.fixture(scope="module")
def fitted():
    params, batches = network()
    masks = nm.compute_masks(params, RULES)
    seen = []
    new, report = nm.fit_blocks(
        apply,
        params,
        params,
        masks,
        batches[:8],
        held_out=batches[8:],
        steps=60,
        learning_rate=1e-2,
        on_block=seen.append,
    )
    return params, masks, batches, new, report, seen


def test_every_block_comes_nearer_to_its_dense_output(fitted):
    params, masks, batches, new, report, seen = fitted
    assert seen == list(report.blocks) and report.held_out and not report.undone
    assert [block.paths for block in report.blocks] == [(f"block{k}/down", f"block{k}/up") for k in range(2)]
    masked = nm.apply_masks(params, masks)
    held = batches[8:]
    dense = [states(params, x) for x in held]
    # The first block starts from masked weights, the second on what the new first one makes.
    start = {**masked, "block0": new["block0"]}
    for k, before in enumerate((masked, start)):
        errors = [relative([states(p, x)[k + 1] for x in held], [own[k + 1] for own in dense]) for p in (before, new)]
        assert report.blocks[k].before == pytest.approx(errors[0], rel=1e-3)
        assert report.blocks[k].after == pytest.approx(errors[1], rel=1e-3)
        assert errors[1] < 0.5 * errors[0] and report.blocks[k].steps in (15, 30, 45, 60)
    assert report.after.error < 0.5 * report.before.error
    assert "block0/down, block0/up" in str(report) and "held out" in str(report)


def test_what_is_fitted_and_what_is_not(fitted):
    params, masks, _, new, report, _ = fitted
    assert nm.verify(new, RULES).ok
    assert [block.fitted for block in report.blocks] == [4, 4]
    for name in ("stem", "head"):
        assert new[name] is params[name]
    for name in ("bias", "scale", "up", "down"):
        assert not np.array_equal(new["block0"][name], params["block0"][name])
    np.testing.assert_array_equal(np.asarray(new["block0"]["up"])[~np.asarray(masks["block0"]["up"])], 0)


def test_only_some_parameters():
    params, batches = network()
    masks = nm.compute_masks(params, RULES)
    new, report = nm.fit_blocks(
        apply, params, params, masks, batches, boundaries=[], leaves=["up", "scale"], steps=12, seed=3
    )
    assert len(report.blocks) == 1 and report.blocks[0].fitted == 4
    np.testing.assert_array_equal(new["block0"]["down"], params["block0"]["down"] * masks["block0"]["down"])
    assert new["block1"]["bias"] is params["block1"]["bias"] and new["head"] is params["head"]
    assert report.blocks[0].after <= report.blocks[0].before


def test_steps_that_only_do_harm_are_taken_back():
    params, batches = network()
    masks = nm.compute_masks(params, RULES)
    new, report = nm.fit_blocks(apply, params, params, masks, batches[:2], boundaries=[], steps=4, learning_rate=1e3)
    assert [block.steps for block in report.blocks] == [0] and not report.held_out
    assert report.blocks[0].after == report.blocks[0].before and "fitted on" in str(report)
    masked = nm.apply_masks(params, masks)
    assert all(map(np.array_equal, jax.tree.leaves(new), jax.tree.leaves(masked)))


def test_a_network_that_became_worse_is_as_it_was():
    """What the head reads is not what the block passes on most of."""
    params, _ = network(4)
    large = jnp.array([1e3, 1.0, 1.0, 1.0])

    def lopsided(p, x):
        return (x * like(large, x) + jnp.tanh(x @ p["w"])) @ p["head"]

    params = {"w": params["block0"]["up"][:, :4], "head": jnp.array([[0.0], [1.0], [1.0], [1.0]])}
    x = list(jax.random.normal(jax.random.key(1), (5, 4, 4)))
    new, report = nm.fit_blocks(lopsided, params, params, nm.compute_masks(params, [("w", "2:4")]), x, steps=8)
    assert report.after.error <= report.before.error
    before = nm.apply_masks(params, nm.compute_masks(params, [("w", "2:4")]))
    if report.undone:
        np.testing.assert_array_equal(new["w"], before["w"])


def test_padded_rows_and_batches_of_several_shapes():
    params, _ = network()
    keys = jax.random.split(jax.random.key(2), 6)
    batches = [jax.random.normal(key, (4, length, 4)) for key, length in zip(keys, (6, 3, 6, 3, 6, 6), strict=True)]
    poisoned = [x.at[:, 2:].set(1e4) for x in batches]
    masks = nm.compute_masks(params, RULES)

    def keep(x):
        return jnp.broadcast_to(jnp.arange(x.shape[1]) < 2, x.shape[:2])

    runs = [
        nm.fit_blocks(apply, params, params, masks, given, row_mask=keep, steps=4, boundaries=["block1"])[1]
        for given in (batches, poisoned)
    ]
    assert [block.after for block in runs[0].blocks] == pytest.approx([b.after for b in runs[1].blocks], rel=1e-4)
    assert runs[0].after.error == pytest.approx(runs[1].after.error, rel=1e-4)


def test_parameters_in_bfloat16_stay_so():
    params, batches = network()
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    masks = nm.compute_masks(params, RULES)
    new, report = nm.fit_blocks(
        apply, params, params, masks, [x.astype(jnp.bfloat16) for x in batches], boundaries=[], steps=20
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype(jnp.bfloat16)}
    assert report.blocks[0].after < report.blocks[0].before


def test_tables_and_running_statistics_are_left_alone():
    def lookup(p, tokens):
        x = p["table"][tokens]
        x = (x - like(p["norm"]["mean"], x)) * like(p["norm"]["scale"], x)
        return x + jnp.tanh(x @ p["up"])

    keys = jax.random.split(jax.random.key(0))
    params = {"table": jax.random.normal(keys[0], (10, 8)), "up": jax.random.normal(keys[1], (8, 8))}
    params["norm"] = {"mean": jnp.zeros(8), "scale": jnp.ones(8)}
    batches = [jnp.arange(10).reshape(2, 5) for _ in range(2)]
    new, report = nm.fit_blocks(
        lookup, params, params, nm.compute_masks(params, [("up", "2:4")]), batches, boundaries=[], steps=4
    )
    assert new["table"] is params["table"] and new["norm"]["mean"] is params["norm"]["mean"]
    assert report.blocks[0].fitted == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batches": []}, "batches is empty"),
        ({"held_out": []}, "held_out is empty"),
        ({"masks": {"stem": None, "head": None}}, "masks has no mask"),
        ({"dense": {"stem": jnp.ones((4, 8))}}, "different trees"),
        ({"layers": 0}, "layers must be 1 or more"),
        ({"leaves": "elsewhere"}, "nothing to fit: leaves='elsewhere', masked: block0/down"),
        ({"boundaries": ["elsewhere"]}, "no parameter"),
        ({"batches": [jnp.full((2, 4), jnp.nan)], "boundaries": []}, "block0/down.*not finite"),
        ({"row_mask": lambda x: jnp.ones((3,), bool), "boundaries": []}, "row_mask has shape"),
    ],
)
def test_what_does_not_fit_is_an_error(change, message):
    params, batches = network()
    given = {"dense": params, "masks": nm.compute_masks(params, RULES), "batches": batches[:1], "steps": 1} | change
    with pytest.raises(ValueError, match=message):
        nm.fit_blocks(apply, given.pop("dense"), params, given.pop("masks"), given.pop("batches"), **given)
