"""The format itself, against its own library."""

import json
import os
import pickle
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

import nm_jax as nm
from nm_jax.checkpoint._tensorfile import TensorFile
from tests.checkpoint.cases import normal
from tests.helpers import worst_group


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
    [
        (b"PK\x03\x04", "safetensors.torch"),
        (b"version https://git-lfs", "git lfs pull"),
        *(
            (pickle.dumps(np.arange(1000), protocol), "is a pickle.*save it as safetensors")
            for protocol in (2, 3, 4, 5)
        ),
    ],
)
def test_other_formats_get_a_hint(tmp_path, start, hint):
    (tmp_path / "in").write_bytes(start + bytes(100))
    with pytest.raises(nm.FormatError, match=hint):
        nm.verify_checkpoint(tmp_path / "in", "2:4")


def test_dtypes_that_numpy_has_not_are_copied(tmp_path):
    header = {"a.weight": entry(0, 64, (4, 4)), "f4": entry(64, 72, (4, 4), "F4"), "f6": entry(72, 75, (4,), "F6_E2M3")}
    data = normal(0, (4, 4)).tobytes() + bytes(range(11))
    nm.prune_checkpoint(write(tmp_path / "in", header, data), tmp_path / "out", "2:4")
    file = TensorFile(tmp_path / "out")
    assert file.entries["f4"].dtype == "F4"
    copied = b"".join(bytes(piece) for name in ("f4", "f6") for piece in file.pieces(name))
    assert copied == bytes(range(11))
    with pytest.warns(UserWarning, match="'f6'.*F6_E2M3"):
        params, masks = nm.load_checkpoint(tmp_path / "out")
    assert set(params) == set(masks) == {"a.weight", "f4"}
    with pytest.raises(nm.FormatError, match="'f6'"):
        nm.load_checkpoint(tmp_path / "out", like={"f6": 0})


def test_records_that_are_damaged(tmp_path):
    save_file({"a.weight": normal(0, (8, 8))}, tmp_path / "in")
    nm.prune_checkpoint(tmp_path / "in", tmp_path / "out", "2:4-T", packed=True)
    with safetensors.safe_open(tmp_path / "out", "np") as file:
        record = json.loads(file.metadata()["nm_jax"])
    tensors = load_file(tmp_path / "out")
    tensor = record["tensors"]["a.weight"]
    broken = [
        {"version": 3},
        {"dense": 3},
        {"dense": {"why": "b.weight"}},
        {"rules": "2:4"},
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


@pytest.mark.parametrize(
    ("dtype", "kind", "data"),
    [
        ("F8_E8M0", ml_dtypes.float8_e8m0fnu, bytes(range(120, 136))),
        ("F8_E4M3FNUZ", ml_dtypes.float8_e4m3fnuz, bytes(range(16))),
        ("F8_E5M2FNUZ", ml_dtypes.float8_e5m2fnuz, bytes(range(16))),
        ("F4", ml_dtypes.float4_e2m1fn, bytes(range(0, 128, 16))),
    ],
)
def test_small_floats_are_loaded(tmp_path, dtype, kind, data):
    """Two F4 share a byte, the first in the lower half."""
    loaded = nm.load_checkpoint(write(tmp_path / "in", {"a": entry(0, len(data), (4, 4), dtype)}, data))[0]["a"]
    codes = [half for byte in data for half in (byte & 15, byte >> 4)] if dtype == "F4" else list(data)
    assert loaded.dtype == kind and loaded.shape == (4, 4)
    np.testing.assert_array_equal(loaded.view(np.uint8), np.reshape(codes, (4, 4)))


@pytest.mark.parametrize(
    "header",
    [
        {"__metadata__": None, "a.weight": entry(0, 64, (4, 4))},
        {"a.weight": entry(0, 64, (4, 4), requires_grad=False)},
    ],
    ids=["no_metadata", "unknown_keys"],
)
def test_headers_that_the_formats_own_library_reads(tmp_path, header):
    path = write(tmp_path / "in", header, normal(0, (4, 4)).tobytes())
    assert load_file(path)["a.weight"].shape == (4, 4)
    nm.prune_checkpoint(path, tmp_path / "out", "2:4")
    assert worst_group(load_file(tmp_path / "out")["a.weight"], 1, 4) == 2


def test_a_header_that_nobody_could_read_is_not_written(tmp_path, monkeypatch):
    """The record would make it longer than the format allows."""
    monkeypatch.setattr("nm_jax.checkpoint._tensorfile._MAX_HEADER", 1000)
    header = {"__metadata__": {"text": "x" * 800}, "a.weight": entry(0, 64, (4, 4))}
    path = write(tmp_path / "in", header, normal(0, (4, 4)).tobytes())
    with pytest.raises(nm.FormatError, match=r"the header would have \d+ bytes, and the format allows 1000"):
        nm.prune_checkpoint(path, tmp_path / "out", "2:4")
    assert os.listdir(tmp_path) == ["in"]


FEW_FILES = """
import resource, sys
import nm_jax as nm
nm.solvers.solve  # everything is loaded before files become few
import jax; jax.devices()
from nm_jax.checkpoint import _prune
resource.setrlimit(resource.RLIMIT_NOFILE, (len(__import__("os").listdir("/proc/self/fd")) + 8,) * 2)
nm.prune_checkpoint(sys.argv[1], sys.argv[2], "2:4")
assert nm.verify_checkpoint(sys.argv[2]).ok
assert len(nm.load_checkpoint(sys.argv[2])[0]) == 20
"""


def test_more_shards_than_files_that_may_be_open(tmp_path):
    (tmp_path / "in").mkdir()
    names = {f"l{k}.weight": f"model-{k:05}-of-00020.safetensors" for k in range(20)}
    for k, (name, file) in enumerate(names.items()):
        save_file({name: normal(k, (4, 4))}, tmp_path / "in" / file)
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    command = [sys.executable, "-c", FEW_FILES, tmp_path / "in", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
