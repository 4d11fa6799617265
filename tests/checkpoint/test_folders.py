"""Folders of models, as they are downloaded: what comes out beside the tensors."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import nm_jax as nm
from tests.checkpoint.cases import normal


@pytest.fixture
def folder(tmp_path):
    """A model's folder, with one file of weights."""
    path = tmp_path / "model"
    (path / "onnx").mkdir(parents=True)
    (path / ".cache").mkdir()
    save_file({"a.weight": normal(0, (8, 8))}, path / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json", "onnx/config.json", ".gitattributes", ".cache/lock"):
        (path / name).write_text(f'{{"name": "{name}"}}')
    (path / "linked.json").symlink_to(path / "config.json")
    (path / "dangling").symlink_to(path / "nowhere")
    return path


COPIED = {".gitattributes", "config.json", "linked.json", "onnx/config.json", "tokenizer.json"}


def files(path):
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def test_a_folder_gives_a_folder(folder, tmp_path):
    report = nm.prune_checkpoint(folder, tmp_path / "out", "2:4")
    assert files(tmp_path / "out") == {*COPIED, "model.safetensors"}
    assert set(report.copied) == COPIED
    assert not (tmp_path / "out" / "linked.json").is_symlink()
    for name in COPIED:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert nm.verify_checkpoint(tmp_path / "out").ok
    assert np.count_nonzero(load_file(tmp_path / "out" / "model.safetensors")["a.weight"]) == 32


def test_shards_with_a_folder_around_them(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    names = {f"l{k}.weight": f"model-0000{k}-of-00002.safetensors" for k in (1, 2)}
    for k, (name, file) in enumerate(names.items()):
        save_file({name: normal(k, (8, 8))}, folder / file)
    index = {"metadata": {"total_size": 512}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    nm.prune_checkpoint(folder, tmp_path / "out", "2:4", packed=True)
    assert files(tmp_path / "out") == {*COPIED, *names.values(), "model.safetensors.index.json"}
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert written["metadata"]["total_size"] == 2 * (128 + 8)
    assert set(written["weight_map"].values()) == set(names.values())


def test_several_variants_are_named(folder, tmp_path):
    save_file({"a.weight": normal(0, (8, 8))}, folder / "model.fp16.safetensors")
    with pytest.raises(
        nm.FormatError, match=r"2 files without an index: model\.fp16\.safetensors, model\.saf.*give the"
    ):
        nm.prune_checkpoint(folder, tmp_path / "out", "2:4")
    for name in ("one", "two"):
        (folder / f"{name}.safetensors.index.json").write_text("{}")
    with pytest.raises(nm.FormatError, match=r"2 indices: one\.safetensors\.index\.json, two"):
        nm.prune_checkpoint(folder, tmp_path / "out", "2:4")


def test_a_folder_of_folders_names_them(folder, tmp_path):
    with pytest.raises(nm.FormatError, match="some in its folders model: give one"):
        nm.prune_checkpoint(tmp_path, tmp_path / "out", "2:4")


@pytest.mark.parametrize("target", ["model/out", "model"])
def test_the_output_does_not_lie_in_the_input(folder, tmp_path, target):
    with pytest.raises(ValueError, match="write somewhere else"):
        nm.prune_checkpoint(folder, tmp_path / target, "2:4", overwrite=True)
    assert files(folder) == {*COPIED, ".cache/lock", "model.safetensors"}


def test_overwriting(folder, tmp_path):
    nm.prune_checkpoint(folder, tmp_path / "out", "2:4")
    (tmp_path / "out" / "old").touch()
    with pytest.raises(FileExistsError):
        nm.prune_checkpoint(folder, tmp_path / "out", "1:4")
    nm.prune_checkpoint(folder, tmp_path / "out", "1:4", overwrite=True)
    assert files(tmp_path / "out") == {*COPIED, "model.safetensors"}
    assert np.count_nonzero(load_file(tmp_path / "out" / "model.safetensors")["a.weight"]) == 16
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]
    file = folder / "model.safetensors"
    nm.prune_checkpoint(file, tmp_path / "file", "2:4")
    nm.prune_checkpoint(file, tmp_path / "file", "1:4", overwrite=True)
    assert str(nm.verify_checkpoint(tmp_path / "file")["a.weight"].record.pattern) == "1:4"


def test_a_folder_that_is_no_checkpoint_is_not_overwritten(folder, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").touch()
    for source in (folder, folder / "model.safetensors"):
        with pytest.raises(FileExistsError):
            nm.prune_checkpoint(source, tmp_path / "thesis", "2:4", overwrite=True)
    assert (tmp_path / "thesis" / "chapter").exists()


def test_tied_tensors_stay_dense_together(tmp_path):
    """A token table that is stored again as the output head; readers take either."""
    table, other = normal(0, (16, 8)), normal(1, (16, 8))
    zero = np.zeros((16, 8), np.float32)
    tensors = {
        "embed_tokens.weight": table,
        "proj.weight": table,
        "fc.weight": other,
        "a.weight": zero,
        "b.weight": zero,
    }
    save_file(tensors, tmp_path / "in")
    rules = [("embed_tokens|a/", None), ("proj|fc|b/", "2:4", "oi")]
    report = nm.prune_checkpoint(tmp_path / "in", tmp_path / "out", rules)
    assert {tensor.name for tensor in report.tensors} == {"fc.weight", "b.weight"}
    reasons = {tensor.name: tensor.reason for tensor in report.dense}
    assert "'embed_tokens.weight' is the same" in reasons["proj.weight"]
    assert "stored twice, as 'proj.weight'" in reasons["embed_tokens.weight"]
    np.testing.assert_array_equal(load_file(tmp_path / "out")["proj.weight"], table)
    both = nm.prune_checkpoint(tmp_path / "in", tmp_path / "both", [("embed_tokens|proj", "2:4", "oi")])
    assert {tensor.name for tensor in both.tensors} == {"embed_tokens.weight", "proj.weight"}
    pruned = load_file(tmp_path / "both")
    np.testing.assert_array_equal(pruned["proj.weight"], pruned["embed_tokens.weight"])
