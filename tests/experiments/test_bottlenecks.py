"""The network of inverted bottlenecks: folded, and cut into its blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nm_jax as nm
from experiments.adaprune import blocks
from experiments.networks.bottlenecks import Bottlenecks, fold

SMALL = {"stem": 4, "blocks": ((4, 1), (8, 2)), "wider": 2, "last": 8}


def variables():
    """With running statistics that are not what they start from."""
    module, draw = Bottlenecks(**SMALL), np.random.default_rng(0)
    found = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    return module, jax.tree.map(lambda x: jnp.asarray(draw.uniform(0.3, 0.7, x.shape), jnp.float32), found)


def test_batch_norm_folds_into_the_convolutions():
    module, found = variables()
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    expected = jax.jit(module.apply)(found, x)
    got = jax.jit(Bottlenecks(**SMALL, folded=True).apply)(fold(found), x)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_its_bottlenecks_are_blocks_and_depthwise_kernels_move_with_them():
    _, found = variables()
    params, module = fold(found)["params"], Bottlenecks(**SMALL, folded=True)

    def apply(params, x):
        return module.apply({"params": params}, x)

    batches = list(jax.random.normal(jax.random.key(1), (5, 4, 8, 8, 1)))
    masks = nm.compute_masks(params, nm.plan(apply, params, batches[0], pattern="2:4"))
    new, report = nm.fit_blocks(apply, params, params, masks, batches, steps=4)
    names = [{path.split("/")[0] for path in block.paths} for block in report.blocks]
    assert names == [{"block0"}, {"block1"}, {"last"}]
    assert report.blocks[0].steps == 0 or not np.array_equal(
        new["block0"]["expand"]["bias"], params["block0"]["expand"]["bias"]
    )
    if report.blocks[1].steps:
        assert not np.array_equal(new["block1"]["depthwise"]["kernel"], params["block1"]["depthwise"]["kernel"])
    for name in ("stem", "head"):
        assert new[name]["kernel"] is params[name]["kernel"]


def test_samples_in_smaller_batches():
    parts = blocks.in_parts([(np.arange(60), np.arange(120).reshape(60, 2)), (np.arange(25), np.zeros((25, 2)))])
    assert [len(part[0]) for part in parts] == [25, 25, 25] and [part[1].shape for part in parts] == [(25, 2)] * 3
    np.testing.assert_array_equal(parts[1][0], np.arange(25, 50))
