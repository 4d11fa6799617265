"""Trained results by one command: kept, continued, refused, shown; on the digits, with a study of the test's own."""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file
from scipy import stats

import nm_jax as nm
from experiments import __main__ as command
from experiments import catalogue
from experiments.configs.comparison import compared, curves, tables, verdict
from experiments.configs.networks import pretrained
from experiments.configs.study import Preset, Study, Variant, folder
from experiments.data import images
from experiments.data.errors import DataError
from experiments.harness import Run
from experiments.paper import figure_3a
from experiments.train import Recipe
from experiments.train.folder import MODEL


class Wide(nn.Module):
    """Three dense layers, which compile fast."""

    @nn.compact
    def __call__(self, images, train: bool = False):
        del train  # nothing in it is different
        x = nn.relu(nn.Dense(32, name="conv1")(images.reshape(len(images), -1)))
        x = nn.relu(nn.Dense(16, name="middle")(x))
        return nn.Dense(10, name="linear")(x)


VARIANTS = (Variant("dense"), Variant("2:4-T", "2:4-T", refresh_every=7), Variant("ASP", "2:4", refresh_every=None))
SHORT = Preset(
    Recipe(epochs=2, batch=64, rate=0.1, average=0.5), Wide(), lambda path: images.embedded(), seeds=1, network="digits"
)
STUDY = Study("toy", VARIANTS, {"cpu": SHORT})


def measured(path, minutes=None, seeds=None, study=STUDY):
    """The study, as its command would."""
    parser_options = type(
        "Options", (), {"quick": False, "minutes": minutes, "runs": path, "seeds": seeds, "data": None, "weights": None}
    )
    run = Run(parser_options, "cpu", Console(quiet=True), path / "cpu.json", "toy")
    return run.record(study.experiment().measure(run))


