"""The command line: results, exit codes, errors of one line, and what is left behind."""

import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import nm_jax as nm
from nm_jax.cli import main
from tests.browser import Browser
from tests.helpers import worst_group

ROOT = pathlib.Path(__file__).parents[2]


def write_model(path, count=1, size=16):
    rng = np.random.default_rng(0)
    dtypes = (np.float32, np.float16, ml_dtypes.bfloat16)
    tensors = {f"l{k}.weight": rng.standard_normal((size, 24)).astype(dtypes[k % 3]) for k in range(3 * count)}
    tensors |= {"l0.bias": np.ones(size, np.float32), "ids": np.arange(5)}
    save_file(tensors, path, metadata={"format": "pt"})
    return path


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model.safetensors")


@pytest.fixture
def run(capsys):
    """Runs a command: (exit code, stdout, stderr)."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


# ------------------------------------------------------------------------------------------------------------ results


def test_prune_and_verify(run, model, tmp_path):
    out = tmp_path / "out.safetensors"
    code, text, _ = run("prune", model, out, "--pattern", "2:4-T")
    assert code == 0
    assert "3 sparse leaves" in text
    assert f"wrote {out}" in text
    for name, array in load_file(out).items():
        if name.endswith("weight"):
            assert worst_group(array, 0, 4) == worst_group(array, 1, 4) == 2
    code, text, _ = run("verify", out)
    assert code == 0
    assert "all have their pattern" in text
    code, text, _ = run("verify", out, "--pattern", "1:4")
    assert code == 1
    assert "VIOLATES 1:4" in text


def test_json_is_what_the_library_says(run, model, tmp_path):
    out = tmp_path / "out"
    code, text, _ = run("prune", model, out, "--pattern", "2:4", "--json")
    assert code == 0
    table = json.loads(text)
    expected = nm.prune_checkpoint(model, tmp_path / "other", "2:4").to_json()
    for key in ("ok", "tensors", "dense"):
        assert table[key] == expected[key]
    code, text, _ = run("verify", out, "--json")
    assert code == 0
    assert json.loads(text) == nm.verify_checkpoint(out).to_json()


def test_rules(run, model, tmp_path):
    rules = ("--rule", "l0=dense", "--rule", "l1=2:4@io", "--pattern", "4:8")
    code, text, _ = run("prune", model, tmp_path / "out", *rules, "--json")
    assert code == 0
    found = {tensor["name"]: (tensor["pattern"], tensor["axes"]) for tensor in json.loads(text)["tensors"]}
    assert found == {"l1.weight": ("2:4", "io"), "l2.weight": ("4:8", "oi")}
    assert load_file(tmp_path / "out")["l0.weight"].all()


def test_options_reach_the_solver(run, model, tmp_path):
    weights = load_file(model)
    magnitude = np.abs(weights["l0.weight"])
    retained = {}
    for solver in ("exact", "greedy", "flow"):
        code, text, _ = run("prune", model, tmp_path / solver, "--pattern", "2:4-T", "--solver", solver, "--json")
        assert code == 0
        record = next(t for t in json.loads(text)["tensors"] if t["name"] == "l0.weight")
        kept = load_file(tmp_path / solver)["l0.weight"] != 0
        retained[solver] = magnitude[kept].sum() / magnitude.sum()
        assert record["retained"] == pytest.approx(retained[solver], abs=1e-6)
        assert (record["gap"] == 0) == (solver == "exact")
    assert retained["exact"] == pytest.approx(retained["flow"], rel=1e-6) and retained["exact"] > retained["greedy"]
    more = ("--solver", "greedy", "--at-most", "--keep-mask", "--json")
    code, text, _ = run("prune", model, tmp_path / "more", "--pattern", "2:4-T", *more)
    assert code == 0
    assert {tensor["pattern"] for tensor in json.loads(text)["tensors"]} == {"2:4-T-at-most"}
    assert "l0.weight.nm_mask" in load_file(tmp_path / "more")


def test_packed_is_smaller_and_verified(run, model, tmp_path):
    run("prune", model, tmp_path / "packed", "--pattern", "2:4", "--packed")
    assert "l0.weight.nm_positions" in load_file(tmp_path / "packed")
    assert run("verify", tmp_path / "packed")[0] == 0


def test_dry_run_writes_nothing(run, model, tmp_path):
    code, text, _ = run("prune", model, tmp_path / "out", "--pattern", "2:4-T", "--dry-run")
    assert code == 0
    assert "3 tensors would be pruned, 2 stay dense" in text
    code, text, _ = run("prune", model, tmp_path / "out", "--pattern", "2:4-T", "--dry-run", "--json")
    assert [tensor["axes"] for tensor in json.loads(text)["tensors"]] == ["oi"] * 3
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_diversity(run):
    code, text, _ = run("diversity", "4:8-T", "--shape", "8x8")
    assert code == 0
    assert "116,963,796,250" in text
    assert "17,557,585,920,000" in text
    table = json.loads(run("diversity", "4:8-T", "--shape", "8x8", "--json")[1])
    assert (table["masks"]["count"], table["eq2"]["count"]) == ("116963796250", "17557585920000")
    huge = json.loads(run("diversity", "2:4", "--shape", "1024x1024", "--json")[1])["masks"]
    assert huge["count"] is None
    assert huge["log10"] == pytest.approx(1024 * 256 * np.log10(6), rel=1e-9)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(run, shell, monkeypatch, capsys):
    code, text, _ = run("completion", shell)
    assert code == 0
    assert f"_NM_JAX_COMPLETE={shell}_complete" in text
    for name, value in (
        ("_NM_JAX_COMPLETE", f"{shell}_complete"),
        ("COMP_WORDS", "nm-jax prune --pa"),
        ("COMP_CWORD", "--pa" if shell == "fish" else "2"),
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main([])
    completed = capsys.readouterr().out
    assert "--pattern" in completed
    assert "--packed" in completed


# ------------------------------------------------------------------------------------------------------------- errors


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
    code, _, err = run("prune", tmp_path / "in", tmp_path / "out", "--pattern", "2:4")
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


def process(script, *arguments):
    """A script in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


