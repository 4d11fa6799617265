"""What was pruned is read by what read it before: transformers and accelerate ask for `format`."""

import os
import subprocess
import sys

import pytest
import safetensors
from safetensors.numpy import save_file

import nm_jax as nm
from tests.checkpoint.cases import normal


def accepted(path):
    """The rule of transformers and accelerate."""
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata()
    return metadata is None or metadata.get("format") in ["pt", "tf", "flax", "mlx"]


@pytest.mark.parametrize(
    ("name", "metadata", "expected"),
    [
        ("layer.0.weight", None, "pt"),
        ("layer.0.weight", {"origin": "here"}, "pt"),
        ("layer.0.weight", {"format": "mlx"}, "mlx"),
        ("layer.Dense_0.kernel", None, "flax"),
        ("w", None, None),  # nobody's name
    ],
)
def test_readers_accept_what_was_pruned(tmp_path, name, metadata, expected):
    save_file({name: normal(0, (8, 8))}, tmp_path / "in", metadata=metadata)
    nm.prune_checkpoint(tmp_path / "in", tmp_path / "out", [(name, "2:4", "oi")])
    with safetensors.safe_open(tmp_path / "out", "np") as file:
        found = dict(file.metadata())
    assert found.pop("nm_jax")
    assert found == {**(metadata or {}), **({"format": expected} if expected else {})}
    assert accepted(tmp_path / "out") == (expected is not None)


READ = """
import sys
from transformers import BertConfig, BertModel

model = BertModel.from_pretrained(sys.argv[1])
weight = model.encoder.layer[0].intermediate.dense.weight
assert (weight != 0).reshape(16, 2, 4).sum(2).max() == 2, weight
"""
WRITE = """
import sys
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

model = BertModel(BertConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                             intermediate_size=16, max_position_embeddings=8))
model.config.save_pretrained(sys.argv[1])
save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, sys.argv[1] + "/model.safetensors")
"""
ACCELERATE = """
import sys
from accelerate.utils.modeling import load_state_dict

assert load_state_dict(sys.argv[1] + "/model.safetensors")
"""


def with_torch(script, *arguments):
    """Runs a script where the real readers are: here, or in the Python that NM_JAX_TORCH names."""
    python = os.environ.get("NM_JAX_TORCH", sys.executable)
    done = subprocess.run([python, "-c", script, *map(str, arguments)], capture_output=True, text=True)
    if "ModuleNotFoundError" in done.stderr:
        pytest.skip(f"the real readers are not installed: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("reader", [READ, ACCELERATE], ids=["transformers", "accelerate"])
def test_real_readers(tmp_path, reader):
    """Of a file without metadata, which they read."""
    (tmp_path / "in").mkdir()
    with_torch(WRITE, tmp_path / "in")
    with_torch(reader.rsplit("assert", 1)[0], tmp_path / "in")
    nm.prune_checkpoint(tmp_path / "in", tmp_path / "out", "2:4")
    with_torch(reader, tmp_path / "out")
