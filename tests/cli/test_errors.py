"""Exit codes, and errors of one line."""

import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.cli.cases import process, write_model

FAILURES = {
    # arguments after the command's name; {model} and {dir} are filled in: exit code, what the line says
    "only exclusions": (["verify", "{model}", "--exclude", "l0"], 2, "give --pattern"),
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


def test_nothing_of_a_name_reaches_a_terminal(run, tmp_path):
    """Names may hold escape sequences, line ends, and letters that turn the direction of what follows."""
    names = [
        "\x1b[2J\x1b]0;title\x07a.weight",
        "b\n5 tensors would be pruned.weight",
        "c\u202eevil.weight",
        "d\x9b31m.bias",
    ]
    save_file({name: np.full((8, 8), k + 1, np.float32) for k, name in enumerate(names)}, tmp_path / "in")
    run("prune", tmp_path / "in", tmp_path / "out", "--rule", "weight=2:4@oi")
    commands = (
        ["prune", tmp_path / "in", tmp_path / "more", "--rule", "weight=2:4@oi", "--dry-run"],
        ["prune", tmp_path / "in", tmp_path / "more", "--rule", "weight=2:4@oi"],
        ["prune", tmp_path / "in", tmp_path / "even", "--rule", "nothing=2:4"],
        ["verify", tmp_path / "in", "--rule", "weight=2:4@oi"],
        ["verify", tmp_path / "out", "--json"],
        ["ls", tmp_path / "out"],
        ["report", tmp_path / "out", "-o", tmp_path / "page"],
    )
    for command in commands:
        _, out, err = run(*command)
        assert all(character.isprintable() or character == "\n" for character in out + err), command
        assert "\n5 tensors would be pruned.weight" not in out
    assert "\x1b" not in (tmp_path / "page").read_text()


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_terminals_that_know_ascii_only(tmp_path, environment):
    save_file({"blöcke.0.fc.weight": np.ones((8, 8), np.float32)}, tmp_path / "in")
    script = "import sys; from nm_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    pruning = process(script, "prune", tmp_path / "in", tmp_path / "out", "--pattern", "2:4", **environment)
    out, err = pruning.communicate()
    assert (pruning.returncode, err) == (0, "")
    assert "cke.0.fc.weight" in out


@pytest.mark.parametrize("arguments", [["ls"], ["verify", "--pattern", "2:4"]], ids=["ls", "verify"])
def test_a_pipe_that_is_closed_is_no_broken_pattern(tmp_path, arguments):
    """As `nm-jax verify FILE | head -1` does."""
    model = write_model(tmp_path / "in", count=1)
    script = "import sys; from nm_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    reading = process(script, arguments[0], model, *arguments[1:])
    reading.stdout.close()
    assert reading.wait() == 141
    with reading.stderr as errors:
        assert errors.read() == ""


def test_counts_that_would_take_for_ever_are_refused_at_once(run):
    code, out, err = run("diversity", "8:16-T", "--shape", "16x16")
    assert (code, out) == (2, "")
    assert "too many" in err


def test_unreadable_input_is_about_files(run, model, tmp_path):
    """Whatever is asked of it, the exit code is 3."""
    (tmp_path / "text").write_bytes(b"\xff\xfe l0=2:4")
    (tmp_path / "damaged").write_bytes(b"not a checkpoint")
    broken = (
        ["verify", tmp_path / "damaged"],
        ["ls", tmp_path / "damaged"],
        ["unpack", tmp_path / "damaged", tmp_path / "out"],
        ["report", tmp_path / "damaged", "-o", tmp_path / "out"],
        ["verify", model, "--pattern", "2:4", "--dense", tmp_path / "damaged"],
        ["verify", model, "--rules", tmp_path / "gone"],
        ["verify", model, "--rules", tmp_path / "text"],
        ["prune", model, tmp_path / "out", "--pattern", "2:4", "--scores", tmp_path / "damaged"],
    )
    for command in broken:
        code, out, err = run(*command)
        assert (code, out, err.count("\n")) == (3, "", 1), (command, err)
