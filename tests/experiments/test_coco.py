"""COCO: its JSON and images, what a network is given of them, how detections are judged; on drawn shapes."""

import copy
import functools
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from experiments.data import coco, coco_score, shapes
from experiments.data.coco import Instances, Objects
from experiments.data.detection import Detection, Fit, interpolated
from experiments.data.errors import DataError
from experiments.data.transforms import normalise

DRAWN = shapes.drawn(12, 48, seed=3)
MANY = max(range(12), key=lambda k: len(DRAWN.objects(k).labels))  # the image with the most objects


def written(root, instances, part="val2017"):
    """As COCO is distributed, with images that lose nothing."""
    (root / part).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(instances.content))
    for k, image in enumerate(instances.images):
        Image.fromarray(instances.image(k)).save(root / part / image["file_name"])
    return root


def changed(edit):
    """The drawn set with something about its JSON changed."""
    content = copy.deepcopy(DRAWN.content)
    edit(content)
    return Instances(content, lambda name: DRAWN._read(name), "changed")


# -------------------------------------------------------------------------------------------------------- the drawings


def test_drawings_are_functions_of_seed_and_number():
    again = shapes.drawn(5, 48, seed=3)
    assert again.content["annotations"] == DRAWN.content["annotations"][: len(again.content["annotations"])]
    np.testing.assert_array_equal(again.image(4), DRAWN.image(4))
    assert not np.array_equal(shapes.drawn(1, 48, seed=4).image(0), DRAWN.image(0))


def test_drawings_have_exact_masks_of_all_classes_and_hide_each_other():
    """Masks of an image have no pixel in common, are not whole where another is in front, and fill their boxes."""
    hidden, labels, empty = 0, set(), 0
    for k in range(60):
        picture, objects = shapes.picture_of(np.random.default_rng((3, k)), 48)
        masks = np.array([mask for _, mask in objects]).reshape(-1, 48, 48)
        assert masks.sum(0).max(initial=0) <= 1 and picture.dtype == np.uint8
        labels |= {kind for kind, _ in objects}
        empty += not objects
        boxes = [rle.toBbox(rle.encode(np.asfortranarray(m, np.uint8))) for m in masks]
        for (x, y, w, h), mask in zip(boxes, masks, strict=True):
            rows, columns = np.nonzero(mask)
            assert (x, y, w, h) == (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)
        corners = [(x, y, x + w, y + h) for x, y, w, h in boxes]
        hidden += any(
            a is not b and max(a[0], b[0]) < min(a[2], b[2]) and max(a[1], b[1]) < min(a[3], b[3])
            for a in corners
            for b in corners
        )
    assert labels == set(range(len(shapes.KINDS))) and hidden > 20 and empty


# ------------------------------------------------------------------------------------------------------------ reading


def test_a_folder_is_read_as_pycocotools_reads_it(tmp_path, capsys):
    found = coco.folder(written(tmp_path, DRAWN), "val2017")
    assert capsys.readouterr().out == ""
    official = COCO(tmp_path / "annotations" / "instances_val2017.json")
    assert (
        len(found) == 12 and found.classes == 5 and found.most == max(len(found.objects(k).labels) for k in range(12))
    )
    for k, image in enumerate(found.images):
        annotations = official.loadAnns(official.getAnnIds(image["id"]))
        objects = found.objects(k)
        np.testing.assert_array_equal(found.image(k), DRAWN.image(k))
        np.testing.assert_array_equal(objects.labels, [a["category_id"] for a in annotations])
        for mask, box, annotation in zip(objects.masks, objects.boxes, annotations, strict=True):
            np.testing.assert_array_equal(mask, official.annToMask(annotation))
            x, y, w, h = annotation["bbox"]
            np.testing.assert_array_equal(box, np.float32([x, y, x + w, y + h]))


def test_polygons_are_masks():
    def square(content):
        content["annotations"][0] |= {"segmentation": [[4, 4, 12, 4, 12, 10, 4, 10]], "bbox": [4, 4, 8, 6], "area": 48}

    wanted = np.zeros((48, 48), bool)
    wanted[4:10, 4:12] = True
    np.testing.assert_array_equal(changed(square).objects(0).masks[0], wanted)


