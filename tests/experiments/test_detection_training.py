"""What Mask R-CNN learns by, against NumPy: matching, drawing, losses, masks of boxes; and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.configs import detection
from experiments.configs.study import left_dense
from experiments.configs.table_3_detection import STUDY
from experiments.data.errors import DataError
from experiments.networks.detection import MaskRCNN, Sizes, boxes, losses, matching, roi_align

LEARNER = MaskRCNN(
    (1, 1, 1, 1),
    (8, 8, 8, 8),
    bottleneck=False,
    features=8,
    hidden=16,
    classes=3,
    sizes=Sizes(
        (8, 16, 32, 64, 128), candidates=8, proposals=8, detections=4, trained=16, anchors_drawn=32, regions_drawn=16
    ),
)


def some_boxes(random, count, side=64):
    corners, sizes = random.uniform(0, side / 2, (count, 2)), random.uniform(side / 6, side / 2, (count, 2))
    return np.concatenate([corners, corners + sizes], axis=1).astype(np.float32)


def overlaps_of(first, second):
    """Of every pair, one by one."""
    found = np.zeros((len(first), len(second)))
    for i, (a, b, c, d) in enumerate(first.astype(float)):
        for j, (e, f, g, h) in enumerate(second.astype(float)):
            common = max(min(c, g) - max(a, e), 0) * max(min(d, h) - max(b, f), 0)
            found[i, j] = common / ((c - a) * (d - b) + (g - e) * (h - f) - common)
    return found


# ------------------------------------------------------------------------------------------------------------ matching


def test_shifts_to_targets_are_what_moves_boxes_there():
    random = np.random.default_rng(0)
    first, second = some_boxes(random, 9), some_boxes(random, 9)

    @jax.jit
    def there_and_back(first, second):
        shifts = boxes.shift_to(first, second, losses.SHIFTS)
        return shifts, boxes.shifted(first, shifts, losses.SHIFTS)

    shifts, back = there_and_back(first, second)
    np.testing.assert_allclose(back, second, atol=1e-3)
    wanted = [encoded(*pair, np.array(losses.SHIFTS)) for pair in zip(first, second, strict=True)]
    np.testing.assert_allclose(shifts, wanted, rtol=1e-3, atol=1e-4)
    gradient = jax.jit(jax.grad(lambda b: boxes.shift_to(b, second, losses.SHIFTS).sum()))(jnp.zeros((9, 4)))
    assert not gradient.any() and not there_and_back(first, 0 * second)[0].any()


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_boxes_are_matched_with_objects(every, count):
    """Torchvision's two passes, written out; values are coarse, so that some are tied."""
    match = jax.jit(matching.matched, static_argnums=(2, 3, 4))
    for seed in range(20):
        random = np.random.default_rng(seed)
        overlaps = random.integers(0, 8, (4, 12)) / 8
        overlaps[count:] = 1  # those are not there
        wanted = []
        for j in range(12):
            best = max(range(count), key=lambda i, j=j: (overlaps[i, j], -i)) if count else -1
            value = overlaps[best, j] if count else -1
            found = best if value >= 0.7 else -1 if value < 0.3 else -2
            if every and any(overlaps[i, j] == overlaps[i].max() for i in range(count)):
                found = best
            wanted.append(found)
        found = match(overlaps.astype(np.float32), np.arange(4) < count, 0.3, 0.7, every)
        assert found.tolist() == wanted


@pytest.mark.parametrize(("positives", "negatives"), [(3, 30), (30, 3), (20, 20), (0, 40), (2, 3)])
def test_as_many_are_drawn_as_torchvision_draws(positives, negatives):
    positive, negative = np.arange(40) < positives, np.arange(40) >= 40 - negatives
    draw = jax.jit(lambda key, *given: matching.drawn(key, *given, 16, 0.25))
    seen = set()
    for seed in range(5):
        number, valid = map(np.asarray, draw(jax.random.key(seed), positive, negative))
        chosen = number[valid]
        first = min(positives, 4)
        assert len(number) == 16 and len(set(chosen)) == len(chosen) == first + min(negatives, 16 - first)
        assert positive[chosen[:first]].all() and negative[chosen[first:]].all() and valid[: len(chosen)].all()
        seen.add(tuple(chosen))
    assert len(seen) == 5 or len(chosen) == positives + negatives


def test_a_sample_may_be_larger_than_what_there_is():
    draw = jax.jit(matching.drawn, static_argnums=(3, 4))
    number, valid = map(np.asarray, draw(jax.random.key(0), np.arange(5) < 2, np.arange(5) >= 2, 16, 0.5))
    assert sorted(number[valid].tolist()) == [0, 1, 2, 3, 4] and len(number) == 16


# -------------------------------------------------------------------------------------------------------------- losses


def smooth_l1(difference):
    size = np.abs(difference)
    return np.where(size < 1 / 9, 4.5 * size**2, size - 1 / 18).sum()


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


