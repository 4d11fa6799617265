"""Checkpoints that several tests use."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.checkpoint.cases import normal


@pytest.fixture
def model(tmp_path):
    """A file with weights of both frameworks and of every dtype that is pruned, and others."""
    tensors = {
        "layers.0.weight": normal(0, (16, 24)),
        "layers.0.bias": normal(1, (16,)),
        "conv.weight": normal(2, (8, 12, 3, 3), np.float16),
        "params.Dense_0.kernel": normal(3, (12, 20), ml_dtypes.bfloat16),
        "embed_tokens.weight": normal(4, (40, 8)),
        "odd.fc.weight": normal(5, (6, 7)),
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
