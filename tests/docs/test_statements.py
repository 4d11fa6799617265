"""What the documentation states in figures and names is what the code says."""

import dataclasses
import inspect
import json
import pathlib
import re
import tomllib

import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

import nm_jax as nm
from nm_jax.cli import _exits
from nm_jax.cli import main as nm_jax_command
from nm_jax.matmul import _hopper_cost, hopper
from nm_jax.solvers import default_solver

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"


def page(name):
    return (DOCS / name).read_text()


def random(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def test_oldest_versions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python, jax = re.search(r"Python (\S+) or newer, jax (\S+) or newer", page("index.md")).groups()
    assert project["requires-python"] == f">={python}"
    assert f"jax>={jax}" in project["dependencies"]
    assert f"need Python {python} or newer" in (ROOT / "README.md").read_text()


def test_exit_codes():
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", page("command-line.md"), re.M)}
    assert codes == {value for name, value in vars(_exits).items() if name.isupper()}


@pytest.mark.parametrize(
    ("solver", "patterns"),
    {
        "TopK": ["1:2", "2:4", "5:7", "US-0.3"],
        "Window": ["1:2-S", "4:8-S"],
        "MeetInTheMiddle": ["2:4-T", "2:4-T-at-most", "1:3-T", "1:2-T"],
        "Exact": ["1:5-T", "4:8-T", "16:32-T", "16:32-T-at-most"],
        "MinCostFlow": ["16:33-T", "16:33-T-at-most"],
    }.items(),
)
def test_default_solvers(solver, patterns):
    assert re.search(rf"^\| `{solver}\(\)` .*(the default|m beyond 32)", page("solvers.md"), re.M)
    for pattern in patterns:
        assert type(default_solver(nm.parse_pattern(pattern))).__name__ == solver


def test_defaults_of_training():
    """40 updates, a step decay of 3; of the paper 2e-4 on the gradient."""
    defaults = {name: value.default for name, value in inspect.signature(nm.sparse_training).parameters.items()}
    assert (defaults["refresh_every"], defaults["decay"]) == (40, nm.StepDecay(3.0))
    for text in ("`nm.StepDecay(3.0)`); refreshed every 40 updates", "SR-STE: a decay of 2e-4 on the gradient"):
        assert text in page("recipes.md")
    assert "GradientDecay(2e-4)" in inspect.getsource(nm.recipes.paper)
    assert inspect.signature(nm.sr_ste).parameters["decay"].default == 2e-4


def test_the_record_of_a_checkpoint(tmp_path):
    save_file({"up_proj.weight": random(8, 16), "norm.weight": random(16)}, tmp_path / "in")
    nm.prune_checkpoint(tmp_path / "in", tmp_path / "out", "2:4")
    with safetensors.safe_open(tmp_path / "out", "np") as file:
        written = json.loads(file.metadata()["nm_jax"])
    shown = json.loads(re.search(r"```json\n(.*?)```", page("checkpoint-format.md"), re.S)[1])
    assert shown.keys() == written.keys() and shown["version"] == written["version"]
    (one,), (other,) = shown["tensors"].values(), written["tensors"].values()
    assert one.keys() == other.keys()
    fields = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", page("checkpoint-format.md").split("## Layouts")[0], re.M)
    assert set(re.findall(r"\w+", " ".join(fields))) == one.keys()


def test_sizes_of_layouts(tmp_path):
    save_file({"a.weight": random(64, 64, dtype=np.float16)}, tmp_path / "in")
    rows = re.findall(r"^\| `([\w+]+)`.*\| (\d+(?:/\d+)?) \|$", page("checkpoint-format.md"), re.M)
    stated = {layout: eval(size) for layout, size in rows}
    options = {
        "dense": ("2:4", {}),
        "dense+mask": ("2:4", {"keep_masks": True}),
        "values+positions": ("2:4", {"packed": True}),
        "values+mask": ("4:8", {"packed": True}),
    }
    assert stated.keys() == options.keys()
    for layout, (pattern, option) in options.items():
        nm.prune_checkpoint(tmp_path / "in", tmp_path / layout, pattern, **option)
        stored = nm.Checkpoint(tmp_path / layout)
        assert {tensor.record.layout for tensor in stored.tensors.values()} == {layout}
        nbytes = sum(entry.nbytes for file in stored.files for entry in file.entries.values())
        assert nbytes == 2 * 64 * 64 * stated[layout]


def test_what_a_tensor_is(tmp_path, monkeypatch, capsys):
    """The lines of the page are lines of the command's table."""
    monkeypatch.chdir(tmp_path)
    shown = re.search(r"^\$ nm-jax (.*)\n((?:.+\n)+?)```", page("checkpoints-axes.md"), re.M)
    lines = [line.split() for line in shown[2].splitlines()]
    shapes = {name: tuple(map(int, shape.split("x"))) for name, shape, *_ in lines[1:]}
    every = enumerate({**shapes, "up.bias": (16,)}.items())
    save_file({name: random(*shape, seed=seed) for seed, (name, shape) in every}, "model.safetensors")
    assert nm_jax_command(shown[1].split()) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line not in printed] == []


def test_what_bounds_the_hopper_kernel():
    number = r"([\d,]+)"
    row = rf"\| (\d+) x (\d+) \| ([12]) \| {number} \| {number} \| {number} \| {number} \| (\d+) % \|"
    rows = re.findall(row, page("sparse-products.md"))
    assert len(rows) == 6
    for figures in rows:
        tile, tokens, shared, *counts, share = (int(figure.replace(",", "")) for figure in figures)
        step = _hopper_cost.step(hopper.Config(tokens, tile // 64, cluster=shared))
        l2_cycles = step.l2_bytes / _hopper_cost.L2_BYTES
        assert counts == [step.l2_bytes, round(l2_cycles), step.tensor_cycles, step.shared_cycles]
        assert share == round(100 * step.tensor_cycles / max(l2_cycles, step.tensor_cycles, step.shared_cycles))
    sentence = r"start of about ([\d,]+) cycles \(assumed\).*? saves ([\d.]+) % of a product of\s4096\^3"
    start = re.search(sentence, page("sparse-products.md"), re.S)
    config = hopper.default_config(4096, 4096, 4096)
    each = _hopper_cost.cycles(dataclasses.replace(config, in_flight=1), 4096, 4096, 4096)
    assert int(start[1].replace(",", "")) == _hopper_cost.START
    assert float(start[2]) == round(100 * (1 - _hopper_cost.cycles(config, 4096, 4096, 4096) / each), 1)


def test_the_bias_fix_is_worse_than_masks_alone_in_most_cases():
    text = page("results.md")
    assert "The bias fix\nis worse than the masks alone in most cases." in text
    worse, alone = [], []
    for line in (
        text.split("<!-- table: full of paper/table_a1 on cpu-x86-64 -->")[1].split("<!-- end -->")[0].splitlines()
    ):
        _, _, method, _, *figures = [*map(str.strip, line.split("|")), *[""] * 4][:9]
        if method in ("masks alone", "bias fix"):
            found = [float(figure.split()[0]) if figure else np.nan for figure in figures]
            if method == "bias fix":
                worse += [fix < mask for fix, mask in zip(found, alone, strict=True) if np.isfinite(fix)]
            alone = found
    assert len(worse) > 10 and np.mean(worse) > 0.5
