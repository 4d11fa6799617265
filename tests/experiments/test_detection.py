"""Mask R-CNN: its published size, torchvision's names, what becomes sparse, and its boxes against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nm_jax as nm
from experiments.networks.detection import MaskRCNN, Sizes, boxes, roi_align, variables

SMALL = MaskRCNN(
    (1, 1, 1, 1),
    (16, 16, 32, 32),
    bottleneck=False,
    features=16,
    hidden=32,
    classes=8,
    sizes=Sizes((8, 16, 32, 64, 128), candidates=16, proposals=16, detections=4, score=0.0),
)


def shapes(module, side=64):
    arrays = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32), jax.ShapeDtypeStruct((2, 2), jnp.float32)
    return dict(jax.eval_shape(module.init, jax.random.key(0), *arrays)), arrays


def some_boxes(random, count, side=64):
    corners = np.sort(random.uniform(-4, side + 4, (count, 2, 2)), axis=1)
    return corners.reshape(count, 4).astype(np.float32)


def test_as_many_parameters_as_published():
    """Those of torchvision's `maskrcnn_resnet50_fpn`; frozen batch norms have none."""
    found, _ = shapes(MaskRCNN(), 128)
    assert sum(leaf.size for leaf in jax.tree.leaves(found["params"])) == 44_401_393


# ---------------------------------------------------------------------------------------------------- against NumPy


def greedy(found, threshold):
    """Non-maximum suppression as it is usually written."""
    kept = []
    for k, (left, top, right, bottom) in enumerate(found.astype(np.float64)):
        for other in kept:
            x1, y1, x2, y2 = found[other].astype(np.float64)
            common = max(min(right, x2) - max(left, x1), 0) * max(min(bottom, y2) - max(top, y1), 0)
            whole = (right - left) * (bottom - top) + (x2 - x1) * (y2 - y1) - common
            if common > threshold * whole:
                break
        else:
            kept.append(k)
    return kept


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.7])
def test_suppression_is_the_greedy_one(threshold):
    found = np.stack([some_boxes(np.random.default_rng(seed), 40) for seed in range(8)])
    stays = jax.jit(jax.vmap(lambda b: boxes.suppressed(b, jnp.ones(40, bool), threshold)))(found)
    wanted = [greedy(each, threshold) for each in found]
    assert [list(np.flatnonzero(each)) for each in np.asarray(stays)] == wanted
    assert any(len(each) < 40 for each in wanted)


def test_boxes_that_are_not_there_suppress_nothing():
    """A chain: the second overlaps with both neighbours, which do not overlap enough."""
    chain = jnp.asarray([[0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]], jnp.float32)
    assert list(boxes.suppressed(chain, jnp.ones(3, bool), 0.3)) == [True, False, True]
    assert list(boxes.suppressed(chain, jnp.asarray([False, True, True]), 0.3)) == [False, True, False]
    empty = jnp.zeros((3, 4))
    assert list(boxes.suppressed(empty, jnp.ones(3, bool), 0.3)) == [True] * 3


def at(image, y, x):
    """A map at a point: linear between its entries, 0 from a pixel outside on."""
    height, width = image.shape[:2]
    if not (-1 <= y <= height and -1 <= x <= width):
        return np.zeros(image.shape[2])
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    rows, columns = np.arange(height), np.arange(width)
    across = np.maximum(1 - np.abs(columns - x), 0)
    return np.einsum("i,j,ijc->c", np.maximum(1 - np.abs(rows - y), 0), across, image)


