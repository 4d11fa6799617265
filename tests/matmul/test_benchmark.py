"""What `experiments/bench/matmul.py` does on a GPU, with `reference` in the place of a kernel and small sizes."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nm_jax as nm

pytest.importorskip("matplotlib", reason="the benchmark draws; install the extra 'experiments'")
from experiments import harness
from experiments.bench import kernels, masks
from experiments.bench import matmul as bench
from experiments.catalogue import find
from nm_jax.matmul import _mosaic, ampere
from tests.matmul.cases import gpu


@pytest.mark.slow
def test_a_dry_run_goes_through_all_that_a_gpu_would_do(tmp_path, monkeypatch):
    monkeypatch.setenv("NM_JAX_PROFILE", str(tmp_path / "untouched.json"))
    assert harness.main(find("bench/matmul"), bench.EXPERIMENT, ["--dry", "--seed", "1", "--out", str(tmp_path)]) == 0
    folder = tmp_path / "bench" / "matmul"
    [record] = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    result = record["result"]
    assert result["checks"]["dry"] and not kernels.wrong(result["checks"]["dry"])
    for table, rows in (("products", 4), ("configurations", 1), ("training_steps", 1), ("cusparselt", 2)):
        assert len(result[table]) == rows and not any("failed" in row for row in result[table]), table
    assert {row["dtype"] for row in result["products"]} == {"bfloat16", "float16"}
    assert (
        "Best of dry, 16 x 16 x 32: the only one" in {t.name: t for t in bench.tables(result)}["configurations"].notes
    )
    [profile] = folder.glob("*.profile")
    assert {(m.implementation, m.dtype, m.jax) for m in nm.matmul.load_profile(profile)} == {
        ("dry", "bfloat16", jax.__version__),
        ("dry", "float16", jax.__version__),
    }
    assert len(list(folder.glob("*.png"))) == 1
    assert not list(folder.glob("*.part")) and not (tmp_path / "untouched.json").exists()


def test_a_row_that_fails_is_kept_and_the_next_one_runs(tmp_path):
    said = types.SimpleNamespace(print=lambda *a, **k: None)
    run = harness.Run(types.SimpleNamespace(quick=True), "", said, tmp_path / "cpu.json", "a test")
    session = bench.Session(run, {"checks": {"k": {"a": 0.5}}}, deadline=float("inf"))

    def broken(*_):
        raise RuntimeError("illegal instruction")

    key = {"implementation": "k", "dtype": "bfloat16", "side": "forward", "tokens": 1, "rows": 1, "k": 1}
    session.row("products", key, broken)
    session.row("configurations", {**key, "configuration": {"stages": 3}}, broken)
    session.row("training_steps", key, broken)
    session.row("products", key, lambda: {"seconds": {"dense": 2.0, "sparse": 1.0, "sparse and packing": 4.0}})
    assert json.loads((tmp_path / "cpu.part").read_text()) == session.result
    products = {table.name: table for table in bench.tables(session.result)}["products"]
    assert [row[-3:] for row in products.rows] == [
        ("RuntimeError: illegal instruction", "-", "-"),
        ("0", "2.00", "0.50"),
    ]
    session.deadline = 0
    session.row("products", key, broken)
    assert len(session.result["products"]) == 2 and session.result["skipped"] == 1


def test_a_kernel_that_raises_is_wrong_and_its_other_checks_run():
    def product(a, x):
        if x.dtype == jnp.float16:
            raise RuntimeError("no such type")
        return bench.REFERENCE.product(a, x)

    kernel = dataclasses.replace(bench.REFERENCE, product=product)
    errors = kernels.check(kernel, 0, [(24, 16, 32)])
    assert sorted(kernels.wrong(errors)) == ["check_layer, 24 x 16 x 32 float16", "check_pairs, 24 x 16 x 32 float16"]
    assert len(errors) == 4 + 2
    assert "no such type" in bench.problems({"checks": {"k": errors}})[0]


@pytest.mark.parametrize(
    ("name", "capability"), [("hopper", "9.0"), ("ampere", "8.0"), ("ampere", "8.6"), ("ampere", "12.0")]
)
def test_what_is_checked_and_timed_is_within_what_the_kernels_take(name, capability, monkeypatch):
    monkeypatch.setattr(ampere, "FIRST_JAX", (0, 10, 0))
    monkeypatch.setattr(_mosaic, "UNAVAILABLE", None)
    device = gpu(capability)
    kernel = next(i for i in nm.matmul.IMPLEMENTATIONS if i.name == name)
    for shape in (*bench.FULL.checks, *bench.FULL.products, *bench.FULL.sweeps, bench.FULL.mlp):
        for dtype in (jnp.bfloat16, jnp.float16):
            product = nm.matmul.Product(dtype, *shape)
            assert kernel.supports(product, device) is None and kernel.supports(product.transposed, device) is None
    every = {kernel.config(**settings) for settings in bench.configurations(kernel)}
    assert len(every) == {"hopper": 56, "ampere": 8}[name]


def test_the_profile_has_the_fastest_right_configuration_of_each_shape():
    shape = {"tokens": 64, "rows": 32, "k": 16}
    seconds = {"dense": 3.0, "sparse": 2.0, "sparse and packing": 2.5}
    product = {"implementation": "k", "version": 4, "dtype": "bfloat16", "seconds": seconds} | shape
    swept = {"implementation": "k", "dense": 3.0, **shape}
    result = {
        "products": [product | {"side": side} for side in ("forward", "backward")],
        "configurations": [
            swept | {"configuration": {"stages": 2}, "sparse": 1.5, "error": 0.5},
            swept | {"configuration": {"stages": 3}, "sparse": 1.25, "error": 0.5},
            swept | {"configuration": {"stages": 4}, "sparse": 1.0, "error": 7.0},  # fast, and wrong
            swept | {"configuration": {"stages": 5}, "failed": "no"},
        ],
    }
    found = bench.measurements(result, gpu("9.0", "Test GPU"))
    assert [(m.config, m.sparse, m.packing) for m in found] == [
        (None, 2.0, 0.5),
        (None, 2.0, 0.5),
        ((("stages", 3),), 1.25, 0.5),
    ]
    assert {(m.device, m.implementation, m.version, m.tokens, m.rows, m.k) for m in found} == {
        ("Test GPU", "k", 4, 64, 32, 16)
    }


def test_the_masks_of_the_checks_have_their_patterns():
    rng = np.random.default_rng(0)
    assert nm.verify({"w": jnp.asarray(masks.transposable(rng, 24, 16))}, [("w", "2:4-T")]).ok
    pairs = masks.all_pairs(rng, 64, 72)
    assert nm.verify({"w": jnp.asarray(pairs)}, [("w", "2:4")]).ok
    columns = pairs.T.reshape(-1, 8)
    assert len(np.unique(columns, axis=0)) == 36


def test_a_wrong_result_is_an_error_above_one():
    truth = np.ones((4, 4))
    assert kernels.error(jnp.ones((4, 4)), truth, 4) == 0
    assert kernels.error(jnp.full((4, 4), 1.01), truth, 4) > 1
    assert kernels.error(jnp.full((4, 4), jnp.nan), truth, 4) == float("inf")