LIMITED = """
import resource, sys
from nm_jax.cli import main

limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(main(sys.argv[2:]))
"""


def test_a_full_disk(tmp_path):
    """Simulated by a limit on the size of files."""
    model = write_model(tmp_path / "in", count=20, size=512)
    limit = model.stat().st_size // 2
    limited = process(LIMITED, limit, "prune", model, tmp_path / "out", "--pattern", "2:4")
    out, err = limited.communicate()
    assert limited.returncode == 3
    assert out == ""
    assert err == f"nm-jax: {tmp_path / 'out'}: File too large; files may not be so large here; write somewhere else\n"
    assert os.listdir(tmp_path) == ["in"]


SLOWLY = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
from nm_jax.checkpoint._tensorfile import TensorWriter
from nm_jax.cli import main

write = TensorWriter.write
def slow(self, *args):
    write(self, *args)
    print("wrote", flush=True)
    time.sleep(0.02)
TensorWriter.write = slow
sys.exit(main(sys.argv[1:]))
"""


def slowly(model, out):
    """A process that prunes, and tells of each tensor that it has written."""
    return process(SLOWLY, "prune", model, out, "--pattern", "2:4")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt(tmp_path, number):
    model = write_model(tmp_path / "in", count=20)
    pruning = slowly(model, tmp_path / "out")
    pruning.stdout.readline()
    pruning.send_signal(number)
    _, err = pruning.communicate()
    assert pruning.returncode == 130
    assert err.strip() == "nm-jax: interrupted, and nothing was written"
    assert os.listdir(tmp_path) == ["in"]


def kill_at(tmp_path, moment, k):
    """Kills a run after `moment` tensors (a fraction: in the middle of one); what is there then?"""
    model = tmp_path / "in"
    data = model.read_bytes()
    out = tmp_path / f"out{k}"
    pruning = slowly(model, out)
    for _ in range(int(moment)):
        pruning.stdout.readline()
    time.sleep(moment % 1 * 0.04)
    pruning.kill()
    pruning.communicate()
    assert model.read_bytes() == data
    if pruning.returncode == 0:  # it was done before
        assert nm.verify_checkpoint(out).ok
    else:
        assert not out.exists()


def test_killed(tmp_path):
    write_model(tmp_path / "in", count=10)
    for k, moment in enumerate((0.9, 15.3)):
        kill_at(tmp_path, moment, k)


@pytest.mark.slow
def test_killed_at_fifty_moments(tmp_path):
    write_model(tmp_path / "in", count=10)
    for k, moment in enumerate(np.random.default_rng(0).uniform(0, 32, 50)):
        kill_at(tmp_path, moment, k)


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


# ---------------------------------------------------------------------------------------------------------- mutations


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


# ------------------------------------------------------------------------------------------------------------- report


@pytest.fixture
def page(run, model, tmp_path):
    """A page about a checkpoint with one broken tensor, and its JSON."""
    code, _, _ = run("prune", model, tmp_path / "out", "--pattern", "2:4-T", "--solver", "greedy")
    assert code == 0
    rules = ("--rule", "l1=1:4", "--pattern", "2:4-T")
    code, text, _ = run("report", tmp_path / "out", "-o", tmp_path / "page.html", *rules, "--dense", model, "--json")
    assert code == 1
    return tmp_path / "page.html", json.loads(text)


def percent(share):
    return f"{100 * share:.2f}\u00a0%"


def test_the_page_is_self_contained(page):
    text = page[0].read_text()
    assert "<script" not in text
    assert "http://" not in text
    assert "https://" not in text
    assert "default-src 'none'" in text
    assert text.count("data:image/png;base64,") == 3


def test_the_page_in_a_browser(page, tmp_path):
    path, table = page
    assert len(table["tensors"]) == 3
    with Browser(tmp_path / "profile") as browser:
        for width in (390, 1200):
            asked = browser.load(path.as_uri(), width)
            assert asked[0] == path.as_uri()
            assert all(url.startswith("data:") for url in asked[1:])
            assert browser.ask("document.documentElement.scrollWidth") <= width
            assert browser.ask("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        cells = browser.ask(
            "[...document.querySelectorAll('table')][0].querySelectorAll('tbody tr').values()"
            ".map(r => Object.fromEntries([...r.cells].map(c => [c.dataset.label, c.textContent]))).toArray()"
        )
        bars = browser.ask("[...document.querySelectorAll('.bar em')].map(e => [e.dataset.tensor, e.textContent])")
        groups = browser.ask(
            "[...document.querySelectorAll('.groups')].map(t => [...t.rows].map(r => +r.cells[2].textContent))"
        )
        verdict = browser.ask("document.querySelector('dl').textContent")
        assert browser.pdf().startswith(b"%PDF")
    for row, tensor in zip(cells, table["tensors"], strict=True):
        assert row["tensor"] == tensor["name"]
        assert row["shape"] == "x".join(map(str, tensor["shape"]))
        assert (row["dtype"], row["pattern"], row["axes"]) == (tensor["dtype"], tensor["pattern"], tensor["axes"])
        assert row["kept"] == percent(tensor["kept"] / tensor["size"])
        assert row["retained"] == percent(tensor["retained"])
        assert row["violations W"] == str(tensor["violations"]["contraction"])
        assert row["violations W^T"] == str(tensor["violations"].get("output", ""))
    assert bars == [[tensor["name"], percent(tensor["of_unstructured"])] for tensor in table["tensors"]]
    assert groups == [tensor["groups"][axis] for tensor in table["tensors"] for axis in ("contraction", "output")]
    assert "1 violate their pattern" in verdict
    assert [tensor["name"] for tensor in table["tensors"] if not tensor["ok"]] == ["l1.weight"]


def test_names_cannot_add_to_the_page(run, tmp_path):
    name = "<img src=x onerror=alert(1)>\"'.weight"
    save_file({name: np.ones((8, 8), np.float32)}, tmp_path / "in")
    code, _, _ = run("report", tmp_path / "in", "-o", tmp_path / "page.html", "--pattern", "2:4")
    assert code == 1
    assert "<img src=x" not in (tmp_path / "page.html").read_text()


def test_pictures_of_chosen_tensors(run, model, tmp_path):
    run("report", model, "-o", tmp_path / "page.html", "--pattern", "2:4", "--picture", "l[12]")
    text = (tmp_path / "page.html").read_text()
    assert text.count("data:image/png;base64,") == 2
    assert "<h3>l0.weight" not in text
    assert "<h3>l1.weight" in text
