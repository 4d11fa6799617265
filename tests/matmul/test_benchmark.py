"""What `experiments/bench/matmul.py` does on a GPU, with `reference` in the place of a kernel and small sizes."""

import jax
import numpy as np
import pytest

import nm_jax as nm

pytest.importorskip("matplotlib", reason="the benchmark draws; install the extra 'experiments'")
from experiments.bench import matmul as bench


def test_products_are_timed_drawn_and_become_the_profile(tmp_path):
    products = [bench.bench_product(bench.REFERENCE, (64, 32, 48), side, repeats=2) for side in ("forward", "backward")]
    for row in products:
        times = [row["seconds"][name] for name in ("dense", "sparse", "packing", "sparse and packing")]
        assert all(seconds > 0 for seconds in times)
    result = {"checks": {}, "products": products, "training_steps": []}
    figure = bench.draw(result)
    assert figure is not None and len(figure.axes[0].patches) == 3 * len(products)
    assert [len(table.markdown().splitlines()) for table in bench.tables(result)] == [2, 4, 2]
    device = jax.devices()[0]
    path = nm.matmul.save_profile(bench.measurements(products, device), tmp_path / "profile.json")
    assert {(m.tokens, m.rows, m.k) for m in nm.matmul.load_profile(path)} == {(64, 32, 48)}


def test_the_training_step_is_timed_dense_and_sparse():
    row = bench.bench_training_step(bench.REFERENCE, (32, 16, 64), repeats=2)
    assert row["seconds"]["dense"] > 0 and row["seconds"]["sparse"] > 0


def test_the_masks_of_the_checks_have_their_patterns():
    rng = np.random.default_rng(0)
    assert nm.verify({"w": jax.numpy.asarray(bench.transposable(rng, 24, 16))}, [("w", "2:4-T")]).ok
    pairs = bench.all_pairs(rng, 64, 72)
    assert nm.verify({"w": jax.numpy.asarray(pairs)}, [("w", "2:4")]).ok
    columns = pairs.T.reshape(-1, 8)
    assert len(np.unique(columns, axis=0)) == 36


def test_a_wrong_result_is_an_error_above_one():
    truth = np.ones((4, 4))
    assert bench.error(jax.numpy.ones((4, 4)), truth, 4) == 0
    assert bench.error(jax.numpy.full((4, 4), 1.01), truth, 4) > 1
    assert bench.error(jax.numpy.full((4, 4), jax.numpy.nan), truth, 4) == float("inf")