def test_crowds_and_empty_boxes_are_not_learned_and_boxes_end_with_their_image():
    first = DRAWN.objects(MANY)
    assert len(first.labels) >= 2

    def edit(content):
        crowd, large = [a for a in content["annotations"] if a["image_id"] == MANY + 1][:2]
        crowd["iscrowd"], large["bbox"] = 1, [40, 40, 100, 100]
        for bbox in ([3, 3, 0, 5], [48, 3, 5, 5], [3, 3, 5, -1]):
            content["annotations"].append({**large, "id": len(content["annotations"]) + 1, "bbox": bbox})

    found = changed(edit).objects(MANY)
    np.testing.assert_array_equal(found.labels, first.labels[1:])
    np.testing.assert_array_equal(found.boxes[0], [40, 40, 48, 48])


def test_images_without_objects_are_not_trained_on():
    def edit(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 2]
        for annotation in content["annotations"]:
            if annotation["image_id"] == 3:
                annotation["bbox"][2] = 1
            if annotation["image_id"] == 4:
                annotation["iscrowd"] = 1

    all_of_them = changed(edit)
    found = [image["id"] for image in all_of_them.with_objects().images]
    assert not {2, 3} & set(found) and {1, 4} <= set(found)
    assert all_of_them.objects(1).masks.shape == (0, 48, 48) and all_of_them.objects(1).boxes.shape == (0, 4)


def unlink(root):
    (root / "val2017" / "000003.png").unlink()


def spoil(root):
    (root / "val2017" / "000003.png").write_bytes(b"no image")


def shrink(root):
    Image.new("RGB", (8, 9)).save(root / "val2017" / "000003.png")


def cut(root):
    file = root / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text()[:-9])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (unlink, r"val2017: 1 of the 12 images of instances_val2017.json are not there; the first is 000003.png"),
        (spoil, r"000003.png: this image cannot be read"),
        (shrink, r"000003.png has \(9, 8\) pixels, the JSON says \(48, 48\)"),
        (cut, r"instances_val2017.json: no JSON"),
    ],
)
def test_files_that_are_missing_or_damaged_are_named(edit, message, tmp_path):
    root = written(tmp_path, DRAWN)
    edit(root)
    with pytest.raises(DataError, match=message) as error:
        coco.folder(root, "val2017").image(3)
    assert "\n" not in str(error.value)


def test_folders_that_are_missing_are_named(tmp_path):
    with pytest.raises(
        DataError, match=r"instances_val2017.json: there is none; .* must have annotations/instances_val"
    ):
        coco.folder(tmp_path, "val2017")
    written(tmp_path, DRAWN).joinpath("val2017").rename(tmp_path / "other")
    with pytest.raises(DataError, match=r"val2017: there is none; .* must have .* and val2017/\*.jpg"):
        coco.folder(tmp_path, "val2017")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("annotations"), "it has no list of annotations; is it a JSON of instances?"),
        (lambda c: c["annotations"][2].pop("iscrowd"), r"annotations\[2\] has no iscrowd, or of another type"),
        (lambda c: c["annotations"][2].update(id=1), "the id 1 is there twice in annotations"),
        (lambda c: c["annotations"][2].update(image_id=99), "annotation 3 is of image_id 99, .* not among images"),
        (lambda c: c["annotations"][2].update(category_id=9), "annotation 3 is of category_id 9, .* among categories"),
        (
            lambda c: c["annotations"][2].update(bbox=[1, 2, 3]),
            r"annotation 3 has the bbox \[1, 2, 3\]; .* four numbers",
        ),
        (lambda c: c["annotations"][2].update(bbox=[1, 2, 3, float("nan")]), "annotation 3 has the bbox"),
        (lambda c: c["images"].clear(), "it has 0 images, 4 categories"),
        (lambda c: c["categories"].append({"id": 0, "name": "nothing"}), "begin with 1, 0 is the background"),
    ],
)
def test_a_json_that_is_not_cocos_is_one_clear_line(edit, message):
    with pytest.raises(DataError, match=message):
        changed(edit)


# --------------------------------------------------------------------------------------------------- what is learned of


