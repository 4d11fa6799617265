"""Checkpoints in and out, against the format's own library and plain numpy."""

import functools
import itertools
import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

import nm_jax as nm
from nm_jax._core.rules import SparseLeaf
from nm_jax.checkpoint import _packed as packed
from nm_jax.checkpoint import _tiles as tiles
from nm_jax.checkpoint._tensorfile import TensorFile
from tests.helpers import best_by_enumeration, worst_group
from tests.helpers import tiles as blocks_of

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def bits(array):
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def normal(seed, shape, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.fixture
def model(tmp_path):
    """A file with weights of both frameworks and of every dtype that is pruned, and others."""
    tensors = {
        "layers.0.weight": normal(0, (16, 24)),
        "layers.0.bias": normal(1, (16,)),
        "conv.weight": normal(2, (8, 12, 3, 3), np.float16),
        "params.Dense_0.kernel": normal(3, (12, 20), ml_dtypes.bfloat16),
        "embed_tokens.weight": normal(4, (40, 8)),
        "odd.weight": normal(5, (6, 7)),
        "ids": np.arange(7),
        "double.weight": normal(6, (8, 8), np.float64),
        "quantised.weight": np.full((8, 8), 3, np.int8),
        "scalar": np.float32(2.5),
        "nothing": np.zeros((0, 4), np.float32),
        "flags": np.array([True, False]),
    }
    path = tmp_path / "model.safetensors"
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path, metadata={"format": "pt"})
    return path, load_file(path)


PRUNED = ("layers.0.weight", "conv.weight", "params.Dense_0.kernel")


def contracted(name):
    return 0 if name.endswith("kernel") else 1


def output(name):
    return 1 - contracted(name)


# -------------------------------------------------------------------------------------------------------------- prune


def test_any_reader_reads_what_was_pruned(model, tmp_path):
    path, before = model
    report = nm.prune_checkpoint(path, tmp_path / "out.safetensors", "2:4-T")
    after = load_file(tmp_path / "out.safetensors")
    assert {name: (a.dtype, a.shape) for name, a in after.items()} == {
        name: (b.dtype, b.shape) for name, b in before.items()
    }
    assert {tensor.name for tensor in report.tensors} == set(PRUNED)
    for name, array in before.items():
        if name not in PRUNED:
            np.testing.assert_array_equal(bits(after[name]), bits(array))
            continue
        kept = bits(after[name]) != 0
        np.testing.assert_array_equal(bits(after[name])[kept], bits(array)[kept])
        assert worst_group(after[name], 0, 4) == worst_group(after[name], 1, 4) == 2
        assert kept.mean() == 0.5
    with safetensors.safe_open(tmp_path / "out.safetensors", "np") as file:
        assert file.metadata()["format"] == "pt"


def test_reasons_of_what_stays_dense(model, tmp_path):
    report = nm.prune_checkpoint(model[0], tmp_path / "out.safetensors", "2:4-T")
    reasons = {tensor.name: tensor.reason for tensor in report.dense}
    assert "1-D" in reasons["layers.0.bias"]
    assert "embedding" in reasons["embed_tokens.weight"]
    assert "not a multiple of 4" in reasons["odd.weight"]
    assert reasons["quantised.weight"] == "dtype I8 is copied as it is"
    assert set(reasons) | set(PRUNED) == set(model[1])


@pytest.mark.parametrize(
    ("name", "shape", "rule", "dimension"),
    [
        ("a.weight", (8, 12), "2:4", 1),
        ("a.weight", (8, 12, 3, 3), "2:4", 1),
        ("a.kernel", (8, 12), "2:4", 0),
        ("a.kernel", (3, 3, 8, 12), "2:4", 2),
        ("a.query.kernel", (8, 4, 6), "2:4", 0),
        ("a.weight", (8, 12), [("a/weight", "2:4", "io")], 0),
        ("experts", (3, 8, 12), [("experts", "2:4", "boi")], 2),
        ("a.w", (8, 12), [("w", "2:4")], 0),
    ],
)
def test_groups_run_along_the_contraction(tmp_path, name, shape, rule, dimension):
    save_file({name: normal(0, shape)}, tmp_path / "in")
    nm.prune_checkpoint(tmp_path / "in", tmp_path / "out", rule)
    pruned = load_file(tmp_path / "out")[name]
    for other in range(len(shape)):
        assert (worst_group(pruned, other, 4) == 2) == (other == dimension)


