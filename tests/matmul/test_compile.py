"""The GPU kernels, compiled for an A100 and an H100 on a machine without a GPU.

pip install -e '.[test,gpu-compile]' && python -m pytest -m gpu_compile -n 0
"""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from nm_jax.matmul import ampere, hopper
from nm_jax.matmul._fragments import lane_words
from tests.matmul import cases, compiling, ptx

pytestmark = pytest.mark.gpu_compile

old_for_ampere = pytest.mark.skipif(
    jax.__version_info__ < ampere.FIRST_JAX, reason=f"jax {jax.__version__} cannot compile for Ampere"
)
GPUS = ["h100", pytest.param("a100", marks=old_for_ampere)]


@pytest.fixture(scope="module")
def workers():
    if (reason := compiling.missing()) is not None:
        pytest.skip(reason)
    with compiling.worker() as a100, compiling.worker() as h100:
        yield {"a100": a100, "h100": h100}


@pytest.fixture
def compiled(workers):
    """Runs a function of `compiling` for a GPU."""
    return lambda function, gpu, *arguments: workers[gpu].submit(function, gpu, *arguments).result(timeout=300)


def assert_no_spills(report):
    assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", report), report
    assert "warning" not in report.lower(), report  # such as products that had to be serialised


HOPPER_CONFIGS = [
    hopper.Config(),
    hopper.Config(in_flight=1),
    hopper.Config(cluster=2, in_flight=1),
    hopper.Config(tile_k=128, stages=2),
    hopper.Config(tile_k=128, stages=2, in_flight=1),
    hopper.Config(tile_tokens=192),
    hopper.default_config(128, 1024, 1024),
    hopper.default_config(64, 1024, 1024),
]


@pytest.mark.parametrize("config", HOPPER_CONFIGS, ids=str)
@pytest.mark.parametrize("half", ["bf16", "f16"])
def test_hopper(compiled, config, half):
    found = compiled(compiling.product, "h100", config, 512, 512, 1024, half)
    [program], [report] = found.ptx, found.reports
    instruction = f"wgmma.mma_async.sp.sync.aligned.m64n{config.tile_tokens}k32.f32.{half}.{half} "
    assert ".target sm_90a" in program
    assert program.count("wgmma.mma_async") == program.count(instruction) >= config.tile_k // 32
    assert_no_spills(report)


@old_for_ampere
@pytest.mark.parametrize("half", ["bf16", "f16"])
def test_ampere(compiled, half):
    found = compiled(compiling.product, "a100", ampere.Config(), 512, 512, 1024, half)
    [program], [report] = found.ptx, found.reports
    instruction = f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{half}.{half}.f32"
    assert ".target sm_80" in program
    assert program.count("mma.sp") == program.count(instruction) > 0 and "mma.sync" not in program
    assert_no_spills(report)


@old_for_ampere
@pytest.mark.parametrize(("config", "half"), [(ampere.Config(), "bf16"), (ampere.Config(tile_k=128, stages=2), "f16")])
def test_ampere_ptx_gives_the_product(compiled, config, half):
    """Every instruction that an A100 would run, on metadata with all pairs of patterns."""
    tokens, rows, k = 256, 256, 640
    [program] = compiled(compiling.product, "a100", config, tokens, rows, k, half).ptx
    dtype = np.dtype(compiling.HALVES[half])
    weights, mask = cases.all_pairs(rows, k)
    weights = np.where(mask, weights.astype(dtype), 0)
    x = np.random.default_rng(1).normal(size=(tokens, k)).astype(np.float32).astype(dtype)
    words = lane_words(ampere.reorder(jnp.asarray(cases.words(mask))), 8)
    values = ampere.reorder(jnp.asarray(weights[mask].reshape(rows, k // 2)))

    y = np.full((tokens, rows), np.nan, dtype)
    buffers = [np.array(words), np.array(values), x, y]  # in the order of the kernel's parameters
    counts = ptx.run(program, buffers, blocks=4)
    assert counts["mma"] == 4 * (k // 32) * 32  # 4 blocks; a warp's 64 x 64 takes 32 instructions
    expected, found = x.astype(np.float32) @ weights.astype(np.float32).T, y.astype(np.float32)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, rtol=float(ml_dtypes.finfo(dtype).eps), atol=1e-4)


@pytest.mark.parametrize("gpu", GPUS)
def test_train_step_has_two_sparse_products_and_one_dense(compiled, gpu):
    text = compiled(compiling.train_step, gpu, 512, 1024, 768).text
    calls = re.findall(r'custom_call_target="([^"]+)"', text)
    assert len([name for name in calls if "mosaic" in name]) == 2, calls
    # The compiler keeps a dense product in a fusion of its own, or calls cuBLAS.
    dense = [name for name in calls if "cublas" in name] + re.findall(r"= \S+ dot\(", text)
    assert len(dense) == 1, (dense, calls)
