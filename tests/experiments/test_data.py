"""Images and their batches: every example once, the same after any interruption, and bad input in one line."""

import pathlib
import pickle

import numpy as np
import orbax.checkpoint as ocp
import pytest
from grain.checkpoint import CheckpointRestore, CheckpointSave
from PIL import Image

import experiments.__main__ as command
from experiments.data import cifar, loading, transforms
from experiments.data.errors import DataError
from experiments.data.folders import Folder, imagenet

RNG = np.random.default_rng(0)


class Numbers:
    """Examples that are their number."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        return np.full((2, 2), number), np.int32(number)


def noisy(image, random):
    return image + random.random()


def numbers(seed=0, transform=noisy):
    return loading.Batches(Numbers(13), 4, seed, transform)


def equal(batch, other):
    for a, b in zip(batch, other, strict=True):
        np.testing.assert_array_equal(a, b)


def test_every_epoch_has_each_example_once_in_an_order_of_its_own():
    batches = numbers(transform=None)
    drawn = np.concatenate([next(batches)[1] for _ in range(13)]).reshape(4, 13)  # batches go on into the next epoch
    np.testing.assert_array_equal(np.sort(drawn), np.tile(np.arange(13), (4, 1)))
    assert len({tuple(epoch) for epoch in drawn}) == 4


def test_batches_are_of_the_seed():
    equal(next(numbers(3)), next(numbers(3)))
    assert not np.array_equal(next(numbers(3))[1], next(numbers(4))[1])


def test_random_numbers_differ_between_epochs_and_examples():
    batches = numbers()
    found = np.concatenate([next(batches)[0][:, 0, 0] for _ in range(13)])
    assert len(np.unique(found % 1)) == 4 * 13


WHOLE = [next(batches) for batches in [numbers()] for _ in range(9)]


@pytest.mark.parametrize("stop", range(8))
def test_the_same_batches_follow_wherever_it_is_stopped(stop, tmp_path):
    """By the state that orbax has saved, in an iterator that is new; and by the number of the batch."""
    first = numbers()
    for k in range(stop):
        equal(next(first), WHOLE[k])
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(stop, args=ocp.args.Composite(data=CheckpointSave(first.iterator)))
        manager.wait_until_finished()
        again = numbers()
        manager.restore(stop, args=ocp.args.Composite(data=CheckpointRestore(again.iterator)))
    by_number = numbers()
    for k in range(stop, 9):
        equal(next(again), WHOLE[k])
        equal(by_number(k), WHOLE[k])


def test_numbers_in_any_order():
    batches = numbers()
    for k in (5, 2, 3, 3, 0, 8):
        equal(batches(k), WHOLE[k])


def test_a_batch_larger_than_all_there_is():
    with pytest.raises(DataError, match="a batch of 14 examples out of 13; make the batch smaller"):
        loading.Batches(Numbers(13), 14, 0)


# ---------------------------------------------------------------------------------------------------------- folders


def write_image(path, size=(20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path, quality=95)


@pytest.fixture
def tree(tmp_path):
    for part, count in (("train", 3), ("val", 2)):
        for name in ("n01", "n02"):
            for k in range(count):
                write_image(tmp_path / part / name / f"{name}_{k}.JPEG")
    (tmp_path / "train" / "n01" / "notes.txt").write_text("no image")
    return tmp_path


def test_images_of_class_folders(tree):
    data = imagenet(tree, side=8)
    assert (len(data.train), len(data.test), data.train.classes) == (6, 4, ["n01", "n02"])
    image, label = data.train[4]
    assert label == 1
    np.testing.assert_array_equal(image, np.asarray(Image.open(tree / "train/n02/n02_1.JPEG")))
    images, labels = next(data.batches(6, seed=0))
    assert images.shape == (6, 8, 8, 3) and images.dtype == np.float32
    assert sorted(labels) == [0, 0, 0, 1, 1, 1]
    tests = list(data.tests(3))
    assert [len(labels) for _, labels in tests] == [3, 1]
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in tests]), [0, 0, 1, 1])
    equal((tests[0][0][1],), (transforms.Middle(8, 9)(data.test[1][0]),))


def test_grey_images_have_three_channels(tmp_path):
    path = tmp_path / "a" / "grey.png"
    path.parent.mkdir()
    Image.fromarray(np.full((4, 5), 7, np.uint8)).save(path)
    equal((Folder(tmp_path)[0][0],), (np.full((4, 5, 3), 7, np.uint8),))


def damage(path):
    path.write_bytes(path.read_bytes()[:400])
    return path


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_broken_image_is_refused_by_name(tree, part):
    path = damage(tree / part / "n02" / "n02_1.JPEG")
    data = imagenet(tree, side=8)
    with pytest.raises(DataError, match=r"n02_1\.JPEG: this image cannot be read .*; repair or delete it") as error:
        next(data.batches(6, 0)) if part == "train" else list(data.tests(4))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_broken_image_is_skipped_when_asked(tree):
    for part in ("train", "val"):
        damage(tree / part / "n02" / "n02_1.JPEG")
    data = imagenet(tree, 8, broken="skip")
    with pytest.warns(UserWarning, match=r"train/n02/n02_1\.JPEG: this image cannot be read .*; skipped"):
        _, labels = next(data.batches(6, 0))
    assert sorted(labels) == [0, 0, 0, 1, 1, 1]  # the next one is in its place
    with pytest.warns(UserWarning, match=r"val/n02/n02_1\.JPEG: .*; skipped"):
        tests = list(data.tests(4))
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in tests]), [0, 0, 1])
    list(data.tests(4))  # says nothing again; a warning would be an error


def test_folders_of_broken_images_alone(tmp_path):
    write_image(tmp_path / "a" / "x.jpg")
    (tmp_path / "a" / "x.jpg").write_bytes(b"")
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(DataError, match="none of its 1 images can be read"):
        Folder(tmp_path, "skip")[0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tree: tree / "nowhere", "nowhere: there is no such folder; it must have train/CLASS"),
        (lambda tree: (tree / "val").rename(tree / "other").parent, "val: there is no such folder"),
        (lambda tree: (tree / "train").rename(tree / "n") and (tree / "train").mkdir(), "train: it is empty"),
        (lambda tree: (tree / "val" / "n03").mkdir(), "val/n03: this class folder has no images"),
        (lambda tree: write_image(tree / "val/n03/a.png"), "different classes; n03 is in one of them alone"),
    ],
    ids=["missing", "half", "empty", "class", "classes"],
)
def test_folders_that_are_not_as_they_should_be(tree, spoil, message):
    path = spoil(tree) or tree
    with pytest.raises(DataError, match=message) as error:
        imagenet(path)
    assert "\n" not in str(error.value)


def test_a_bad_choice_for_broken_images(tree):
    with pytest.raises(ValueError, match="broken must be 'refuse' or 'skip', got 'ignore'"):
        Folder(tree / "train", "ignore")


def test_what_is_wrong_with_the_data_is_one_line_of_the_command(monkeypatch):
    def fail(*args):
        raise DataError("train: it is empty")

    monkeypatch.setattr("experiments.harness.main", fail)
    with pytest.raises(SystemExit, match="train: it is empty"):
        command.main(["quickstart"])


# -------------------------------------------------------------------------------------------------------- transforms


def test_parts_lie_within_the_image_and_have_the_area_and_the_ratio_asked_for():
    random = np.random.default_rng(1)
    parts = np.array([transforms.part(600, 400, random) for _ in range(2000)])
    left, top, width, height = parts.T
    assert (parts[:, :2] >= 0).all() and (left + width <= 600).all() and (top + height <= 400).all()
    area, ratio = width * height / 240_000, width / height
    assert area.min() > 0.07 and area.max() > 0.85
    assert ratio.min() > 0.7 and ratio.max() < 1.43
    assert abs(np.mean(np.log(ratio[area < 0.4]))) < 0.02  # of small parts none is too wide
    assert left.max() > 380 and top.max() > 240


def test_images_that_no_part_fits_give_their_middle():
    left, top, width, height = transforms.part(100, 2, np.random.default_rng(0))
    assert (top, height) == (0, 2) and width <= 3 and left == (100 - width) // 2


def test_half_of_the_images_are_mirrored():
    ramp = np.broadcast_to(np.arange(0, 250, 5, dtype=np.uint8)[None, :, None], (50, 50, 3))
    random = np.random.default_rng(0)
    slopes = [np.diff(transforms.RandomPart(8)(ramp, random)[4, :, 0]).mean() for _ in range(200)]
    assert 70 < np.sum(np.array(slopes) < 0) < 130


def test_the_middle_is_of_the_image_with_its_shorter_side_scaled():
    image = np.zeros((40, 92, 3), np.uint8)
    image[:, 45:47] = 255
    found = transforms.Middle(14, 20)(image)  # scaled by a half
    assert found.shape == (14, 14, 3)
    white, black = transforms.normalise(np.array([[[255] * 3], [[0] * 3]], np.uint8))
    np.testing.assert_allclose(found[:, 0], np.broadcast_to(black, (14, 3)))
    assert (found[:, 6:8] > (white + black) / 2).all()
    np.testing.assert_allclose(found, found[:, ::-1], atol=0.1)
    np.testing.assert_allclose(white[0], [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225], rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------- cifar


def write_cifar(path, name, binary):
    """Two images for each file, as distributed; returns all of them by file."""
    files = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"] if name == "cifar10" else ["train", "test"]
    written = {}
    for k, file in enumerate(files):
        images = RNG.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
        labels = [k, 9 - k]
        rows = images.transpose(0, 3, 1, 2).reshape(2, -1)
        if binary:
            front = [[label] if name == "cifar10" else [5, label] for label in labels]
            (path / f"{file}.bin").write_bytes(np.concatenate([np.array(front, np.uint8), rows], 1).tobytes())
        else:
            key = "labels" if name == "cifar10" else "fine_labels"
            content = {b"data": rows, key.encode(): labels, b"coarse_labels": [5, 5]}
            (path / file).write_bytes(pickle.dumps({k.decode(): v for k, v in content.items()}, protocol=2))
        written[file] = images, labels
    return written


FOLDERS = {
    ("cifar10", False): "cifar-10-batches-py",
    ("cifar10", True): "cifar-10-batches-bin",
    ("cifar100", False): "cifar-100-python",
    ("cifar100", True): "cifar-100-binary",
}


@pytest.mark.parametrize("folder", ["", "unpacked"])
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_as_distributed(tmp_path, name, binary, folder):
    below = FOLDERS[name, binary]
    path = tmp_path / below if folder else tmp_path
    path.mkdir(exist_ok=True)
    *train, test = write_cifar(path, name, binary).values()
    found = cifar.read(name, tmp_path)
    for (images, labels), parts in zip(found, (train, [test]), strict=True):
        np.testing.assert_array_equal(images, np.concatenate([part[0] for part in parts]))
        np.testing.assert_array_equal(labels, np.concatenate([part[1] for part in parts]))
        assert images.dtype == np.uint8 and labels.dtype == np.int32


def test_cifar_that_is_missing_or_damaged(tmp_path):
    with pytest.raises(DataError, match="nowhere: there is no such folder"):
        cifar.read("cifar10", tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no files of cifar10, neither test_batch or test_batch\.bin, in it"):
        cifar.read("cifar10", tmp_path)
    write_cifar(tmp_path, "cifar10", binary=True)
    (tmp_path / "data_batch_3.bin").write_bytes(b"123")
    with pytest.raises(DataError, match=r"data_batch_3\.bin: this is no file of cifar10, or it is damaged"):
        cifar.read("cifar10", tmp_path)
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match=r"data_batch_3\.bin: this file of cifar10 is missing"):
        cifar.read("cifar10", tmp_path)


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    write_cifar(tmp_path, "cifar100", binary=False)
    (tmp_path / "test").write_bytes(pickle.dumps({"data": pathlib.Path("x")}))
    with pytest.raises(DataError, match=r"test: this is no file of cifar100.*it has a pathlib"):
        cifar.read("cifar100", tmp_path)
