"""What is found in a checkpoint."""

import itertools
import json

import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

import nm_jax as nm
from nm_jax._core.rules import SparseLeaf
from nm_jax.checkpoint import Checked, TensorReport
from nm_jax.checkpoint import _tiles as tiles
from nm_jax.checkpoint import _verify as verify
from nm_jax.checkpoint._records import Record
from nm_jax.checkpoint._tensorfile import TensorFile
from tests.checkpoint.cases import bits, normal


def test_verify_sees_what_was_broken(model, tmp_path):
    path, _ = model
    nm.prune_checkpoint(path, tmp_path / "out", "2:4-T")
    report = nm.verify_checkpoint(tmp_path / "out")
    assert report.ok
    assert "all have their pattern" in str(report)
    entry = TensorFile(tmp_path / "out").entries["layers.0.weight"]
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
        "odd.fc.weight": ("2:4", "oi"),
    }


def test_counts_beyond_an_int32(monkeypatch):
    """A mask of more entries than memory holds: one byte for all of them, by its strides."""
    size = 1 << 32
    kept = np.broadcast_to(np.array([True]), (1 << 16, 1 << 16))
    monkeypatch.setattr(np, "count_nonzero", lambda mask: size)
    half = SparseLeaf("w", kept.shape, nm.Unstructured(0.5), "oi")
    assert tiles.broken_tiles(kept, half) == 1
    monkeypatch.setattr(np, "count_nonzero", lambda mask: size // 2)
    assert tiles.broken_tiles(kept, half) == 0


def test_reports_of_counts_beyond_an_int32():
    """80 layers of 8192 x 28672 in one tensor."""
    shape = (80, 28672, 8192)
    size = 80 * 28672 * 8192
    record = Record(nm.NM(2, 4), "boi", "BF16", shape, "dense", size // 2, 0.75, 0.95, 0.0)
    groups = (0, 0, size // 4, 0, 0)
    report = TensorReport("layers", record, Checked(groups, groups, 0, 0))
    table = nm.CheckpointReport("x", (report,), ()).to_json()
    assert table["tensors"][0]["kept"] == size // 2
    assert table["tensors"][0]["groups"]["contraction"] == list(groups)
    assert "50.0%" in str(nm.CheckpointReport("x", (report,), ()))
    assert Record.from_json("layers", json.loads(json.dumps(record.to_json()))) == record


def test_groups_are_counted_part_by_part(monkeypatch):
    kept = np.random.default_rng(0).random((3, 24, 40)) < 0.5
    leaf = SparseLeaf("w", kept.shape, nm.NM(2, 4), "bio")
    expected = verify._groups(kept, leaf)
    monkeypatch.setattr(verify, "_ROWS", 2)
    assert verify._groups(kept, leaf) == expected
    counts = kept.reshape(3, 6, 4, 40).sum(axis=2)
    assert expected[0] == tuple(int((counts == k).sum()) for k in range(5))


def test_reasons_are_recorded(tmp_path):
    save_file(
        {"a.weight": normal(0, (8, 8)), "a.bias": normal(1, (8,)), "b.weight": normal(2, (8, 8))}, tmp_path / "in"
    )
    report = nm.prune_checkpoint(tmp_path / "in", tmp_path / "out", [("^b", None), "2:4"])
    assert nm.verify_checkpoint(tmp_path / "out").dense == report.dense
    assert {tensor.name for tensor in report.dense} == {"a.bias", "b.weight"}