@pytest.mark.parametrize(("old", "new"), [((5, 7), (9, 7)), ((6, 6), (3, 4)), ((1, 4), (3, 1))])
def test_scaling_is_linear_between_centres_of_pixels(old, new):
    image = np.random.default_rng(0).normal(size=(*old, 2))
    wanted = np.zeros((*new, 2))
    for i in range(new[0]):
        for j in range(new[1]):
            y, x = (min(max((k + 0.5) * o / n - 0.5, 0), o - 1) for k, o, n in zip((i, j), old, new, strict=True))
            near = [np.maximum(1 - abs(np.arange(o) - at), 0) for o, at in zip(old, (y, x), strict=True)]
            wanted[i, j] = np.einsum("y,x,yxc->c", *near, image)
    np.testing.assert_allclose(interpolated(image, new), wanted, atol=1e-12)


def test_images_are_scaled_and_padded_with_their_objects():
    """40 x 80 pixels to a longer side of 60, where the shorter one, which may have 32, has 30."""
    mask = np.zeros((1, 40, 80), bool)
    mask[0, 8:24, 16:48] = True
    image = np.random.default_rng(0).integers(0, 256, (40, 80, 3), np.uint8)
    given = image, Objects(np.float32([[16, 8, 48, 24]]), np.int32([7]), mask)
    found = Fit(64, 32, 60, objects=3)(given)
    assert found["size"].tolist() == [30, 60] and found["labels"].tolist() == [7, 0, 0]
    np.testing.assert_allclose(found["boxes"], [[12, 6, 36, 18], [0] * 4, [0] * 4])
    wanted = np.zeros((3, 64, 64), bool)
    wanted[0, 6:18, 12:36] = True
    np.testing.assert_array_equal(found["masks"], wanted)
    np.testing.assert_allclose(found["image"][:30, :60], interpolated(normalise(image), (30, 60)))
    assert not found["image"][30:].any() and not found["image"][:, 60:].any()

    mirror = Fit(64, 32, 60, objects=3, mirrored=True)
    luck = np.random.default_rng(0)
    seen = [mirror(given, luck) for _ in range(20)]
    turned = [one for one in seen if one["boxes"][0, 0] != 12]
    assert 0 < len(turned) < 20
    np.testing.assert_allclose(turned[0]["boxes"][0], [24, 6, 48, 18])
    np.testing.assert_array_equal(turned[0]["masks"][:, :30, :60], wanted[:, :30, 59::-1])
    np.testing.assert_allclose(turned[0]["image"][:30, :60], found["image"][:30, 59::-1], atol=1e-6)


def test_more_objects_than_places_are_refused():
    with pytest.raises(DataError, match=r"an image has \d objects, and there is place for 1"):
        Fit(64, 64, 64, objects=1)(DRAWN[MANY][0])
    with pytest.raises(ValueError, match="the side 48 must be a multiple of 32"):
        Fit(48, 48, 48, objects=1)


def test_batches_are_functions_of_their_number():
    data = Detection(DRAWN.with_objects(), DRAWN, 64, 64, 64)
    batches = data.batches(4, seed=1)
    first, numbers = batches(1)
    assert first["image"].shape == (4, 64, 64, 3) and first["masks"].shape == (4, DRAWN.most, 64, 64)
    batches(2)
    again, same = batches(1)
    np.testing.assert_array_equal(numbers, same)
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])
    tested = [n for _, numbers in data.tests(5) for n in numbers]
    assert tested == list(range(12)) and data.head(3).count == 3


# -------------------------------------------------------------------------------------------------------------- judging


def perfect(instances):
    """What is there, as a network would have found it."""
    kept = ("image_id", "category_id", "bbox", "segmentation", "area", "iscrowd")
    found = [a for a in instances.content["annotations"] if not a["iscrowd"]]
    return [{key: a[key] for key in kept} | {"score": 0.9} for a in found]


def test_a_perfect_predictor_has_all_and_an_empty_one_nothing(capsys):
    assert coco_score.average_precision(DRAWN, perfect(DRAWN)) == pytest.approx({"box_ap": 100, "mask_ap": 100})
    assert coco_score.average_precision(DRAWN, []) == {"box_ap": 0, "mask_ap": 0}
    assert capsys.readouterr().out == ""