def encoded(box, target, weights):
    (x, y, w, h), (x2, y2, w2, h2) = (
        ((b[0] + b[2]) / 2, (b[1] + b[3]) / 2, b[2] - b[0], b[3] - b[1]) for b in (box.astype(float), target)
    )
    return np.array([(x2 - x) / w, (y2 - y) / h, np.log(w2 / w), np.log(h2 / h)]) * weights


def test_loss_of_proposals_over_all_anchors():
    """With more drawn than there are, so that nothing is left to chance; the second image has no object."""
    random = np.random.default_rng(0)
    objects = np.stack([some_boxes(random, 3) for _ in range(2)])
    there = np.array([[True, True, False], [False] * 3])
    near = np.repeat(objects[0, :2], 4, axis=0) + random.uniform(-4, 4, (8, 4)).astype(np.float32)
    anchors = np.concatenate([some_boxes(random, 20), near])
    logits, shifts = random.normal(size=(2, 28)), random.normal(size=(2, 28, 4))
    is_object, moved, total = 0.0, 0.0, 0
    for k in range(2):
        overlaps = overlaps_of(objects[k][there[k]], anchors)
        for j, anchor in enumerate(anchors):
            best = overlaps[:, j].argmax() if len(overlaps) else None
            value = overlaps[best, j] if len(overlaps) else 0
            if value >= 0.7 or any(row[j] == row.max() for row in overlaps):
                is_object -= log_sigmoid(logits[k, j])
                moved += smooth_l1(shifts[k, j] - encoded(anchor, objects[k, best], 1))
            elif value < 0.3:
                is_object -= log_sigmoid(-logits[k, j])
            else:
                continue
            total += 1
    keys = jax.random.split(jax.random.key(0), 2)
    arrays = (x.astype(np.float32) for x in (logits, shifts, anchors, objects))
    found = jax.jit(losses.of_proposals, static_argnums=6)(keys, *arrays, there, 200)
    assert 30 < total < 56 and moved > 0
    np.testing.assert_allclose(found, [is_object / total, moved / total], rtol=1e-4)


def test_regions_are_proposals_and_objects_with_what_they_should_be():
    random = np.random.default_rng(1)
    objects, labels = some_boxes(random, 4), np.array([2, 1, 5, 0])
    near = np.repeat(objects[:3], 3, axis=0) + random.uniform(-3, 3, (9, 4)).astype(np.float32)
    proposals, real = np.concatenate([near, some_boxes(random, 15)]), np.arange(24) % 5 > 0
    draw = jax.jit(losses.regions, static_argnums=5)
    found = draw(jax.random.key(0), proposals, real, objects, labels, 100)
    every = np.concatenate([proposals[real], objects[:3]])
    overlaps = overlaps_of(objects[:3], every)
    matched = overlaps.max(axis=0) >= 0.5
    wanted = {}
    for box, best, is_object in zip(every, overlaps.argmax(axis=0), matched, strict=True):
        wanted[tuple(box)] = labels[best] * is_object, encoded(box, objects[best], np.array(losses.SHIFTS))
    valid = np.asarray(found["labels"]) >= 0
    assert valid.sum() == len(every) == len(wanted) and matched.sum() > 5
    assert (np.diff((found["labels"] > 0)[valid].astype(int)) <= 0).all()
    for box, label, shift in zip(*(np.asarray(found[k])[valid] for k in ("boxes", "labels", "wanted")), strict=True):
        assert wanted[tuple(box)][0] == label
        if label:
            np.testing.assert_allclose(shift, wanted[tuple(box)][1], rtol=1e-3, atol=1e-3)
    few = draw(jax.random.key(0), proposals, real, objects, labels, 8)
    assert [int(x > 0) for x in few["labels"]] == [1, 1, 0, 0, 0, 0, 0, 0]


def test_loss_of_regions_and_of_masks():
    random = np.random.default_rng(2)
    labels, wanted = np.array([2, 1, 0, 0, -1, -1]), random.normal(size=(6, 4))
    logits, shifts = random.normal(size=(6, 3)), random.normal(size=(6, 3, 4))
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    classified = -np.log([chances[k, labels[k]] for k in range(4)]).mean()
    moved = sum(smooth_l1(shifts[k, labels[k]] - wanted[k]) for k in range(2)) / 4
    arrays = (x.astype(np.float32) for x in (logits, shifts))
    of_regions, of_masks = jax.jit(losses.of_regions), jax.jit(losses.of_masks)
    found = of_regions(*arrays, labels, wanted.astype(np.float32))
    np.testing.assert_allclose(found, [classified, moved], rtol=1e-5)

    pixels, truth = random.normal(size=(6, 4, 4, 3)), random.random((6, 4, 4))
    terms = []
    for k in range(2):
        x, t = pixels[k, :, :, labels[k]], truth[k]
        terms.append(-(t * log_sigmoid(x) + (1 - t) * log_sigmoid(-x)))
    given = pixels.astype(np.float32), labels, truth.astype(np.float32)
    np.testing.assert_allclose(of_masks(*given), np.mean(terms), rtol=1e-5)
    assert of_masks(given[0], 0 * labels, given[2]) == 0
    nothing = of_regions(0 * given[0][:, 0, 0], shifts.astype(np.float32), 0 * labels - 1, wanted.astype(np.float32))
    assert nothing == (0, 0)


