"""Every experiment is listed, and runs; the recipe in `experiments/__init__.py` is true."""

import importlib
import json
import re
import subprocess
import sys

import pytest

import experiments
from experiments import __main__ as command
from experiments import catalogue, harness
from tests.test_recipes import Project

ENTRIES = catalogue.entries()
RESULTS = [path for path in sorted(harness.RESULTS.rglob("*.json")) if "quick" not in path.parts]


def run(*arguments):
    return command.main([*map(str, arguments)])


SLOW = (
    "quickstart",
    "bench/solvers",
    "bench/training",
    "bench/checkpoint",
    "bench/matmul",
    "recipes",
    "configs/table_3_detection",
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW))
        for name, entry in ENTRIES.items()
        if entry.data == "none"
    ],
)
def test_experiments_run(name, tmp_path, capsys):
    """`--quick`, and the same shown again from the file alone."""
    assert run(name, "--quick", "--out", tmp_path) == 0
    results = [path for path in tmp_path.rglob("*.json") if path.name != "run.json"]  # which training writes
    written = [json.loads(path.read_text()) for path in results]
    assert bool(written) == (importlib.import_module(ENTRIES[name].module).EXPERIMENT.measure is not None)
    assert all(record["quick"] and f"experiments {name} --quick" in record["command"] for record in written)
    shown = capsys.readouterr().out
    assert run(name, "--report", "--out", tmp_path) == 0
    again = capsys.readouterr().out
    assert again.strip() and again.splitlines()[0] in shown.splitlines()


@pytest.mark.parametrize("name", ENTRIES)
def test_what_has_been_measured_is_shown(name, capsys, monkeypatch):
    """The results in the repository, without writing there; what has none is said to have none."""
    monkeypatch.setattr(harness.Figure, "savefig", lambda self, *args, **kwargs: None)
    sources = importlib.import_module(ENTRIES[name].module).EXPERIMENT.sources or (name,)
    measured = {
        path.parent.relative_to(harness.RESULTS).as_posix()
        for source in sources
        for path in (harness.RESULTS / source).rglob("*.json")
    }
    if measured:
        assert run(name, "--report") == 0
        shown = capsys.readouterr().out
        missing = re.findall(r"no results of (.+?) in ", shown.replace("\n", " "))
        assert not measured & {part for line in missing for part in line.split(", ")}
        assert len(shown.splitlines()) > len(missing)


def test_the_list_says_what_there_is(capsys):
    assert run() == 0
    out = capsys.readouterr().out
    assert {"quickstart", "bench/solvers", "paper/table_a1", "adaprune/from_dense"} <= set(out.split())
    assert len(ENTRIES) == sum("\nEXPERIMENT = " in path.read_text() for path in catalogue.ROOT.rglob("*.py"))


@pytest.mark.parametrize("name", ["bench/gram", "bench.gram", "experiments.bench.gram", "experiments/bench/gram.py"])
def test_an_experiment_is_found_by_path_and_by_module(name):
    assert catalogue.find(name).name == "bench/gram"


def test_wrong_names_are_answered_with_right_ones(tmp_path):
    with pytest.raises(SystemExit, match="no experiment 'bench/grams'; did you mean bench/gram"):
        run("bench/grams")
    with pytest.raises(SystemExit, match="unknown parts nothing; there are"):
        run("pretrained", "--parts", "nothing")


def test_a_part_without_results_is_no_crash(tmp_path, capsys):
    assert run("pretrained", "--report", "--parts", "minilm", "--out", tmp_path) == 0
    assert "no results of pretrained/minilm" in capsys.readouterr().out


@pytest.mark.parametrize(
    "path", sorted(harness.RESULTS.rglob("*.json")), ids=lambda p: str(p.relative_to(harness.RESULTS))
)
def test_results_say_where_they_come_from(path):
    record = json.loads(path.read_text())
    assert {"command", "commit", "device", "cores", "versions", "quick", "seconds", "result"} == set(record)
    assert not record["quick"] and re.fullmatch(r"[0-9a-f]{40}\+?", record["commit"])
    assert re.sub(r"[^a-z0-9]+", "-", record["device"].lower()) == path.stem


# -------------------------------------------------------------------------------------------------------- the recipe


def recipe():
    """The file that the docstring of `experiments` tells to write."""
    doc = experiments.__doc__
    code = doc[doc.index("    '''") : doc.index("    EXPERIMENT = Experiment(measure, tables)")]
    return re.sub("^    ", "", code, flags=re.M) + "EXPERIMENT = Experiment(measure, tables)\n"


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A copy of the project with one more experiment."""
    project = Project(tmp_path_factory.mktemp("house"), "experiments")
    project.write("experiments/bench/toy.py", recipe())
    return project


def python(house, *arguments):
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=house.folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_experiment_of_the_recipe_is_listed(house):
    assert re.search(r"bench/toy +What is shown", python(house, "experiments"))


def test_an_experiment_of_the_recipe_runs(house):
    out = python(house, "experiments", "bench/toy")
    assert re.search(r"300 +0\.50", out)
    record = json.loads((house.folder / "experiments/results/bench/toy" / f"{harness.device_file()}.json").read_text())
    assert record["result"] == {"steps": 300, "loss": 0.5}
    assert record["command"] == "python -m experiments bench/toy"


@pytest.mark.slow
def test_an_experiment_of_the_recipe_is_covered_by_the_test_of_all(house):
    assert "test_experiments_run[bench/toy]" in house.test("run and toy", "tests/experiments/test_experiments.py")


@pytest.mark.slow
def test_a_table_of_the_recipe_goes_into_the_documentation(house):
    python(house, "experiments", "bench/toy")
    page = house.folder / "README.md"
    device = harness.device_file()
    page.write_text(f"# A page\n\n<!-- table: loss of bench/toy on {device} -->\nold\n<!-- end -->\n")
    failed = subprocess.run([sys.executable, "-m", "experiments", "report", "--check"], cwd=house.folder)
    assert failed.returncode == 1
    python(house, "experiments", "report", "--write")
    assert "| steps | loss |\n| --- | --- |\n| 300 | 0.50 |" in page.read_text()
    python(house, "experiments", "report", "--check")
