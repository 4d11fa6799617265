"""What commands print and write."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import nm_jax as nm
from nm_jax.cli import main
from tests.helpers import worst_group


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


def test_excluded_tensors_and_rules_from_a_file(run, model, tmp_path):
    (tmp_path / "rules").write_text("# the second layer\nl1=2:4@io\n\n  l2=dense\n")
    rules = ("--rules", tmp_path / "rules", "--exclude", "^l0", "--pattern", "4:8")
    code, text, _ = run("prune", model, tmp_path / "out", *rules, "--json")
    assert code == 0
    table = json.loads(text)
    assert [(t["name"], t["pattern"], t["axes"]) for t in table["tensors"]] == [("l1.weight", "2:4", "io")]
    reasons = {tensor["name"]: tensor["reason"] for tensor in table["dense"]}
    assert (reasons["l0.weight"], reasons["l2.weight"]) == ("by the rule '^l0'", "by the rule 'l2'")
    (tmp_path / "wrong").write_text("l1=2:4\nl2\n")
    code, _, err = run("verify", model, "--rules", tmp_path / "wrong")
    assert code == 2
    assert "wrong, line 2: 'l2' is not a rule" in err


def test_summaries(run, model, tmp_path):
    """The share that is pruned is of all parameters, those that stay dense among them."""
    before = load_file(model)
    size = sum(array.size for array in before.values())
    nbytes = sum(array.nbytes for array in before.values())
    share = 3 * 16 * 24 / 2 / size
    line = f"5 tensors, {size:,} parameters, {100 * share:.1f} % of them pruned; {nbytes / 1000:.1f} kB"
    for arguments in (("--dry-run",), ()):
        code, text, _ = run("prune", model, tmp_path / "out", "--pattern", "2:4", *arguments)
        assert code == 0
        assert text.splitlines()[-1].startswith(f"{line}; ")
        assert text.endswith(" s\n")
    for command in ("verify", "ls"):
        assert run(command, tmp_path / "out")[1].splitlines()[-1] == line
    pruned = sum(np.count_nonzero(a == 0) for name, a in load_file(tmp_path / "out").items() if "weight" in name)
    totals = {"tensors": 5, "parameters": size, "pruned": int(pruned), "nbytes": nbytes}
    assert json.loads(run("verify", tmp_path / "out", "--json")[1])["totals"] == totals
    text = run("prune", model, tmp_path / "packed", "--pattern", "2:4", "--packed")[1]
    assert f"pruned; {nbytes / 1000:.1f} kB before, " in text


def test_quiet_says_nothing(run, model, tmp_path):
    out = tmp_path / "out"
    assert run("prune", model, out, "--pattern", "2:4", "--dry-run", "-q") == (0, "", "")
    assert run("prune", model, out, "--pattern", "2:4", "--quiet") == (0, "", "")
    assert run("verify", out, "--quiet") == (0, "", "")
    assert run("verify", out, "--pattern", "1:4", "--quiet") == (1, "", "")
    assert run("report", out, "-o", tmp_path / "page", "--quiet") == (0, "", "")
    assert run("unpack", out, tmp_path / "more", "--quiet") == (0, "", "")


def test_force_replaces_the_output(run, model, tmp_path):
    out, page = tmp_path / "out", tmp_path / "page"
    for pattern in ("2:4", "1:4"):
        assert run("prune", model, out, "--pattern", pattern, "--force")[0] == 0
        assert run("report", out, "-o", page, "--force")[0] == 0
    assert nm.verify_checkpoint(out, "1:4").ok
    assert "1:4" in page.read_text()
    assert run("prune", model, out, "--pattern", "2:4", "--dry-run")[0] == 3
    assert run("prune", model, out, "--pattern", "2:4", "--dry-run", "--force")[0] == 0


def test_a_folder_in_and_out(run, model, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    model.rename(folder / "model.safetensors")
    for name in ("config.json", "pytorch_model.bin"):
        (folder / name).touch()
    code, text, _ = run("prune", folder, tmp_path / "out", "--pattern", "2:4")
    assert code == 0
    assert set(os.listdir(tmp_path / "out")) == {"config.json", "model.safetensors", "pytorch_model.bin"}
    assert "2 other files copied; weights among them are as they were: pytorch_model.bin" in text


def test_unpack_and_ls(run, model, tmp_path):
    run("prune", model, tmp_path / "packed", "--pattern", "2:4-T", "--packed")
    code, text, _ = run("ls", tmp_path / "packed")
    assert code == 0
    assert text.splitlines()[0].split() == ["tensor", "dtype", "shape", "bytes", "pattern", "axes", "stored", "because"]
    row = next(line for line in text.splitlines() if line.startswith("l0.weight"))
    assert row.split() == ["l0.weight", "F32", "16x24", "816", "B", "2:4-T", "oi", "values+positions"]
    listed = {t["name"]: t for t in json.loads(run("ls", tmp_path / "packed", "--json")[1])["tensors"]}
    assert listed["l0.weight"]["record"]["kept"] == 16 * 24 // 2
    assert listed["l0.bias"]["record"] is None and "1-D" in listed["l0.bias"]["reason"]
    code, text, _ = run("unpack", tmp_path / "packed", tmp_path / "out")
    assert code == 0
    assert f"wrote {tmp_path / 'out'}" in text
    run("prune", model, tmp_path / "dense", "--pattern", "2:4-T")
    for name, array in load_file(tmp_path / "dense").items():
        np.testing.assert_array_equal(load_file(tmp_path / "out")[name], array)
    assert run("unpack", model, tmp_path / "more")[0] == 2


def test_scores_from_a_file(run, model, tmp_path):
    inputs = np.arange(24, dtype=np.float32) % 4 * 1e6
    nm.save_scores(tmp_path / "scores", {f"l{k}.weight": inputs for k in range(3)})
    code, _, _ = run("prune", model, tmp_path / "out", "--pattern", "2:4", "--scores", tmp_path / "scores")
    assert code == 0
    kept = load_file(tmp_path / "out")["l0.weight"] != 0
    assert not kept[:, 0::4].any()  # of four inputs, the first is nothing
    code, _, err = run("prune", model, tmp_path / "more", "--pattern", "2:4", "--scores", tmp_path / "gone")
    assert (code, err.count("\n")) == (3, 1)


def test_pruning_nothing_is_said(run, tmp_path):
    save_file({"a.bias": np.ones(8, np.float32)}, tmp_path / "in")
    code, text, err = run("prune", tmp_path / "in", tmp_path / "out", "--pattern", "2:4")
    assert code == 0
    assert "1-D" in text
    assert err.startswith("nm-jax: nothing was pruned")
