"""What rules, records and options say of the tensors of a checkpoint."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import nm_jax as nm
from tests.checkpoint.cases import normal
from tests.helpers import worst_group

TABLE = ("entity_embedding.weight", (40, 8))
LINEAR = ("mlp.fc1.weight", (8, 12))
MYSTERY = ("mystery.weight", (8, 16))
CONV1D = ("h.0.attn.c_proj.weight", (16, 16))
HEAD = ("lm_head.weight", (40, 8))
SCALE = ("norm.weight", (16,))


@pytest.fixture
def path(tmp_path):
    tensors = (TABLE, LINEAR, MYSTERY, CONV1D, HEAD, SCALE)
    save_file({name: normal(k, shape) for k, (name, shape) in enumerate(tensors)}, tmp_path / "in")
    return tmp_path / "in"


def pruned(path, rules, **options):
    """The axes of what is pruned, and the reasons of the rest."""
    checkpoint = nm.Checkpoint(path)
    leaves = checkpoint.resolve(rules, **options)
    axes = {name: leaf.axes for name, leaf in leaves.items() if hasattr(leaf, "axes")}
    return axes, {name: leaf.reason for name, leaf in leaves.items() if not hasattr(leaf, "axes")}


def test_what_is_not_known_stays_dense_with_a_rule_to_copy(path):
    axes, reasons = pruned(path, "2:4")
    assert axes == {LINEAR[0]: "oi"}
    assert r"--rule '^mystery\.weight$=2:4@oi'" in reasons[MYSTERY[0]]
    assert r"--rule '^h\.0\.attn\.c_proj\.weight$=2:4@oi'" in reasons[CONV1D[0]]
    assert r"--include '^lm_head\.weight$'" in reasons[HEAD[0]]
    assert "looked up" in reasons[TABLE[0]]


def test_a_transposable_mask_needs_no_orientation(path):
    axes, reasons = pruned(path, "2:4-T")
    assert set(axes) == {LINEAR[0], CONV1D[0]}
    assert MYSTERY[0] in reasons  # it may be a table


def test_include(path):
    assert pruned(path, "2:4", include=["head"])[0] == {LINEAR[0]: "oi", HEAD[0]: "oi"}
    assert TABLE[0] in pruned(path, "2:4", include=["."])[1]  # nothing is known to contract it
    with pytest.raises(ValueError, match="include 'tail' matches none"):
        pruned(path, "2:4", include=["tail"])
    with pytest.raises(ValueError, match="regular expression"):
        pruned(path, "2:4", include=["("])


def test_strict_lists_all_that_is_not_known(path):
    with pytest.raises(ValueError, match=r"2 tensors(.|\n)*c_proj(.|\n)*mystery"):
        pruned(path, "2:4", strict=True)
    pruned(path, [("mystery", None), ("c_proj", "2:4", "io"), "2:4"], strict=True)


def test_a_rule_names_a_layer(path):
    """It says that there is a layer, not along which axes; those are what is known, or the way out."""
    axes, reasons = pruned(path, [("mystery", "2:4"), ("c_proj", "2:4"), ("head", "2:4"), ("entity", "2:4")])
    assert axes == {MYSTERY[0]: "oi", HEAD[0]: "oi"}
    assert "@oi" in reasons[CONV1D[0]]
    assert "looked up" in reasons[TABLE[0]]
    assert pruned(path, [("c_proj", "2:4", "io"), ("entity", "2:4", "oi")])[0] == {CONV1D[0]: "io", TABLE[0]: "oi"}
    with pytest.raises(ValueError, match="has 2 dimensions"):
        pruned(path, [("c_proj", "2:4", "boi")])


@pytest.mark.parametrize("regex", [r"h/0/attn", r"h\.0\.attn"])
def test_names_with_dots_and_with_slashes(path, regex):
    assert pruned(path, [(regex, "2:4", "io")])[0] == {CONV1D[0]: "io"}


def test_rules_on_dtypes_that_are_never_pruned(tmp_path):
    tensors = {"down.weight": np.ones((8, 8), np.int8), "up.weight": normal(0, (8, 8)), "fc.bias": normal(1, (8,))}
    save_file(tensors, tmp_path / "in")
    with pytest.raises(ValueError, match=r"down.weight: the rule 'down' gives it 2:4, but it is I8"):
        pruned(tmp_path / "in", [("down", "2:4"), "2:4"])
    assert pruned(tmp_path / "in", [("down", None), "2:4"])[0] == {"up.weight": "oi"}
    assert "dtype I8" in pruned(tmp_path / "in", [("weight", "2:4")])[1]["down.weight"]
    with pytest.raises(ValueError, match="'nothing' matches none"):
        pruned(tmp_path / "in", [("nothing", "2:4")])


def test_the_record_says_on_what_axes_rest(path, tmp_path):
    rules = [("c_proj", "2:4", "io"), "2:4-T"]
    nm.prune_checkpoint(path, tmp_path / "out", rules)
    report = nm.verify_checkpoint(tmp_path / "out")
    assert report["h.0.attn.c_proj.weight"].record.source == "the rule 'c_proj'"
    assert report["mlp.fc1.weight"].record.source == "name: fc1 is a linear layer"
    # A later run takes the axes of the record.
    assert pruned(tmp_path / "out", "1:4")[0][CONV1D[0]] == "io"


def test_axes_of_either_orientation_stay_unknown(path, tmp_path):
    nm.prune_checkpoint(path, tmp_path / "out", "2:4-T")
    record = nm.verify_checkpoint(tmp_path / "out")["h.0.attn.c_proj.weight"].record
    assert record.source.startswith("either orientation")
    assert worst_group(load_file(tmp_path / "out")[CONV1D[0]], 0, 4) == 2
    assert CONV1D[0] in pruned(tmp_path / "out", "1:4")[1]
    assert CONV1D[0] in pruned(tmp_path / "out", "1:4-T")[0]


def test_records_from_before_have_no_source(path, tmp_path):
    nm.prune_checkpoint(path, tmp_path / "out", "2:4-T")
    tensors = load_file(tmp_path / "out")
    checkpoint = nm.Checkpoint(tmp_path / "out")
    table = json.loads(checkpoint.files[0].metadata["nm_jax"])
    for record in table["tensors"].values():
        del record["source"]
    save_file(tensors, tmp_path / "old", metadata={"nm_jax": json.dumps(table)})
    report = nm.verify_checkpoint(tmp_path / "old")
    assert report.ok
    assert {tensor.record.source for tensor in report.tensors} == {""}


def test_nothing_to_verify_is_one(path):
    with pytest.raises(ValueError, match=r"no tensor is known to be sparse(.|\n)*mystery"):
        nm.verify_checkpoint(path, [("mystery", None), ("entity", "2:4")])


def test_a_config_that_cannot_be_read_says_nothing(tmp_path):
    save_file({LINEAR[0]: normal(0, LINEAR[1])}, tmp_path / "in")
    for text in ("{", "[]", '{"model_type": 3}', "null"):
        (tmp_path / "config.json").write_text(text)
        assert pruned(tmp_path / "in", "2:4")[0] == {LINEAR[0]: "oi"}
