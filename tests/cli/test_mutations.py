"""Files that are wrong in one of many ways."""

import json
import os
import resource
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.cli.cases import write_model


def mutate(rng, data):
    """A file that is wrong in one of many ways, or only in its values."""
    data = bytearray(data)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    one, two = (header[name] for name in rng.choice(names, 2, replace=False))

    def pick(values):
        return values[rng.integers(len(values))]

    def with_header(header):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    kind = rng.integers(10)
    if kind == 0:  # bits of the header
        for _ in range(rng.integers(1, 9)):
            data[rng.integers(8 + length)] ^= 1 << rng.integers(8)
    elif kind == 1:  # bits anywhere
        for _ in range(rng.integers(1, 9)):
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    elif kind == 2:
        return bytes(data[: rng.integers(len(data))])
    elif kind == 3:  # the length of the header
        data[:8] = int(2 ** rng.uniform(0, 64)).to_bytes(9, "little")[:8]
    elif kind == 4:  # a name twice
        text = json.dumps(header)
        return with_header(f"{text[:-1]}, {json.dumps(pick(names))}: {json.dumps(one)}}}".encode())
    elif kind == 5:  # overlapping or absurd offsets
        one["data_offsets"] = two["data_offsets"] if rng.random() < 0.5 else [0, int(2 ** rng.uniform(0, 70))]
        return with_header(header)
    elif kind == 6:  # absurd shapes and dtypes
        one["shape"] = [int(2 ** rng.uniform(0, 70)) for _ in range(rng.integers(0, 70))]
        one["dtype"] = pick(["F32", "BF16", "I64", "BOOL", "F7"])
        return with_header(header)
    elif kind == 7:  # values, NaN and infinities among them
        start = int(rng.integers(8 + length, len(data) - 4))
        data[start : start + 4] = pick([b"\xff\xff\xff\xff", b"\x00\x00\xc0\x7f", b"\x00\x7c\x00\xfc"])
    elif kind == 8:  # anything in the place of something
        one[pick(list(one))] = pick([None, True, -1, 1.5, "x", [], {}])
        return with_header(header)
    else:  # bytes between, or at the end
        start = pick([0, 8, 8 + length, len(data)])
        data[start:start] = rng.bytes(rng.integers(1, 40))
    return bytes(data)


def hangs(number, frame):
    raise AssertionError("it hangs")


def try_mutations(run, tmp_path, monkeypatch, packed, count):
    """Each mutated file either is refused, with one line and nothing left, or is valid."""
    monkeypatch.setattr("nm_jax.checkpoint._tiles._CHUNK", 1 << 10)
    model = write_model(tmp_path / "model", size=8)
    if packed:
        assert run("prune", model, tmp_path / "packed", "--pattern", "2:4-T", "--solver", "greedy", "--packed")[0] == 0
    data = (tmp_path / "packed" if packed else model).read_bytes()
    rng = np.random.default_rng(0)
    folder = tmp_path / "folder"
    folder.mkdir()
    arguments = ("--pattern", "2:4-T", "--solver", "greedy", "--json")
    refused = 0
    signal.signal(signal.SIGALRM, hangs)
    for _ in range(count):
        (folder / "in").write_bytes(mutate(rng, data))
        signal.alarm(60)  # none may hang
        code, out, err = run("prune", folder / "in", folder / "out", *arguments)
        signal.alarm(0)
        if code == 0:
            assert json.loads(out)["ok"]
            load_file(folder / "out")
            assert run("verify", folder / "out")[0] == 0
            (folder / "out").unlink()
        else:
            refused += 1
            assert code in (2, 3)
            assert out == ""
            assert err.startswith("nm-jax: ")
            assert err.count("\n") == 1
        assert os.listdir(folder) == ["in"]
    assert refused > count / 2
    assert refused < count


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_mutated_files(run, tmp_path, monkeypatch, packed):
    try_mutations(run, tmp_path, monkeypatch, packed, 100)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_a_thousand_mutated_files(run, tmp_path, monkeypatch, packed):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try_mutations(run, tmp_path, monkeypatch, packed, 1000)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 500_000  # kilobytes: no claim of a header is believed