@pytest.mark.parametrize("axes", ["io", "oi"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_best_mask_is_found(axes, dtype):
    """Each block against all 90 masks of it, and every number of the report against plain numpy."""
    shape = (20, 12)
    weight = normal(0, shape, dtype)
    pattern = nm.TransposableNM(2, 4)
    found = tiles.find_mask(weight, SparseLeaf("w", shape, pattern, axes), nm.solvers.Exact())
    magnitude = np.abs(weight.astype(np.float64))
    best = sum(best_by_enumeration(block, pattern) for block in blocks_of(magnitude, 4, 4))
    assert magnitude[found.mask].sum() == pytest.approx(best, rel=1e-6)
    assert found.retained == pytest.approx(best, rel=1e-6)
    assert found.total == pytest.approx(magnitude.sum(), rel=1e-6)
    assert found.gap == 0
    count = int(found.mask.sum())
    largest = np.sort(magnitude, axis=None)[-count:].sum()
    assert tiles.largest_sum(weight, count) == pytest.approx(largest, rel=1e-6)


@pytest.mark.parametrize(
    ("pattern", "axes", "shape"),
    [
        ("2:4", "oi", (9, 11)),
        ("2:4", "iio", (3, 4, 8)),
        ("3:5-T", "io", (11, 9)),
        ("3:5-T", "oi", (9, 11)),
        ("3:5-T", "bio", (3, 10, 5)),
        ("3:5-T", "oibb", (4, 8, 3, 2)),
        ("2:4-S", "oib", (4, 8, 3)),
        ("US-0.7", "bio", (3, 6, 7)),
    ],
)
def test_masks_are_those_of_solve(pattern, axes, shape):
    """Tile order and padding change nothing: small tensors through both ways."""
    weight = normal(1, shape)
    pattern = nm.parse_pattern(pattern)
    transposable = isinstance(pattern, nm.TransposableNM)
    solver = nm.solvers.Greedy() if transposable else nm.solvers.default_solver(pattern)
    found = tiles.find_mask(weight, SparseLeaf("w", shape, pattern, axes), solver)
    solved = nm.solve(jnp.abs(weight), pattern, solver, axes=axes, partial="pad")
    np.testing.assert_array_equal(found.mask, np.asarray(solved))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "wide", "subnormal"])
def test_sum_of_the_largest(monkeypatch, dtype, kind):
    monkeypatch.setattr(tiles, "_CHUNK", 100)
    weight = normal(0, (30, 31))
    if kind == "ties":
        weight = np.round(weight)
    elif kind == "zeros":
        weight = weight * (np.random.default_rng(1).random(weight.shape) < 0.3)
    elif kind == "wide":
        weight = np.sign(weight) * 2.0 ** np.random.default_rng(1).uniform(-14, 14, weight.shape)
    elif kind == "subnormal":
        weight = weight * float(ml_dtypes.finfo(dtype).tiny)
    weight = weight.astype(dtype)
    magnitude = np.sort(np.abs(weight.astype(np.float64)), axis=None)
    for count in (0, 1, 300, 465, 929, 930):
        expected = magnitude[magnitude.size - count :].sum()
        assert tiles.largest_sum(weight, count) == pytest.approx(expected, rel=1e-6, abs=0)


def test_more_tiles_than_a_chunk(monkeypatch):
    monkeypatch.setattr(tiles, "_CHUNK", 64)
    weight = normal(2, (20, 36))
    leaf = SparseLeaf("w", weight.shape, nm.TransposableNM(2, 4), "oi")
    found = tiles.find_mask(weight, leaf, nm.solvers.Greedy())
    solved = nm.solve(jnp.abs(weight), leaf.pattern, nm.solvers.Greedy(), axes="oi")
    np.testing.assert_array_equal(found.mask, np.asarray(solved))
    assert tiles.broken_tiles(found.mask, leaf) == 0
    assert tiles.broken_tiles(~found.mask | True, leaf) == 45


def test_a_solver_is_compiled_once_for_all_shapes_and_dtypes(tmp_path):
    shapes = [(8, 16), (16, 8), (12, 4), (4, 36)]
    tensors = {
        f"l{k}.weight": normal(k, shape, dtype) for k, (shape, dtype) in enumerate(itertools.product(shapes, DTYPES))
    }
    save_file(tensors, tmp_path / "in")
    before = tiles._solve._cache_size()
    nm.prune_checkpoint(tmp_path / "in", tmp_path / "out", "1:4-T", solver=nm.solvers.Greedy())
    assert tiles._solve._cache_size() == before + 1


