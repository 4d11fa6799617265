"""Packed tensors and stored masks."""

import itertools

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import nm_jax as nm
from nm_jax.checkpoint import _packed as packed
from nm_jax.checkpoint import unpack_checkpoint
from tests.checkpoint.cases import DTYPES, LAYOUTS, PRUNED, bits, normal
from tests.helpers import worst_group


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
        assert (masks[name] is None) == (name not in (*PRUNED, "odd.fc.weight"))
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
    patterns = {tensor.name: str(tensor.record.pattern) for tensor in report.tensors}
    assert patterns == {"layers.0.weight": "1:4", "params.Dense_0.kernel": "1:4", "conv.weight": "2:4"}
    assert nm.verify_checkpoint(tmp_path / "second").ok


@pytest.mark.parametrize("layout", [{}, *LAYOUTS], ids=["dense", "packed", "masks"])
@pytest.mark.parametrize("first", [{}, *LAYOUTS], ids=["from_dense", "from_packed", "from_masks"])
def test_a_second_run_keeps_the_records_of_the_first(tmp_path, first, layout):
    """What it does not prune keeps its pattern, and is verified still."""
    tensors = {"attn.weight": normal(0, (8, 16)), "mlp.weight": normal(1, (8, 16)), "b.weight": normal(2, (8, 16))}
    save_file(tensors, tmp_path / "in")
    nm.prune_checkpoint(tmp_path / "in", tmp_path / "one", [("attn", "2:4-T")], **first)
    once = nm.verify_checkpoint(tmp_path / "one")["attn.weight"].record
    report = nm.prune_checkpoint(tmp_path / "one", tmp_path / "two", [("attn", None), ("mlp", "1:4")], **layout)
    patterns = {tensor.name: str(tensor.record.pattern) for tensor in report.tensors}
    assert patterns == {"attn.weight": "2:4-T", "mlp.weight": "1:4"}
    verified = nm.verify_checkpoint(tmp_path / "two")
    assert verified.ok
    assert {tensor.name: str(tensor.record.pattern) for tensor in verified.tensors} == patterns
    assert verified["attn.weight"].record.retained == once.retained
    assert [(tensor.name, tensor.reason) for tensor in verified.dense] == [("b.weight", "no rule matches")]
    before, after = (nm.load_checkpoint(tmp_path / name)[0]["attn.weight"] for name in ("one", "two"))
    np.testing.assert_array_equal(before, after)
    masked = "keep_masks" in layout or ("keep_masks" in first and not layout)
    assert ("attn.weight.nm_mask" in load_file(tmp_path / "two")) == masked


@pytest.mark.parametrize("layout", LAYOUTS, ids=["packed", "masks"])
def test_unpacking(model, tmp_path, layout):
    path, _ = model
    nm.prune_checkpoint(path, tmp_path / "dense", "2:4")
    nm.prune_checkpoint(path, tmp_path / "other", "2:4", **layout)
    unpack_checkpoint(tmp_path / "other", tmp_path / "again")
    expected, found = load_file(tmp_path / "dense"), load_file(tmp_path / "again")
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(bits(found[name]), bits(array))
    one, other = (nm.verify_checkpoint(tmp_path / name).to_json() for name in ("dense", "again"))
    assert {**one, "path": ""} == {**other, "path": ""}
    with pytest.raises(ValueError, match="nothing to unpack"):
        unpack_checkpoint(path, tmp_path / "more")


def test_a_carried_tensor_with_fewer_than_two_of_four_is_packed_with_its_mask(tmp_path):
    weight = np.zeros((8, 16), np.float32)
    weight[:, ::4] = 1
    save_file({"attn.weight": weight, "mlp.weight": normal(1, (8, 16))}, tmp_path / "in")
    nm.prune_checkpoint(tmp_path / "in", tmp_path / "one", [("attn", "2:4")])
    nm.prune_checkpoint(tmp_path / "one", tmp_path / "two", [("mlp", "2:4")], packed=True)
    assert {"attn.weight.nm_mask", "mlp.weight.nm_positions"} < set(load_file(tmp_path / "two"))
    np.testing.assert_array_equal(nm.load_checkpoint(tmp_path / "two")[0]["attn.weight"], weight)
    assert nm.verify_checkpoint(tmp_path / "two").ok
