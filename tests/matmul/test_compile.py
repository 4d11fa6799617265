"""The GPU kernels, compiled for an A100 and an H100 on a machine without a GPU.

pip install -e '.[test,gpu-compile]' && python -m pytest -m gpu_compile -n 0
"""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from nm_jax.matmul import ampere, hopper
from nm_jax.matmul._fragments import lane_words
from tests.matmul import cases, compiling, hopper_machine, hopper_warp, packing_cost, ptx

pytestmark = pytest.mark.gpu_compile

old_for_ampere = pytest.mark.skipif(
    jax.__version_info__ < ampere.FIRST_JAX, reason=f"jax {jax.__version__} cannot compile for Ampere"
)
AMPERES = {"a100": "sm_80", "rtx5090": "sm_120a"}
GPUS = ["h100", pytest.param("a100", marks=old_for_ampere)]


@pytest.fixture(scope="module")
def workers():
    if (reason := compiling.missing()) is not None:
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        yield {gpu: stack.enter_context(compiling.worker()) for gpu in compiling.GPUS}


@pytest.fixture(scope="module")
def compiled(workers):
    """Runs a function of `compiling` for a GPU, once: Mosaic shows its PTX the first time only."""
    return functools.cache(
        lambda function, gpu, *arguments: workers[gpu].submit(function, gpu, *arguments).result(timeout=300)
    )


def assert_no_spills(report):
    assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", report), report
    assert "warning" not in report.lower(), report  # such as products that had to be serialised


PACKINGS = {
    **{("in product", side): cost for side, cost in packing_cost.IN_PRODUCT.items()},
    **{("pack", *how): cost for how, cost in packing_cost.PACK.items()},
    ("at once",): packing_cost.AT_ONCE,
}


@pytest.mark.parametrize("how", PACKINGS, ids=str)
def test_what_packing_moves(compiled, how):
    """Bytes for each entry of the weight, as the documentation says."""
    program = compiled(compiling.packing, "h100", *how)
    assert packing_cost.traffic(program) / 4096**2 == pytest.approx(PACKINGS[how], abs=0.06)


HOPPER_CONFIGS = [
    *hopper.SHIPPED,
    hopper.Config(cluster=1, in_flight=1),
    hopper.Config(in_flight=1),
    hopper.Config(tile_tokens=192, groups=3, stages=5, in_flight=1),
    hopper.Config(tile_k=128, stages=2, in_flight=1),
]


@pytest.mark.parametrize("config", HOPPER_CONFIGS, ids=str)
@pytest.mark.parametrize("half", ["bf16", "f16"])
def test_hopper(compiled, config, half):
    found = compiled(compiling.product, "h100", dataclasses.replace(config, clusters=2), *hopper_sizes(config), half)
    [program], [report] = found.ptx, found.reports
    instruction = f"wgmma.mma_async.sp.sync.aligned.m64n{config.tile_tokens}k32.f32.{half}.{half} "
    assert ".target sm_90a" in program
    assert program.count("wgmma.mma_async") == program.count(instruction) >= config.tile_k // 32
    assert_no_spills(report)
    # A block is launched with as many registers for each thread as the assembler says, and has 65536 in all. Those that
    # the warpgroup that loads gives up go to the others.
    threads = 128 * (config.groups + 1)
    assert int(re.search(r"Used (\d+) registers", report)[1]) * threads <= 65536
    given = [int(count) for count in re.findall(r"setmaxnreg\.(?:inc|dec)\.sync\.aligned\.u32\s+(\d+)", program)]
    assert len(given) == 2 and 128 * (min(given) + config.groups * max(given)) <= 65536
    assert config.shared_bytes <= hopper.SHARED_BYTES


def problem(tokens, rows, k, half):
    """(weights, values, words of metadata, x): A with all pairs of patterns."""
    dtype = np.dtype(compiling.HALVES[half])
    weights, mask = cases.all_pairs(rows, k)
    weights = np.where(mask, weights.astype(dtype), 0)
    x = np.random.default_rng(1).normal(size=(tokens, k)).astype(np.float32).astype(dtype)
    return weights, weights[mask].reshape(rows, k // 2), jnp.asarray(cases.words(mask)), x


def assert_right(y, weights, x):
    """Sums in float32, rounded once."""
    expected, found = x.astype(np.float32) @ weights.astype(np.float32).T, y.astype(np.float32)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, rtol=float(ml_dtypes.finfo(y.dtype).eps), atol=1e-4)


def hopper_sizes(config):
    """Three tiles of tokens for two clusters, and stages enough to wrap around once."""
    return 3 * config.tile_tokens, config.tile_rows * config.cluster, config.tile_k * (config.stages + 1)


def run_hopper(compiled, config, half, edit=lambda program: program, seeds=(0,), **options):
    """Runs what was compiled for an H100, edited or not; raises where a result is wrong or a race is possible."""
    tokens, rows, k = hopper_sizes(config)
    config = dataclasses.replace(config, clusters=2)
    found = compiled(compiling.product, "h100", config, tokens, rows, k, half)
    [program] = found.ptx
    weights, values, metadata, x = problem(tokens, rows, k, half)
    arrays = [np.array(values), np.array(lane_words(metadata, hopper.WARPS)), x]
    for seed in seeds:
        y = np.full((tokens, rows), np.nan, x.dtype)
        machine = hopper_machine.Machine(edit(program), found.descriptors, [*arrays, y], seed, **options)
        machine.run(3 if config.in_flight else config.clusters, hopper_warp.Warp)
        assert_right(y, weights, x)
        assert (machine.written == 1).all(), "an entry is written twice, or never"