def test_a_bare_pattern_takes_what_no_rule_matches(model, tmp_path):
    rules = [("layers", None), ("odd", "2:4", "oi"), "4:8-T"]
    report = nm.prune_checkpoint(model[0], tmp_path / "out", rules, partial="pad", solver=nm.solvers.Greedy())
    found = {tensor.name: str(tensor.record.pattern) for tensor in report.tensors}
    assert found == {"odd.weight": "2:4", "conv.weight": "4:8-T", "params.Dense_0.kernel": "4:8-T"}


@pytest.mark.slow
def test_at_most_retains_no_less(tmp_path):
    save_file({"a.weight": normal(0, (64, 64))}, tmp_path / "in")
    exactly = nm.prune_checkpoint(tmp_path / "in", tmp_path / "exactly", "2:4-T")["a.weight"].record
    at_most = nm.prune_checkpoint(tmp_path / "in", tmp_path / "at_most", "2:4-T-at-most")["a.weight"].record
    assert at_most.retained >= exactly.retained
    assert at_most.kept <= exactly.kept
    assert nm.verify_checkpoint(tmp_path / "at_most").ok


def test_infinities_are_kept_and_shares_unknown(tmp_path):
    weight = normal(0, (8, 8))
    weight[3, 5] = np.inf
    save_file({"a.weight": weight}, tmp_path / "in")
    report = nm.prune_checkpoint(tmp_path / "in", tmp_path / "out", "2:4-T")
    assert load_file(tmp_path / "out")["a.weight"][3, 5] == np.inf
    assert report["a.weight"].record.retained is None
    assert json.dumps(report.to_json(), allow_nan=False)


# ------------------------------------------------------------------------------------------------------------- layouts

LAYOUTS = [{"packed": True}, {"keep_masks": True}]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["packed", "masks"])
@pytest.mark.parametrize("pattern", ["2:4", "2:4-T", "2:4-S", "1:4", "2:4-T-at-most", "US-0.7"])
def test_layouts_give_back_the_dense_tensors_and_their_masks(model, tmp_path, pattern, layout):
    path, _ = model
    nm.prune_checkpoint(path, tmp_path / "dense", pattern, partial="pad")
    nm.prune_checkpoint(path, tmp_path / "other", pattern, partial="pad", **layout)
    dense = load_file(tmp_path / "dense")
    params, masks = nm.load_checkpoint(tmp_path / "other")
    assert set(params) == set(dense)
    for name, array in dense.items():
        assert params[name].dtype == array.dtype
        np.testing.assert_array_equal(bits(params[name]), bits(array))
        assert (masks[name] is None) == (name not in (*PRUNED, "odd.weight"))
        if masks[name] is not None:
            np.testing.assert_array_equal(masks[name], bits(array) != 0)  # no weight of the model is zero
    assert nm.verify_checkpoint(tmp_path / "other").ok


def test_packed_two_of_four_takes_nine_sixteenths(tmp_path):
    save_file({"a.weight": normal(0, (64, 64), np.float16)}, tmp_path / "in")
    nm.prune_checkpoint(tmp_path / "in", tmp_path / "out", "2:4", packed=True)
    stored = load_file(tmp_path / "out")
    assert {name: array.size for name, array in stored.items()} == {
        "a.weight.nm_values": 64 * 64 // 2,
        "a.weight.nm_positions": 64 * 64 // 8,
    }
    # In words of 16 bits, as sparse tensor cores read them: two bits for each kept place of 16 columns.
    pruned = nm.load_checkpoint(tmp_path / "out")[0]["a.weight"]
    words = stored["a.weight.nm_positions"].view("<u2").reshape(64, 4)
    for row, word in itertools.product(range(64), range(4)):
        places = [int(words[row, word]) >> (2 * k) & 3 for k in range(8)]
        expected = [k for group in np.split(pruned[row, 16 * word : 16 * word + 16], 4) for k in np.flatnonzero(group)]
        assert places == expected
    np.testing.assert_array_equal(stored["a.weight.nm_values"], pruned[pruned != 0])


