"""What commands print and write."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file

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