def test_aligned_regions_are_means_of_points_between_pixels():
    random = np.random.default_rng(0)
    maps = [random.normal(size=(2, 16 // 2**k, 12 // 2**k, 3)).astype(np.float32) for k in range(2)]
    found = some_boxes(random, 20)
    image, level, side = random.integers(0, 2, 20), random.integers(0, 2, 20), 3
    got = jax.jit(lambda *given: roi_align.roi_align(given[:2], *given[2:], side))(*maps, found, image, level)
    for k, box in enumerate(found.astype(np.float64)):
        left, top, right, bottom = box / (4 * 2.0 ** level[k])
        steps = (np.arange(2 * side) + 0.5) / (2 * side)
        ys, xs = top + max(bottom - top, 1) * steps, left + max(right - left, 1) * steps
        points = np.array([[at(maps[level[k]][image[k]].astype(float), y, x) for x in xs] for y in ys])
        wanted = points.reshape(side, 2, side, 2, 3).mean((1, 3))
        np.testing.assert_allclose(got[k], wanted, atol=2e-5)


def test_boxes_go_to_the_level_of_their_size():
    sides = jnp.asarray([1.0, 111, 112, 223, 224, 447, 448, 2000, 0])
    found = jnp.stack([0 * sides, 0 * sides, sides, sides], axis=1)
    assert list(roi_align.levels_of(found, 4)) == [0, 0, 1, 1, 2, 2, 3, 3, 0]


# ------------------------------------------------------------------------------------------------------- the network


@pytest.mark.slow
def test_detections_are_boxes_within_their_images():
    """With random weights; the second image is smaller than what it is padded to."""
    images = jax.random.normal(jax.random.key(0), (2, 64, 64, 3))
    sizes = jnp.asarray([[64.0, 64], [40, 48]])
    weights = jax.jit(SMALL.init)(jax.random.key(1), images, sizes)
    found = jax.device_get(jax.jit(SMALL.apply)(weights, images, sizes))
    assert found["masks"].shape == (2, 4, 28, 28) and all(np.isfinite(x).all() for x in found.values())
    there = found["scores"] > 0
    assert there.any() and (np.diff(found["scores"]) <= 0).all()
    assert ((found["labels"] > 0) == there).all()
    for boxes_of, size in zip(found["boxes"], np.asarray(sizes), strict=True):
        assert (boxes_of >= 0).all() and (boxes_of[:, [3, 2]] <= size).all()


def test_names_of_torchvision_are_those_of_today_and_those_of_the_published_file():
    kernel = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
    today = {
        "backbone.body.layer1.0.bn1.running_var": kernel[0, 0, 0],
        "backbone.body.layer1.0.bn1.weight": kernel[0, 0, 0],
        "backbone.body.layer1.0.downsample.0.weight": kernel,
        "backbone.fpn.inner_blocks.1.0.weight": kernel,
        "rpn.head.conv.0.0.weight": kernel,
        "rpn.head.cls_logits.bias": kernel[0, 0, 0],
        "roi_heads.box_head.fc7.weight": kernel[0, 0],
        "roi_heads.mask_head.2.0.weight": kernel,
        "roi_heads.mask_predictor.conv5_mask.weight": kernel,
    }
    renamed = {
        "backbone.fpn.inner_blocks.1.0.weight": "backbone.fpn.inner_blocks.1.weight",
        "rpn.head.conv.0.0.weight": "rpn.head.conv.weight",
        "roi_heads.mask_head.2.0.weight": "roi_heads.mask_head.mask_fcn3.weight",
    }
    published = {renamed.get(name, name): array for name, array in today.items()}
    (params, frozen), other = variables(today).values(), variables(published)
    jax.tree.map(np.testing.assert_array_equal, {"params": params, "frozen": frozen}, other)
    assert set(frozen["backbone"]["layer1_0"]["bn1"]) == {"var", "scale"} and set(params["rpn"]["conv"]) == {"kernel"}
    heads = params["roi_heads"]
    assert set(heads) == {"fc7", "mask_head_2", "conv5_mask"} and set(params["backbone"]["layer1_0"]) == {
        "downsample_conv"
    }
    assert heads["mask_head_2"]["kernel"].shape == (2, 2, 3, 2)
    # Every pixel `x` of the input makes 2 x 2 of the output, of its inputs `i` and the entry there of the kernel.
    x = np.random.default_rng(0).normal(size=(1, 2, 3, 2)).astype(np.float32)
    wanted = np.einsum("byxi,iohw->byhxwo", x, kernel).reshape(1, 4, 6, 3)
    got = jax.lax.conv_transpose(x, heads["conv5_mask"]["kernel"], (2, 2), "VALID")
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)


def test_a_plan_understands_the_whole_network():
    """No rule by hand; outputs by the biases, whose size every kernel has along its last dimension."""
    found, arrays = shapes(SMALL)
    params = found.pop("params")
    plan = nm.plan(lambda p, v, *x: SMALL.apply({"params": p, **v}, *x), params, found, *arrays, pattern="2:4-T")
    kernels = {leaf.path: leaf for leaf in plan.leaves if leaf.path.endswith("kernel")}
    assert len(kernels) == len(plan.leaves) - sum(leaf.path.endswith("bias") for leaf in plan.leaves) == 33
    for path, leaf in kernels.items():
        *nodes, _ = path.split("/")
        node = params
        for name in nodes:
            node = node[name]
        assert "bias" not in node or node["bias"].shape == leaf.shape[-1:]
        assert leaf.axes == "bb" * (len(leaf.shape) == 4) + "io", path
    dense = {path.removesuffix("/kernel") for path, leaf in kernels.items() if leaf.pattern is None}
    # The two `bbox_pred` are no last layers: where they put a box, further layers read.
    heads = {"roi_heads/cls_score", "roi_heads/mask_fcn_logits", "rpn/cls_logits"}
    assert dense == {"backbone/conv1"} | heads
    assert {"roi_heads/conv5_mask/kernel", "roi_heads/fc6/kernel", "rpn/conv/kernel"} <= set(kernels)