@pytest.mark.parametrize("axes", ["io", "oi", "bio", "oib", "iio"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_of_masks(axes, dtype):
    rng = np.random.default_rng(0)
    shape = {"io": (7, 5), "oi": (7, 5), "bio": (2, 3, 5), "oib": (4, 4, 3), "iio": (2, 6, 3)}[axes]
    weight = (
        rng.integers(0, 1 << 8 * np.dtype(dtype).itemsize, shape).astype(f"u{np.dtype(dtype).itemsize}").view(dtype)
    )
    for density in (0, 0.5, 1):
        mask = rng.random(shape) < density
        values, code = packed.take(weight, mask, axes), packed.encode(mask, axes)
        assert code.nbytes == -(-mask.size // 8)
        again = packed.decode(code, shape, axes)
        np.testing.assert_array_equal(again, mask)
        np.testing.assert_array_equal(bits(packed.put(values, again, axes)), np.where(mask, bits(weight), 0))


def test_all_pairs_of_groups_as_positions():
    """Every two of four, beside every other; and a group alone."""
    pairs = list(itertools.combinations(range(4), 2))
    for low, high in itertools.product(pairs, pairs):
        mask = np.zeros((1, 8), bool)
        mask[0, list(low)] = mask[0, [4 + k for k in high]] = True
        code = packed.encode(mask, "oi", positions=True)
        assert int(code[0]) == low[0] | low[1] << 2 | high[0] << 4 | high[1] << 6
        np.testing.assert_array_equal(packed.decode(code, (1, 8), "oi", positions=True), mask)
        alone = packed.encode(mask[:, :4], "oi", positions=True)
        np.testing.assert_array_equal(packed.decode(alone, (1, 4), "oi", positions=True), mask[:, :4])


@pytest.mark.parametrize("mask", [[1, 1, 1, 0, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 1, 1, 1, 0]])
def test_positions_need_two_of_every_four(mask):
    with pytest.raises(ValueError, match="exactly 2 of every 4"):
        packed.encode(np.array([mask], bool), "oi", positions=True)


def test_codes_that_are_none():
    every = set(range(256))
    valid = {low | high << 4 for low, high in itertools.product((4, 8, 12, 9, 13, 14), repeat=2)}
    assert len(valid) == 36
    for code in every - valid:
        with pytest.raises(ValueError, match="positions"):
            packed.decode(np.array([code], np.uint8), (1, 8), "oi", positions=True)
    with pytest.raises(ValueError, match="bytes"):
        packed.decode(np.zeros(2, np.uint8), (1, 8), "oi")
    with pytest.raises(ValueError, match="more bits"):
        packed.decode(np.full(1, 255, np.uint8), (1, 7), "oi")
    with pytest.raises(ValueError, match="3 entries, but there are 2 values"):
        packed.put(np.ones(2), np.array([[True, True, True]]), "oi")


def test_kept_zeros_stay_in_the_mask(tmp_path):
    """A mask keeps its n even where weights are zero; only stored masks can tell."""
    weight = normal(0, (8, 8))
    weight[:, ::2] = 0
    save_file({"a.weight": weight}, tmp_path / "in")
    for k, layout in enumerate(LAYOUTS):
        nm.prune_checkpoint(tmp_path / "in", tmp_path / f"out{k}", "2:4-T", **layout)
        (mask,) = nm.load_checkpoint(tmp_path / f"out{k}")[1].values()
        assert (mask.reshape(8, 2, 4).sum(2) == 2).all()


def test_pruning_what_was_packed_before(model, tmp_path):
    """4:8 -> 2:4 of a packed file, and a tensor that is dense again in its layout."""
    path, _ = model
    nm.prune_checkpoint(path, tmp_path / "first", "2:4", packed=True)
    dense, _ = nm.load_checkpoint(tmp_path / "first")
    report = nm.prune_checkpoint(tmp_path / "first", tmp_path / "second", [("conv", None), "1:4"])
    after = load_file(tmp_path / "second")
    assert set(after) == set(dense)
    np.testing.assert_array_equal(after["conv.weight"], dense["conv.weight"])
    assert worst_group(after["layers.0.weight"], 1, 4) == 1
    assert {tensor.name for tensor in report.tensors} == {"layers.0.weight", "params.Dense_0.kernel"}
    assert nm.verify_checkpoint(tmp_path / "second").ok


# -------------------------------------------------------------------------------------------------------------- shards


@pytest.fixture
def sharded(model, tmp_path):
    """The same model in two shards, as Hugging Face writes them."""
    _, tensors = model
    folder = tmp_path / "sharded"
    folder.mkdir()
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for file, members in files.items():
        save_file({name: tensors[name] for name in members}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, members in files.items() for name in members}
    total = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": total, "by": "us"}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder, tensors


@pytest.mark.parametrize("given", ["folder", "index"])
def test_shards(sharded, model, tmp_path, given):
    folder, tensors = sharded
    source = folder if given == "folder" else folder / "model.safetensors.index.json"
    nm.prune_checkpoint(source, tmp_path / "out", "2:4-T")
    nm.prune_checkpoint(model[0], tmp_path / "single", "2:4-T")
    expected = load_file(tmp_path / "single")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index == json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(os.listdir(tmp_path / "out")) == set(os.listdir(folder))
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(bits(load_file(tmp_path / "out" / file)[name]), bits(expected[name]))
    assert nm.verify_checkpoint(tmp_path / "out").ok
    assert set(nm.load_checkpoint(tmp_path / "out")[0]) == set(tensors)


def test_packed_shards(sharded, tmp_path):
    folder, _ = sharded
    nm.prune_checkpoint(folder, tmp_path / "dense", "2:4-T")
    nm.prune_checkpoint(folder, tmp_path / "out", "2:4-T", packed=True)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = [load_file(tmp_path / "out" / file) for file in set(index["weight_map"].values())]
    assert {name for file in stored for name in file} == set(index["weight_map"])
    assert index["metadata"] == {
        "total_size": sum(array.nbytes for file in stored for array in file.values()),
        "by": "us",
    }
    for name, array in nm.load_checkpoint(tmp_path / "out")[0].items():
        np.testing.assert_array_equal(bits(array), bits(nm.load_checkpoint(tmp_path / "dense")[0][name]))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda index: index.pop("weight_map"), "no weight_map"),
        (lambda index: index["weight_map"].update(x="../model.safetensors"), "not the name of a file"),
        (lambda index: index["weight_map"].update(x=3), "not the name of a file"),
        (lambda index: index["weight_map"].update(x="gone.safetensors"), "gone.safetensors"),
        (lambda index: index["weight_map"].pop("ids"), "does not say that 'ids' is here"),
        (lambda index: index["weight_map"].update(x=index["weight_map"]["ids"]), "no file has the tensor 'x'"),
    ],
)
def test_indices_that_do_not_fit(sharded, tmp_path, edit, message):
    folder, _ = sharded
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))
    with pytest.raises((nm.FormatError, OSError), match=message):
        nm.prune_checkpoint(folder, tmp_path / "out", "2:4-T")
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------------------- verify