@pytest.mark.parametrize("config", HOPPER_CONFIGS, ids=str)
def test_hopper_ptx_gives_the_product(compiled, config):
    """Every instruction that an H100 would run, in random order of warps and copies."""
    half = "f16" if config.in_flight else "bf16"
    run_hopper(compiled, config, half, seeds=range(2 if config.tile_tokens > 64 else 4))


def replaced(pattern, by, count=0):
    return lambda program: re.sub(pattern, by, program, count=count, flags=re.DOTALL)


SMALL = hopper.Config(tile_tokens=64, stages=2, cluster=1)
FLYING = hopper.Config(tile_tokens=64, stages=3, cluster=1, in_flight=1)
CLUSTER = hopper.Config(tile_tokens=64, stages=2, cluster=2)
NEXT_BARRIER = r".*?bar\.sync\s+%r\d+, 128;"
FAULTS = {
    "products are not waited for": (
        SMALL,
        replaced(r"wgmma\.wait_group\.sync\.aligned\s+0", "wgmma.wait_group.sync.aligned 1"),
    ),
    "no fence before the store": (SMALL, replaced(r"fence\.proxy\.async\.shared::cta;", "")),
    "the other half of the metadata": (SMALL, replaced(r", 1, add, 1, 1, 0, 0", ", 0, add, 1, 1, 0, 0")),
    "no barrier after the fence": (SMALL, replaced(rf"(fence\.proxy\.async\.shared::cta;){NEXT_BARRIER}", r"\1", 1)),
    "the last store is not waited for": (SMALL, replaced(r"cp\.async\.bulk\.wait_group\s+0;", "")),
    "lanes of the transposition": (SMALL, replaced(r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+), 4,", r"\1, 8,", 1)),
    "the last products are not waited for": (FLYING, replaced(r"wgmma\.wait_group\.sync\.aligned\s+0;", "")),
    "X is not shared": (CLUSTER, replaced(r"(mov\.b16\s+%rs\d+), 3;", r"\1, 1;")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_interpreter_notices(compiled, fault):
    config, edit = FAULTS[fault]
    changed = []

    def noted(program):
        changed.append(edit(program) != program)
        return edit(program)

    with pytest.raises((hopper_machine.Race, AssertionError, KeyError)):
        run_hopper(compiled, config, "f16", noted, seeds=range(6))
    assert changed and all(changed), "the fault was not planted"


def test_the_interpreter_notices_shared_memory_that_is_not_aligned(compiled):
    with pytest.raises(hopper_machine.Race, match="not aligned to its swizzle"):
        run_hopper(compiled, SMALL, "f16", base_address=1024 + 512)


@old_for_ampere
@pytest.mark.parametrize("gpu", AMPERES)
@pytest.mark.parametrize("half", ["bf16", "f16"])
def test_ampere(compiled, half, gpu):
    found = compiled(compiling.product, gpu, ampere.Config(), 512, 512, 1024, half)
    [program], [report] = found.ptx, found.reports
    instruction = f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{half}.{half}.f32"
    assert f".target {AMPERES[gpu]}" in program
    assert program.count("mma.sp") == program.count(instruction) > 0 and "mma.sync" not in program
    assert_no_spills(report)


@old_for_ampere
@pytest.mark.parametrize(("config", "half"), [(ampere.Config(), "bf16"), (ampere.Config(tile_k=128, stages=2), "f16")])
def test_ampere_ptx_gives_the_product(compiled, config, half):
    """Every instruction that an A100 would run, on metadata with all pairs of patterns."""
    tokens, rows, k = 256, 256, 640
    [program] = compiled(compiling.product, "a100", config, tokens, rows, k, half).ptx
    weights, values, metadata, x = problem(tokens, rows, k, half)
    words = lane_words(ampere.reorder(metadata), ampere.WORD_WARPS)
    y = np.full((tokens, rows), np.nan, x.dtype)
    # In the order of the kernel's parameters.
    counts = ptx.run(program, [np.array(words), np.array(ampere.reorder(jnp.asarray(values))), x, y], blocks=4)
    assert counts["mma"] == 4 * (k // 32) * 32  # 4 blocks; a warp's 64 x 64 takes 32 instructions
    assert_right(y, weights, x)


@pytest.mark.parametrize("gpu", GPUS)
def test_train_step_has_two_sparse_products_and_one_dense(compiled, gpu):
    text = compiled(compiling.train_step, gpu, 512, 1024, 768).text
    calls = re.findall(r'custom_call_target="([^"]+)"', text)
    assert len([name for name in calls if "mosaic" in name]) == 2, calls
    # The compiler keeps a dense product in a fusion of its own, or calls cuBLAS.
    dense = [name for name in calls if "cublas" in name] + re.findall(r"= \S+ dot\(", text)
    assert len(dense) == 1, (dense, calls)