def test_masks_of_boxes_are_shares_of_their_bins():
    """RoIAlign with as many points as the box has room for, point by point."""
    random = np.random.default_rng(3)
    masks = random.random((2, 20, 24)) < 0.5
    found = np.clip(some_boxes(random, 9, 24), 0, np.float32([24, 20, 24, 20]))
    found[0] = [3, 4, 3.2, 4.1]
    number, side = random.integers(0, 2, 9), 4
    got = jax.jit(lambda *given: roi_align.mask_targets(*given, side))(masks, found, number)
    for k, (left, top, right, bottom) in enumerate(found.astype(float)):
        width, height = max(right - left, 1), max(bottom - top, 1)
        across, down = int(np.ceil(width / side)), int(np.ceil(height / side))
        wanted = np.zeros((side, side))
        for i in range(side * down):
            for j in range(side * across):
                y = min(top + (i + 0.5) * height / (side * down), 19)
                x = min(left + (j + 0.5) * width / (side * across), 23)
                near = [np.maximum(1 - abs(np.arange(n) - at), 0) for n, at in ((20, y), (24, x))]
                wanted[i // down, j // across] += near[0] @ masks[number[k]] @ near[1] / (down * across)
        np.testing.assert_allclose(got[k], wanted, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ the experiment


def test_the_papers_setting_asks_for_its_data_and_weights(tmp_path):
    with pytest.raises(DataError, match="trains on COCO: name its folder, --data FOLDER, which has annotations"):
        detection.official(None)
    with pytest.raises(DataError, match=r"instances_train2017\.json: there is none"):
        detection.official(tmp_path)
    with pytest.raises(DataError, match="starts from a trained maskrcnn_resnet50_fpn: name its weights"):
        detection.pretrained(None)
    with pytest.raises(DataError, match=r"nowhere\.pth: there is no such file"):
        detection.pretrained(tmp_path / "nowhere.pth")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu", "paper"])
def test_what_stays_dense_in_the_experiment_are_the_first_layer_and_the_heads(name):
    for pattern in ("2:4", "4:8-T"):
        plan = detection.planned(STUDY.presets[name], pattern)
        heads = {"rpn/cls_logits", "roi_heads/cls_score", "roi_heads/mask_fcn_logits"}
        dense = {path.removesuffix("/kernel"): why for path, why in left_dense(plan).items()}
        assert heads | {"backbone/conv1"} <= set(dense)
        # Heads whose outputs no group fits into: five classes in the small network, 91 and their shifts in the other.
        others = {path: why for path, why in dense.items() if path not in heads | {"backbone/conv1"}}
        assert all("not a multiple" in why for why in others.values()), others
        assert set(others) <= {"rpn/bbox_pred", "roi_heads/bbox_pred"}


# ------------------------------------------------------------------------------------------------------------ learning


def examples():
    """Two images: a square of each class, and nothing."""
    image = np.zeros((2, 64, 64, 3), np.float32)
    masks = np.zeros((2, 3, 64, 64), bool)
    found = np.zeros((2, 3, 4), np.float32)
    for k, (left, top) in enumerate([(8, 8), (36, 30)]):
        masks[0, k, top : top + 20, left : left + 20] = True
        found[0, k] = left, top, left + 20, top + 20
        image[0, ..., k] = masks[0, k]
    labels = np.array([[1, 2, 0], [0, 0, 0]])
    sizes = np.float32([[64, 64], [48, 64]])
    return image, sizes, {"boxes": found, "labels": labels, "masks": masks}


@pytest.mark.slow
def test_it_learns_two_images_by_heart():
    image, sizes, objects = examples()
    weights = jax.jit(LEARNER.init)(jax.random.key(0), image, sizes)
    tx = optax.adam(3e-3)

    def loss(params, key):
        return LEARNER.apply(
            {"params": params, "frozen": weights["frozen"]}, image, sizes, objects, key, method="losses"
        )

    @jax.jit
    def step(params, state, key):
        total, grads = jax.value_and_grad(lambda p: sum(loss(p, key).values()))(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, total

    params, state = weights["params"], tx.init(weights["params"])
    names = {name: float(value) for name, value in loss(params, jax.random.key(1)).items()}
    assert set(names) == {"objectness", "anchors", "classes", "boxes", "masks"}
    assert names["objectness"] == pytest.approx(np.log(2), rel=0.3) and all(v > 0 for v in names.values())
    seen = []
    for number in range(150):
        params, state, total = step(params, state, jax.random.key(number))
        seen.append(float(total))
    assert np.mean(seen[-10:]) < 0.4 * np.mean(seen[:3])