def figures(result):
    """The result without what differs from one start to another."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in result["rows"]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    return path, measured(path)


@pytest.mark.slow
def test_a_study_trains_every_variant_of_every_seed(whole):
    rows = whole[1]["rows"]
    assert [(row["name"], row["epochs_done"]) for row in rows] == [("dense", 2), ("2:4-T", 2), ("ASP", 2)]
    assert all(len(row["evaluations"]["accuracy"]) == 2 and row["evaluations"]["accuracy"][-1] > 30 for row in rows)
    assert ["flip_rates" in row for row in rows] == [False, True, False]
    (shown,) = tables(whole[1])
    assert [row[0] for row in shown.rows] == ["dense", "2:4-T", "ASP"] and shown.rows[1][-1] == "1 (2 of 2 epochs)"
    difference = rows[1]["evaluations"]["accuracy"][-1] - rows[0]["evaluations"]["accuracy"][-1]
    assert shown.rows[1][2].strip() == f"{difference:+.2f}"


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS[1:], ids=lambda v: v.name)
def test_models_that_are_written_have_their_pattern(whole, variant):
    """By slices of the arrays in the file, along W and for -T along W^T; the first and the last layer are dense."""
    arrays = load_file(whole[0] / "toy/cpu" / folder(variant, 0) / MODEL)
    kept = arrays["params/middle/kernel"] != 0
    assert max(kept[k : k + 4].sum(0).max() for k in range(0, 32, 4)) == 2
    most = max(kept[:, k : k + 4].sum(1).max() for k in range(0, 16, 4))
    assert most == 2 if variant.pattern == "2:4-T" else most > 2
    assert np.count_nonzero(arrays["params/linear/kernel"]) == 160
    assert np.count_nonzero(arrays["params/conv1/kernel"]) == 64 * 32


@pytest.mark.slow
def test_a_start_that_is_cut_off_says_how_far_it_is_and_the_next_one_ends_as_one(whole, tmp_path):
    part = measured(tmp_path, minutes=1e-9)
    assert [row["epochs_done"] for row in part["rows"]] == [0, 0, 0]
    assert all(row[1] is None for row in tables(part)[0].rows)
    assert figures(measured(tmp_path)) == figures(whole[1])


@pytest.mark.slow
def test_the_runs_of_another_preset_are_refused_in_one_line(whole):
    preset = dataclasses.replace(SHORT, recipe=dataclasses.replace(SHORT.recipe, rate=0.2))
    with pytest.raises(DataError, match=r"has another run: recipe is .*; choose another folder, or delete it"):
        measured(whole[0], study=Study("toy", VARIANTS, {"cpu": preset}))


@pytest.mark.slow
def test_variants_go_on_from_one_network_that_is_trained_before(tmp_path):
    """At a rate of 0 they end as it did, masked; also where the first start had no time. Patterns go by a plan."""
    short = dataclasses.replace(SHORT.recipe, average=None)
    preset = dataclasses.replace(SHORT, recipe=dataclasses.replace(short, epochs=1, rate=0.0), before=short)

    def planned(preset, pattern):
        params = jax.eval_shape(Wide().init, jax.random.key(0), jnp.zeros((1, 64)))["params"]
        return nm.plan(lambda p, x: Wide().apply({"params": p}, x), params, jnp.zeros((1, 64)), pattern=pattern)

    # By these rules the plan would be another one.
    study = Study("toy", VARIANTS[::2], {"cpu": preset}, (("middle", None),), planned=planned)
    part = measured(tmp_path, minutes=1e-9, study=study)
    assert part["before"]["epochs_done"] == 0 and not (tmp_path / "toy/cpu" / folder(VARIANTS[0], 0)).exists()
    result = measured(tmp_path, study=study)
    before, dense, sparse = (
        load_file(tmp_path / "toy/cpu" / name / MODEL)
        for name in ("before", folder(VARIANTS[0], 0), folder(VARIANTS[2], 0))
    )
    assert result["before"]["evaluations"]["accuracy"][-1] == result["rows"][0]["evaluations"]["accuracy"][-1] > 30
    assert result["dense"] == {"2:4": {"conv1/kernel": "the first layer", "linear/kernel": "the last layer"}}
    kept = sparse["params/middle/kernel"] != 0
    assert [kept[k : k + 4].sum(0).max() for k in range(0, 32, 4)] == [2] * 8
    for name, array in before.items():
        np.testing.assert_array_equal(dense[name], array)
        np.testing.assert_array_equal(sparse[name], array * kept if name == "params/middle/kernel" else array)
    (shown,) = tables(result)
    assert (
        "from pretrained" in shown.title
        and f"go on from {result['before']['evaluations']['accuracy'][-1]:.2f}" in shown.notes
    )


@pytest.mark.parametrize(
    ("differences", "says"),
    [([-1.0, -1.1, -0.9], "**short**"), ([1.0, 1.1, 0.9], "better"), ([-1.0, 1.0, -0.2], "none shown"), ([-5.0], None)],
)
def test_differences_are_judged_by_their_spread(differences, says):
    found = verdict(differences)
    assert found is None if says is None else found.startswith(says)
    if found is not None:
        interval = stats.ttest_1samp(differences, 0).confidence_interval(0.95)  # SciPy's own
        assert (interval.low > 0, interval.high < 0) == (says == "better", says == "**short**")


def row(name, pattern, seed, accuracy, epochs_done=2):
    return {
        "name": name,
        "pattern": pattern,
        "seed": seed,
        "epochs": 2,
        "epochs_done": epochs_done,
        "evaluations": {"accuracy": [1.0, accuracy][:epochs_done], "f1": [2.0, 2 * accuracy][:epochs_done]},
    }


def test_runs_that_are_not_through_are_not_counted_and_pairs_are_of_one_seed():
    """Seed 0 of the sparse runs is not through: its accuracy counts nowhere, and seed 1 is held against seed 1."""
    rows = [row("dense", None, 0, 50.0), row("dense", None, 1, 60.0)]
    rows += [row("2:4", "2:4", 0, 9.0, epochs_done=1), row("2:4", "2:4", 1, 59.0)]
    head = {"network": "toy", "data": "none", "start": "scratch", "preset": "cpu"}
    shown = compared("toy", head | {"rows": rows, "figures": ["accuracy", "f1"]})
    assert shown.rows[0][:3] == ("dense", "55.00 ± 7.07", None)
    assert shown.rows[1] == ("2:4", "59.00", "-1.00", None, None, "33 %", "118.00", "1 (3 of 4 epochs)")
    assert shown.header[-2] == "F1, %"


def test_curves_are_means_of_the_seeds_that_are_as_far():
    rows = [row("dense", None, 0, 50.0), row("dense", None, 1, 60.0, epochs_done=1), row("2:4", "2:4", 0, 0, 0)]
    rows.append(row("2:4-T", "2:4-T", 0, 40.0) | {"flip_rates": [0.5, 0.25]})
    left, right = curves({"figures": ["accuracy"], "rows": rows}).axes
    assert [(line.get_label(), [*line.get_ydata()]) for line in left.lines] == [
        ("dense", [1.0, 50.0]),
        ("2:4-T", [1.0, 40.0]),
    ]
    assert [[*line.get_ydata()] for line in right.lines] == [[], [0.5, 0.25]]
    assert curves({"figures": ["accuracy"], "rows": rows[2:3]}) is None


def test_figure_3a_correlates_with_both_diversities():
    """Accuracies that are linear in the logarithm of the exact one correlate by 1 with that, by less with the other."""
    patterns = ("US-0.5", "4:8", "2:4", "4:8-T", "2:4-T", "4:8-S")
    rows = [row(p, p, 0, 50 + figure_3a.diversity(p, exact=True)) for p in patterns]
    record = {"network": "toy", "data": "none", "recipe": {"epochs": 2}, "rows": [row("dense", None, 0, 99.0), *rows]}
    assert figure_3a.correlation(record, exact=True) == pytest.approx(1)
    assert 0.9 < figure_3a.correlation(record, exact=False) < 0.9999
    result = {"configs/figure_3a_scratch/cpu": record}
    (shown,) = figure_3a.tables(result)
    assert [r[0] for r in shown.rows] == ["dense", *patterns, "correlation with the paper's", "correlation with exact"]
    assert shown.rows[-1][-1] == "1.00" and len(figure_3a.draw(result).axes) == 1


KILLED = textwrap.dedent("""
    import pathlib, sys
    from tests.experiments.test_study import measured
    print("imported", flush=True)
    measured(pathlib.Path(sys.argv[1]))
