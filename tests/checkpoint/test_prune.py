"""Checkpoints in and out, against the format's own library and plain numpy."""

import itertools
import json
import os
import tracemalloc
from concurrent.futures import CancelledError

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

import nm_jax as nm
from nm_jax._core.rules import SparseLeaf
from nm_jax.checkpoint import _tiles as tiles
from tests.checkpoint.cases import DTYPES, PRUNED, bits, normal
from tests.helpers import best_by_enumeration, worst_group
from tests.helpers import tiles as blocks_of


def contracted(name):
    return 0 if name.endswith("kernel") else 1


def output(name):
    return 1 - contracted(name)


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
    assert "not a multiple of 4" in reasons["odd.fc.weight"]
    assert reasons["quantised.weight"] == "dtype I8 is copied as it is"
    assert set(reasons) | set(PRUNED) == set(model[1])


@pytest.mark.parametrize(
    ("name", "shape", "rule", "dimension"),
    [
        ("a.weight", (8, 12), "2:4", 1),
        ("a.weight", (8, 12, 3, 3), "2:4", 1),
        ("a.kernel", (8, 12), "2:4", 0),
        ("a.kernel", (3, 3, 8, 12), "2:4", 2),
        ("a.weight", (8, 12), [("a/weight", "2:4", "io")], 0),
        ("experts", (3, 8, 12), [("experts", "2:4", "boi")], 2),
        ("a.w", (8, 12), [("w", "2:4", "io")], 0),
        ("a.mystery.weight", (8, 12), [("mystery", "2:4")], 1),
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
    assert found.proof.proved and found.proof.gap == 0
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
    assert found == {"odd.fc.weight": "2:4", "conv.weight": "4:8-T", "params.Dense_0.kernel": "4:8-T"}


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


def test_a_mask_is_not_looked_for_any_longer(monkeypatch):
    """The search ends between chunks, once somebody says so."""
    monkeypatch.setattr(tiles, "_CHUNK", 64)
    asked = []

    def stopped():
        asked.append(None)
        return len(asked) > 2

    weight = normal(0, (32, 32))
    with pytest.raises(CancelledError):
        tiles.find_mask(weight, SparseLeaf("w", (32, 32), nm.NM(2, 4), "oi"), nm.solvers.TopK(), stopped=stopped)
    assert len(asked) == 3


@pytest.mark.slow
def test_memory_is_a_few_times_the_largest_tensor(tmp_path):
    """Not that of the file, which has sixteen."""
    size = 4 * 1024 * 1024
    weight = normal(0, (1024, 1024))
    save_file({f"layers.{k}.fc.weight": weight + k for k in range(16)}, tmp_path / "in")
    nm.prune_checkpoint(tmp_path / "in", tmp_path / "warm", "2:4")
    tracemalloc.start()
    nm.prune_checkpoint(tmp_path / "in", tmp_path / "out", "2:4")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < peak < 8 * size