def test_verify_sees_what_was_broken(model, tmp_path):
    path, _ = model
    nm.prune_checkpoint(path, tmp_path / "out", "2:4-T")
    report = nm.verify_checkpoint(tmp_path / "out")
    assert report.ok
    assert "all have their pattern" in str(report)
    with TensorFile(tmp_path / "out") as file:
        entry = file.entries["layers.0.weight"]
    pruned = load_file(tmp_path / "out")["layers.0.weight"]
    row, column = np.argwhere(pruned == 0)[0]
    with open(tmp_path / "out", "r+b") as file:
        file.seek(entry.start + 4 * (24 * row + column))
        file.write(np.float32(1e-30).tobytes())
    report = nm.verify_checkpoint(tmp_path / "out")
    assert not report.ok
    assert {tensor.name: tensor.ok for tensor in report.tensors if not tensor.ok} == {"layers.0.weight": False}
    assert report["layers.0.weight"].violations() == {"tiles": 1, "outside_mask": 0, "contraction": 1, "output": 1}
    assert "VIOLATES 2:4-T" in str(report)


def test_counts_of_groups(tmp_path):
    """Against loops over the groups of a dense tensor with zeros at random."""
    weight = normal(0, (12, 16)) * (np.random.default_rng(1).random((12, 16)) < 0.5)
    save_file({"a.weight": weight}, tmp_path / "in")
    (report,) = nm.verify_checkpoint(tmp_path / "in", "2:4-T").tensors
    along = [[0] * 5, [0] * 5]  # contraction: dimension 1 of a PyTorch weight
    for row, start in itertools.product(range(12), range(0, 16, 4)):
        along[0][np.count_nonzero(weight[row, start : start + 4])] += 1
    for start, column in itertools.product(range(0, 12, 4), range(16)):
        along[1][np.count_nonzero(weight[start : start + 4, column])] += 1
    assert report.checked.contraction == tuple(along[0])
    assert report.checked.output == tuple(along[1])
    violations = report.violations()
    assert (violations["contraction"], violations["output"]) == (sum(along[0][3:]), sum(along[1][3:]))
    assert report.record.kept == np.count_nonzero(weight)


