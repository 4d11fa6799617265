"""Exit codes, and errors of one line."""

import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.cli.cases import process

FAILURES = {
    # arguments after the command's name; {model} and {dir} are filled in: exit code, what the line says
    "no pattern": (["prune", "{model}", "{dir}/out"], 2, "--pattern 2:4-T"),
    "not a pattern": (["prune", "{model}", "{dir}/out", "--pattern", "2:4-X"], 2, "n:m-T"),
    "not a rule": (["prune", "{model}", "{dir}/out", "--rule", "2:4"], 2, "regex=pattern"),
    "not axes": (["prune", "{model}", "{dir}/out", "--rule", "l0=2:4@xy"], 2, "letters"),
    "not a regex": (["prune", "{model}", "{dir}/out", "--rule", "(=2:4"], 2, "regular expression"),
    "matches nothing": (["prune", "{model}", "{dir}/out", "--rule", "head=2:4"], 2, "l0/weight"),
    "nothing at most": (["prune", "{model}", "{dir}/out", "--pattern", "2:4", "--at-most"], 2, "transposable"),
    "unknown option": (["prune", "{model}", "{dir}/out", "--fast"], 2, "--help"),
    "unknown command": (["prun"], 2, "prun"),
    "missing": (["prune", "{dir}/no", "{dir}/out", "--pattern", "2:4"], 3, "check the path"),
    "folder": (["prune", "{dir}/empty", "{dir}/out", "--pattern", "2:4"], 3, "one safetensors file is expected"),
    "exists": (["prune", "{model}", "{model}", "--pattern", "2:4"], 3, "choose another name"),
    "nowhere": (["prune", "{model}", "{dir}/no/out", "--pattern", "2:4"], 3, "check the path"),
    "damaged": (["prune", "{dir}/damaged", "{dir}/out", "--pattern", "2:4"], 3, "damaged"),
    "cut": (["verify", "{dir}/cut", "--pattern", "2:4"], 3, "copy or download it again"),
    "pickle": (["verify", "{dir}/pickle", "--pattern", "2:4"], 3, "safetensors.torch"),
    "no record": (["verify", "{model}"], 2, "--pattern"),
    "no shape": (["diversity", "4:8-T", "--shape", "8"], 2, "8x8"),
    "tiles do not fit": (["diversity", "4:8-T", "--shape", "8x7"], 2, "give multiples"),
    "no picture": (["report", "{model}", "-o", "{dir}/out", "--pattern", "2:4", "--picture", "x"], 2, "--picture"),
    "report exists": (["report", "{model}", "-o", "{model}", "--pattern", "2:4"], 3, "choose another name"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_one_line_and_leave_nothing(run, model, tmp_path, name):
    arguments, expected, message = FAILURES[name]
    data = model.read_bytes()
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").write_bytes(data[:20] + b"\xff" + data[21:])
    (tmp_path / "cut").write_bytes(data[:-1])
    (tmp_path / "pickle").write_bytes(b"PK\x03\x04" + data)
    before = sorted(os.listdir(tmp_path))
    code, out, err = run(*(argument.format(model=model, dir=tmp_path) for argument in arguments))
    assert code == expected
    assert out == ""
    assert err.startswith("nm-jax: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(os.listdir(tmp_path)) == before
    assert model.read_bytes() == data


def test_names_in_errors_are_printable(run, tmp_path):
    save_file({"evil\n\x1b[31mname.weight": np.full((8, 8), np.nan, np.float32)}, tmp_path / "in")
    code, _, err = run("prune", tmp_path / "in", tmp_path / "out", "--rule", "weight=2:4")
    assert code == 3
    assert err.count("\n") == 1
    assert "\x1b" not in err


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError, OSError(28, "No space left on device")])
def test_failures_in_the_middle(run, model, tmp_path, monkeypatch, failure):
    """After a tensor has been written."""

    def fail(self, *args):
        raise failure

    monkeypatch.setattr("nm_jax.checkpoint._tensorfile.TensorWriter.finish", fail)
    code, _, err = run("prune", model, tmp_path / "out", "--pattern", "2:4")
    assert code == (130 if failure is KeyboardInterrupt else 3)
    assert err.strip().count("\n") == 0
    assert os.listdir(tmp_path) == ["model.safetensors"]
    if isinstance(failure, OSError):
        assert f"{tmp_path / 'out'}: No space left" in err


def test_without_the_extra():
    """One line says what to install, and the library works."""
    script = (
        "import sys; sys.modules['click'] = None\n"
        "import nm_jax\nfrom nm_jax.cli import main\nassert nm_jax.prune_checkpoint\nsys.exit(main())"
    )
    done = process(script)
    _, err = done.communicate()
    assert done.returncode == 2
    assert err == "nm-jax: click is not installed; pip install 'nm_jax[cli]'\n"