""")


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_ends_as_if_it_had_not_been(whole, tmp_path):
    """`kill -9` of the process and the same again, ten times; the record on disk is whole at any of them."""
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    draw = random.Random(0)
    for _ in range(10):
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], env=environment, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout.readline() == b"imported\n"
            time.sleep(draw.uniform(0, 6))
            process.send_signal(signal.SIGKILL)
        if (tmp_path / "cpu.json").exists():
            json.loads((tmp_path / "cpu.json").read_text())
    assert figures(measured(tmp_path)) == figures(whole[1])


CONFIGS = [name for name in catalogue.entries() if name.startswith("configs/")]


@pytest.mark.parametrize("name", CONFIGS)
def test_unknown_presets_are_answered_with_known_ones(name):
    with pytest.raises(SystemExit, match="unknown preset huge; there are cpu, gpu, paper"):
        command.main([name, "--preset", "huge"])


@pytest.mark.parametrize("name", CONFIGS)
def test_variants_of_a_config_have_folders_of_their_own_and_patterns_that_exist(name):
    study = __import__(catalogue.find(name).module, fromlist=["STUDY"]).STUDY
    assert name == f"configs/{study.name}"
    assert len({folder(variant, 0) for variant in study.variants}) == len(study.variants)
    for variant in study.variants:
        if variant.pattern is not None:
            nm.parse_pattern(variant.pattern)


def test_weights_that_are_not_there_are_named():
    with pytest.raises(DataError, match=r"nowhere\.pth: there is no such file"):
        pretrained("resnet50")(pathlib.Path("nowhere.pth"))
    with pytest.raises(DataError, match="starts from a trained resnet50: name the file of its weights"):
        pretrained("resnet50")(None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name its folder, --data FOLDER"),
        (["--data", "nowhere"], "nowhere: there is no such folder; it must have train/CLASS"),
    ],
)
def test_the_papers_setting_asks_for_its_data(options, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        command.main(["configs/table_3", "--preset", "paper", "--runs", str(tmp_path), *options])


def test_batches_are_a_function_of_their_number_and_go_through_all_images():
    data = images.embedded()
    batches = data.batches(100, seed=1)
    count = len(data.train[1]) // 100
    first = [batches(k) for k in range(count)]
    rows = np.concatenate([x.reshape(100, -1) for x, _ in first])
    assert len(np.unique(rows, axis=0)) > 990 and rows.shape[0] == 100 * count
    again = data.batches(100, seed=1)
    again(count + 3)
    for number in (2, count - 1):
        np.testing.assert_array_equal(again(number)[0], first[number][0])
    assert not np.array_equal(batches(count)[0], first[0][0])
    assert not np.array_equal(data.batches(100, seed=2)(0)[0], first[0][0])
    with pytest.raises(SystemExit, match="a batch of 2000 images out of 1078; make the batch smaller"):
        data.batches(2000, 0)


def test_moved_images_are_windows_of_the_image_with_its_border():
    """Every one of the 2 x 25 possible windows occurs, and nothing else."""
    image = np.arange(1, 13, dtype=np.uint8).reshape(1, 3, 4, 1)
    found = images.moved(np.repeat(image, 2000, axis=0), 2, np.random.default_rng(0))
    padded = np.zeros((7, 8), np.uint8)
    padded[2:5, 2:6] = image[0, ..., 0]
    windows = [padded[i : i + 3, j : j + 4] for i in range(5) for j in range(5)]
    wanted = {w.tobytes() for w in windows} | {w[:, ::-1].tobytes() for w in windows}
    assert {x[..., 0].tobytes() for x in found} == wanted and len(wanted) == 50