def test_verify_against_the_dense_checkpoint(model, tmp_path):
    path, before = model
    recorded = nm.prune_checkpoint(path, tmp_path / "out", "2:4-T")
    compared = nm.verify_checkpoint(tmp_path / "out", "2:4-T", dense=path)
    for tensor in compared.tensors:
        magnitude = np.abs(before[tensor.name].astype(np.float64))
        kept = bits(load_file(tmp_path / "out")[tensor.name]) != 0
        share = magnitude[kept].sum() / magnitude.sum()
        assert tensor.record.retained == pytest.approx(share, abs=2e-6)
        assert tensor.record.retained == pytest.approx(recorded[tensor.name].record.retained, abs=2e-6)
        of_unstructured = magnitude[kept].sum() / np.sort(magnitude, axis=None)[kept.size // 2 :].sum()
        assert tensor.record.of_unstructured == pytest.approx(of_unstructured, abs=2e-6)
        assert tensor.record.of_unstructured == pytest.approx(recorded[tensor.name].record.of_unstructured, abs=2e-6)


def test_weights_outside_a_stored_mask(tmp_path):
    save_file({"a.weight": normal(0, (8, 8))}, tmp_path / "in")
    nm.prune_checkpoint(tmp_path / "in", tmp_path / "out", "2:4-T", keep_masks=True)
    with safetensors.safe_open(tmp_path / "out", "np") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / "out")
    mask = nm.load_checkpoint(tmp_path / "out")[1]["a.weight"]
    tensors["a.weight"] = np.where(mask, 0, 1).astype(np.float32)  # what the mask prunes, and nothing else
    save_file(tensors, tmp_path / "edited", metadata=metadata)
    report = nm.verify_checkpoint(tmp_path / "edited")
    assert not report.ok
    assert report["a.weight"].violations()["outside_mask"] == 32


def test_verify_needs_a_pattern(model):
    with pytest.raises(ValueError, match="no pattern is recorded"):
        nm.verify_checkpoint(model[0])


def test_the_record_in_the_header(model, tmp_path):
    rules = [("conv", None), ("odd", "2:4", "oi"), "2:4-T"]
    nm.prune_checkpoint(model[0], tmp_path / "out", rules, partial="pad")
    with safetensors.safe_open(tmp_path / "out", "np") as file:
        record = json.loads(file.metadata()["nm_jax"])
    assert record["rules"] == [["conv", None, None], ["odd", "2:4", "oi"], "2:4-T"]
    assert {name: (r["pattern"], r["axes"]) for name, r in record["tensors"].items()} == {
        "layers.0.weight": ("2:4-T", "oi"),
        "params.Dense_0.kernel": ("2:4-T", "io"),
        "odd.weight": ("2:4", "oi"),
    }


# -------------------------------------------------------------------------------------------------------- save, load


