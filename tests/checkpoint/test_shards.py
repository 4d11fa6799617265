"""Checkpoints of several files."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file

import nm_jax as nm
from tests.checkpoint.cases import bits


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