def test_judging_is_average_precision():
    """One class, one image, one size: right, wrong, right, and one that is not found; by hand."""
    boxes = [[0, 0, 10, 10], [20, 20, 10, 10], [30, 2, 8, 8]]

    def content(content):
        mask = rle.encode(np.asfortranarray(np.ones((48, 48)), np.uint8))
        one = {"segmentation": {"size": [48, 48], "counts": mask["counts"].decode()}, "area": 100, "iscrowd": 0}
        content["annotations"] = [
            {**one, "id": k + 1, "image_id": 1, "category_id": 1, "bbox": b} for k, b in enumerate(boxes)
        ]

    truth = changed(content)
    right, other = perfect(truth)[:2]
    found = [right | {"score": 0.9}, right | {"score": 0.8, "bbox": [35, 35, 9, 9]}, other | {"score": 0.7}]
    recalls = np.linspace(0, 1, 101)
    wanted = np.where(recalls <= 1 / 3, 1, np.where(recalls <= 2 / 3, 2 / 3, 0)).mean()
    assert coco_score.average_precision(truth, found)["box_ap"] == pytest.approx(100 * wanted)


def test_what_is_found_in_a_crowd_is_neither_right_nor_wrong():
    def crowd(content, is_crowd):
        everything = rle.encode(np.asfortranarray(np.ones((48, 48)), np.uint8))
        mask = {"size": [48, 48], "counts": everything["counts"].decode()}
        one = {"id": 99, "image_id": 1, "category_id": 1, "bbox": [0, 0, 48, 48], "area": 48 * 48, "segmentation": mask}
        content["annotations"].append(one | {"iscrowd": is_crowd})

    scores = []
    for is_crowd in (1, 0):
        truth = changed(functools.partial(crowd, is_crowd=is_crowd))
        extra = perfect(DRAWN)[0] | {"image_id": 1, "category_id": 1, "bbox": [40, 40, 5, 5], "score": 0.95}
        scores.append(coco_score.average_precision(truth, [*perfect(DRAWN), extra])["box_ap"])
    assert scores[0] == pytest.approx(100) and scores[1] < 95


def test_masks_are_pasted_into_their_boxes():
    """Every pixel by itself: what is between the pixels of the mask with a border of zeros, at the pixel's place."""
    random = np.random.default_rng(0)
    for box in (np.float32([3, 4, 17, 11]), np.float32([-4, 2.5, 8.3, 30]), np.float32([5, 5, 5.4, 5.2])):
        mask = random.random((6, 6)).astype(np.float32)
        (half_x, half_y), centre = (box[2:] - box[:2]) / 2 * 8 / 6, (box[2:] + box[:2]) / 2
        left, top = int(centre[0] - half_x), int(centre[1] - half_y)
        w, h = int(centre[0] + half_x) - left + 1, int(centre[1] + half_y) - top + 1
        wanted, framed = np.zeros((20, 24)), np.pad(mask, 1)
        for y in range(20):
            for x in range(24):
                if top <= y < top + h and left <= x < left + w:
                    at = [min(max((k + 0.5) * 8 / n - 0.5, 0), 7) for k, n in ((y - top, h), (x - left, w))]
                    near = [np.maximum(1 - abs(np.arange(8) - place), 0) for place in at]
                    wanted[y, x] = near[0] @ framed @ near[1]
        np.testing.assert_allclose(coco_score.pasted(mask, box, (20, 24)), wanted, atol=1e-6)


def test_a_network_that_is_right_has_all():
    """Through boxes and small masks of images that were scaled: boxes are exact, masks up to their edges."""
    data = Detection(DRAWN, DRAWN, 96, 96, 96)
    found = []
    for batch, numbers in data.tests(6):
        masks = np.zeros((*batch["labels"].shape, 28, 28), np.float32)
        for image, k in np.argwhere(batch["labels"] > 0):
            left, top, right, bottom = batch["boxes"][image, k].astype(int)
            part = batch["masks"][image, k, top:bottom, left:right]
            masks[image, k] = interpolated(part.astype(np.float32), (28, 28))
        said = {"boxes": batch["boxes"], "labels": batch["labels"], "masks": masks}
        said["scores"] = 0.9 * (batch["labels"] > 0)
        found += coco_score.results(DRAWN, numbers, said, batch["size"])
    scores = coco_score.average_precision(DRAWN, found)
    assert scores["box_ap"] == pytest.approx(100) and scores["mask_ap"] > 90