@functools.cache
def trained():
    """A few sparse updates of a small model."""
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "params": {
            "Dense_0": {"kernel": jax.random.normal(keys[0], (8, 16)), "bias": jnp.zeros(16)},
            "Dense_1": {"kernel": jax.random.normal(keys[1], (16, 4)), "bias": jnp.zeros(4)},
        }
    }
    tx = nm.sparse_training(optax.adam(0.1), "2:4-T", solver=nm.solvers.Greedy())
    state = tx.init(params)
    for _ in range(2):
        grads = jax.tree.map(lambda p: p - 1, params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("layout", [{}, *LAYOUTS], ids=["dense", "packed", "masks"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_trained_parameters_come_back(tmp_path, dtype, layout):
    params, state = trained()
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    nm.save_checkpoint(tmp_path / "model", params, "2:4-T", masks=nm.masks(state), **layout)
    loaded, masks = nm.load_checkpoint(tmp_path / "model", like=params)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, np.asarray(b))
    kernel = masks["params"]["Dense_0"]["kernel"]
    np.testing.assert_array_equal(kernel, np.asarray(params["params"]["Dense_0"]["kernel"]) != 0)
    assert masks["params"]["Dense_0"]["bias"] is None
    assert nm.verify_checkpoint(tmp_path / "model").ok


def test_save_refuses_what_is_not_sparse(tmp_path):
    params, state = trained()
    dense = nm.dense_params(state, params)
    with pytest.raises(ValueError, match="Dense_0/kernel: it does not have the pattern 2:4-T"):
        nm.save_checkpoint(tmp_path / "model", dense, "2:4-T")
    with pytest.raises(ValueError, match="Dense_0/kernel: it is not zero where its mask prunes it"):
        nm.save_checkpoint(tmp_path / "model", dense, "2:4-T", masks=nm.masks(state))
    assert os.listdir(tmp_path) == []


def test_load_names_what_is_missing(tmp_path):
    params, _ = trained()
    nm.save_checkpoint(tmp_path / "model", params, "2:4-T")
    with pytest.raises(ValueError, match="no tensor for Dense_9/kernel; its paths are Dense_0/bias"):
        nm.load_checkpoint(tmp_path / "model", like={"Dense_9": {"kernel": 0}})


# -------------------------------------------------------------------------------------------------------------- errors


def test_nan_is_named_and_nothing_is_left(tmp_path):
    weight = normal(0, (8, 8))
    weight[0, 0] = np.nan
    save_file({"a.weight": normal(1, (8, 8)), "b.weight": weight}, tmp_path / "in")
    with pytest.raises(nm.FormatError, match=r"'b\.weight' cannot be pruned, it holds NaN"):
        nm.prune_checkpoint(tmp_path / "in", tmp_path / "out", "2:4-T")
    assert os.listdir(tmp_path) == ["in"]


def test_outputs_that_cannot_be(model, tmp_path):
    path, _ = model
    with pytest.raises(FileExistsError):
        nm.prune_checkpoint(path, path, "2:4-T")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(FileExistsError):
        nm.prune_checkpoint(path, tmp_path / "dangling", "2:4-T")
    with pytest.raises(FileNotFoundError, match="no_such"):
        nm.prune_checkpoint(path, tmp_path / "no_such" / "out", "2:4-T")


def test_the_output_has_ordinary_permissions(model, tmp_path):
    nm.prune_checkpoint(model[0], tmp_path / "out", "2:4-T")
    (tmp_path / "plain").touch()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_names_that_rules_cannot_tell_apart(tmp_path):
    save_file({"a.weight": normal(0, (8, 8)), "a/weight": normal(1, (8, 8))}, tmp_path / "in")
    with pytest.raises(nm.FormatError, match="rules cannot tell"):
        nm.prune_checkpoint(tmp_path / "in", tmp_path / "out", "2:4-T")


def test_names_that_a_layout_would_use_twice(tmp_path):
    save_file({"a.weight": normal(0, (8, 8)), "a.weight.nm_mask": np.zeros(8, np.uint8)}, tmp_path / "in")
    with pytest.raises(nm.FormatError, match=r"stored as 'a\.weight\.nm_mask'"):
        nm.prune_checkpoint(tmp_path / "in", tmp_path / "out", "2:4", keep_masks=True)
    assert os.listdir(tmp_path) == ["in"]


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(nm.FormatError, match="not a regular file"):
        nm.prune_checkpoint(tmp_path / "pipe", tmp_path / "out", "2:4-T")


# -------------------------------------------------------------------------------------------------------------- format


def write(path, header, data=b"", length=None):
    """A file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(start=0, end=16, shape=(2, 2), dtype="F32", **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end], **more}


PAIR = {"a": entry(), "b": entry(16, 32)}
# What a file may be, and is not safetensors: (header, bytes of data, length of the header that it says).
BROKEN = {
    "not_json": (b"{", 0, None),
    "a_list": ([], 0, None),
    "not_text": (b'{"\xff": 1}', 0, None),
    "half_a_surrogate": (b'{"\\ud800":' + json.dumps(entry()).encode() + b"}", 16, None),
    "longer_than_the_file": ({"a": entry()}, 16, 1 << 20),
    "longer_than_memory": ({"a": entry()}, 16, (1 << 64) - 1),
    "duplicate": (b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), 16, None),
    "too_deep": (b"[" * 100_000, 0, None),
    "overlap": ({"a": entry(), "b": entry(8, 24)}, 24, None),
    "gap": ({"a": entry(), "b": entry(20, 36)}, 36, None),
    "beyond_the_end": (PAIR, 24, None),
    "bytes_left": (PAIR, 40, None),
    "begins_late": ({"a": entry(4, 20)}, 20, None),
    "backwards": ({"a": entry(16, 0)}, 16, None),
    "negative": ({"a": entry(-16, 0)}, 16, None),
    "wrong_size": ({"a": entry(shape=(2, 3))}, 16, None),
    "huge_shape": ({"a": entry(shape=(1 << 62, 4))}, 16, None),
    "negative_shape": ({"a": entry(shape=(-2, -2))}, 16, None),
    "float_shape": ({"a": entry(shape=(2.0, 2))}, 16, None),
    "true_shape": ({"a": entry(0, 4, shape=(True, True))}, 4, None),
    "no_dtype": ({"a": {"shape": [2, 2], "data_offsets": [0, 16]}}, 16, None),
    "unknown_dtype": ({"a": entry(dtype="F33")}, 16, None),
    "three_offsets": ({"a": {**entry(), "data_offsets": [0, 8, 16]}}, 16, None),
    "nan_in_the_header": (b'{"a": NaN}', 0, None),
    "an_entry_is_a_number": ({"a": 3}, 0, None),
    "metadata_of_numbers": ({"__metadata__": {"a": 1}, **PAIR}, 32, None),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(tmp_path, name):
    header, size, length = BROKEN[name]
    path = write(tmp_path / "in", header, bytes(size), length)
    with pytest.raises(nm.FormatError) as error:
        nm.prune_checkpoint(path, tmp_path / "out", [("a", "2:4")])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["in"]
    if name != "duplicate":  # of which the format's own library takes the last; about the others it agrees
        with pytest.raises(safetensors.SafetensorError), safetensors.safe_open(path, "np"):
            pass


@pytest.mark.parametrize(
    ("start", "hint"),
    [(b"PK\x03\x04", "safetensors.torch"), (b"\x80\x02", "pickle"), (b"version https://git-lfs", "git lfs pull")],
)
def test_other_formats_get_a_hint(tmp_path, start, hint):
    (tmp_path / "in").write_bytes(start + bytes(100))
    with pytest.raises(nm.FormatError, match=hint):
        nm.verify_checkpoint(tmp_path / "in", "2:4")


def test_dtypes_that_numpy_has_not_are_copied(tmp_path):
    header = {"a.weight": entry(0, 64, (4, 4)), "f4": entry(64, 72, (4, 4), "F4"), "e8": entry(72, 76, (4,), "F8_E8M0")}
    data = normal(0, (4, 4)).tobytes() + bytes(range(12))
    nm.prune_checkpoint(write(tmp_path / "in", header, data), tmp_path / "out", "2:4")
    with TensorFile(tmp_path / "out") as file:
        assert file.entries["f4"].dtype == "F4"
        copied = b"".join(bytes(piece) for name in ("f4", "e8") for piece in file.pieces(name))
    assert copied == bytes(range(12))


def test_records_that_are_damaged(tmp_path):
    save_file({"a.weight": normal(0, (8, 8))}, tmp_path / "in")
    nm.prune_checkpoint(tmp_path / "in", tmp_path / "out", "2:4-T", packed=True)
    with safetensors.safe_open(tmp_path / "out", "np") as file:
        record = json.loads(file.metadata()["nm_jax"])
    tensors = load_file(tmp_path / "out")
    tensor = record["tensors"]["a.weight"]
    broken = [
        {"version": 2},
        {"tensors": 3},
        *(
            {"tensors": {"a.weight": {**tensor, **change}}}
            for change in (
                {"pattern": "2:4-X"},
                {"pattern": 3},
                {"axes": "ox"},
                {"axes": "oii"},
                {"shape": [8, 16]},
                {"shape": [-8, -8]},
                {"layout": "zip"},
                {"layout": ["dense"]},
                {"layout": "dense"},
                {"kept": 31},
                {"kept": True},
                {"retained": "much"},
                {"dtype": "F16"},
                {"dtype": []},
                {"more": 1},
            )
        ),
        {"tensors": {"b.weight": tensor}},
    ]
    for k, change in enumerate(broken):
        metadata = {"nm_jax": json.dumps({**record, **change})}
        save_file(tensors, tmp_path / f"broken{k}", metadata=metadata)
        with pytest.raises(nm.FormatError, match=r"version|damaged|record"):
            nm.load_checkpoint(tmp_path / f"broken{k}")


def test_positions_that_are_damaged(tmp_path):
    save_file({"a.weight": normal(0, (8, 8))}, tmp_path / "in")
    nm.prune_checkpoint(tmp_path / "in", tmp_path / "out", "2:4-T", packed=True)
    with safetensors.safe_open(tmp_path / "out", "np") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / "out")
    tensors["a.weight.nm_positions"][0] = 0
    save_file(tensors, tmp_path / "broken", metadata=metadata)
    with pytest.raises(nm.FormatError, match=r"'a.weight' is damaged \(its positions"):
        nm.load_checkpoint(tmp_path / "broken")
