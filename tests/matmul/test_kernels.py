"""The GPU kernels as far as a CPU can tell: metadata, operands in shared memory, and whole products interpreted."""

import itertools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from nm_jax.matmul import Product, _ampere_kernel, _hopper_kernel, _tiles, ampere, hopper
from nm_jax.matmul import _fragments as fragments
from nm_jax.matmul import _mosaic as mosaic
from nm_jax.matmul._compress import SparseMatrix
from tests.matmul import cases, ptx
from tests.matmul.cases import gpu, refused

ROOT = pathlib.Path(__file__).parents[2]
KERNELS = {"hopper": hopper, "ampere": ampere}


def operands(tokens, rows, k, dtype, seed=0):
    """(dense A, packed A, x): A holds every pair of 2:4 patterns, if it has room for them."""
    weights, mask = cases.all_pairs(rows, k, seed)
    weights = np.where(mask, weights.astype(dtype), 0)
    values = weights[mask].reshape(rows, k // 2)
    values = np.pad(values, ((0, 0), (0, -(k // 2) % 8)))
    x = np.random.default_rng(seed + 1).normal(size=(tokens, k)).astype(np.float32).astype(dtype)
    return weights, SparseMatrix(jnp.asarray(values), jnp.asarray(cases.words(mask)), k), jnp.asarray(x)


def dense_product(weights, x):
    return np.asarray(x, np.float32) @ weights.astype(np.float32).T


def assert_close(found, expected, dtype):
    """One rounding to the output's dtype, and float32 sums in another order."""
    found = np.asarray(found, np.float32)
    assert np.isfinite(found).all()
    step = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(found, expected, rtol=step, atol=1e-5 * np.abs(expected).max())


# ------------------------------------------------------------------------------------------------------- metadata


@pytest.mark.parametrize("warps", [1, 4, 8])
def test_lane_words_bit_by_bit(warps):
    rows, k = 32 * warps, 192
    metadata = cases.words(cases.all_pairs(rows, k)[1])
    found = np.asarray(fragments.lane_words(jnp.asarray(metadata), warps)).view(np.uint32)
    assert found.shape == (2, 3, 32 * warps)
    for tile, chunk, warp, lane in np.ndindex(2, 3, warps, 32):
        row = 16 * (tile * warps + warp) + lane // 4
        low, high = (int(metadata[r, 4 * chunk + lane % 4]) for r in (row, row + 8))
        assert found[tile, chunk, 32 * warp + lane] == high << 16 | low


def test_lane_words_make_the_instruction_see_the_dense_matrix():
    rows, k, tokens = 16, 192, 8
    weights, a, x = operands(tokens, rows, k, ml_dtypes.bfloat16)
    values, words = np.asarray(a.values), np.asarray(fragments.lane_words(a.metadata, 1)).view(np.uint32)
    lane, register, entry = np.ogrid[:32, :4, :2]
    a_row, a_column = lane // 4 + 8 * (register & 1), 2 * (lane % 4) + 8 * (register >> 1) + entry
    x_row, x_column = lane // 4, 2 * (lane % 4) + 8 * register + entry
    sums = np.zeros((1, 32, 4), np.float32)
    for step in range(k // 32):
        a_fragment, x_fragment = values[a_row, 16 * step + a_column], np.asarray(x)[x_row, 32 * step + x_column]
        sums = ptx.mma_sp(a_fragment[None], x_fragment[None], sums, words[:, step // 2], step % 2)
    lanes = np.arange(32)
    found = np.zeros((rows, tokens), np.float32)
    for k in range(4):
        found[lanes // 4 + 8 * (k >> 1), 2 * (lanes % 4) + (k & 1)] = sums[0, :, k]
    np.testing.assert_allclose(found.T, dense_product(weights, x), rtol=1e-5, atol=1e-5)


def test_padding_is_zeros_with_metadata_in_order():
    """Positions of a group must ascend even where nothing is kept: anything else is undefined to the hardware."""
    weights, a, x = operands(3, 20, 84, np.float16)
    values, metadata, padded = map(np.asarray, _tiles.pad_operands(a, x, (64, 128, 64)))
    assert (values.shape, metadata.shape, padded.shape) == ((128, 64), (128, 8), (64, 128))
    nibbles = metadata[..., None] >> np.arange(0, 16, 4) & 15
    assert (nibbles & 3 < nibbles >> 2).all()
    dense = fragments.expand(jnp.asarray(values), fragments.lane_words(jnp.asarray(metadata), 8)[0])
    np.testing.assert_array_equal(dense[:20, :84], weights.astype(np.float32))
    assert not dense[20:].any() and not dense[:, 84:].any()
    np.testing.assert_array_equal(padded[:3, :84], x)
    assert not padded[3:].any() and not padded[:, 84:].any()


@pytest.mark.parametrize("warps", [4, 8])
def test_expand_gives_the_dense_tile(warps):
    rows = 16 * warps
    weights, a, _ = operands(1, rows, 128, np.float16)
    words = fragments.lane_words(a.metadata, warps)[0]
    np.testing.assert_array_equal(np.asarray(fragments.expand(a.values, words)), weights.astype(np.float32))


# --------------------------------------------------------------------------- the interpreter of test_compile.py

COPY = "cp.async.ca.shared.global [%rd2], [%rd1], 4; cp.async.commit_group;"
WAIT, BARRIER, READ = "cp.async.wait_group 0;", "bar.sync 0;", "ld.shared.b32 %r1, [%rd2];"
GARBAGE = 0xABABABAB


def run_ptx(*body):
    """What a thread has read in the end, where shared memory was given a 7."""
    program = """
.visible .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1)
.maxntid 32, 1, 1
{{
ld.param::entry.b64 %rd1, [kernel_param_0];
ld.param::entry.b64 %rd3, [kernel_param_1];
mov.b64 %rd2, 64;
{}
st.global.v4.b32 [%rd3], {{%r1, %r1, %r1, %r1}};
ret;
}}"""
    out = np.zeros(4, np.uint32)
    ptx.run(program.format("\n".join(body)), [np.array([7], np.uint32), out], blocks=1)
    return out[0]


def test_interpreter_shows_a_copy_after_wait_and_barrier():
    assert run_ptx(COPY, WAIT, BARRIER, READ) == 7
    for too_little in [(), (WAIT,), (BARRIER,), (BARRIER, WAIT)]:
        assert run_ptx(COPY, *too_little, READ) == GARBAGE


@pytest.mark.parametrize(
    ("instruction", "found"),
    [
        ("mov.b32 %r2, 0xA5; bfe.u32 %r1, %r2, 4, 4;", 0xA),
        ("mov.b32 %r2, 0xA5; bfe.s32 %r1, %r2, 4, 4;", 0xFFFFFFFA),
        ("mov.b32 %r2, 0x25; bfe.s32 %r1, %r2, 4, 4;", 2),
        ("mov.b32 %r2, 0xFFFFFFF0; shr.s32 %r1, %r2, 2;", 0xFFFFFFFC),
        ("mov.b32 %r2, 0xFFFFFFF0; shr.u32 %r1, %r2, 2;", 0x3FFFFFFC),
        ("mov.b32 %r2, -3; min.s32 %r1, %r2, 2;", 0xFFFFFFFD),
        ("mov.b32 %r2, 70000; mul.lo.s32 %r1, %r2, %r2;", 70000**2 % 2**32),
        ("mov.b32 %r2, 0x80000000; mul.hi.u32 %r1, %r2, 10;", 5),
        ("mov.b32 %r2, 5; setp.eq.s32 %p1, %r2, 5; setp.lt.and.s32 %p2, %r2, 9, %p1; selp.b32 %r1, 1, 2, %p2;", 1),
        ("mov.b32 %r2, 5; setp.eq.s32 %p1, %r2, 5; not.pred %p2, %p1; selp.b32 %r1, 1, 2, %p2;", 2),
    ],
)
def test_interpreter_of_integers(instruction, found):
    assert run_ptx(instruction) == found


def test_interpreter_refuses_a_copy_onto_what_may_still_be_read():
    assert run_ptx(READ, BARRIER, COPY) == GARBAGE
    with pytest.raises(RuntimeError, match="read since the last barrier"):
        run_ptx(READ, COPY)


# -------------------------------------------------------------------------------- operands in Hopper's shared memory


def swizzle(address, width):
    """Address bits 4, 5, 6 (as many as the width has) are exclusive-ored with bits 7, 8, 9."""
    bits = {128: 7, 64: 3, 32: 1}[width]
    return address ^ ((address >> 7 & bits) << 4)


def shared_image(tile):
    """What the copy engine leaves of a tile of 16-bit entries: pieces of 8 rows times the swizzle's width."""
    rows, columns = tile.shape
    width = min(128, 2 * columns)
    image = np.zeros(rows * columns, np.uint16)
    for row, column in np.ndindex(rows, columns):
        piece, inside = divmod(2 * column, width)
        piece += row // 8 * (2 * columns // width)
        image[swizzle(piece * 8 * width + row % 8 * width + inside, width) // 2] = tile[row, column]
    return image


def read_operand(image, descriptor, offset, rows, columns):
    """What a tensor core reads: rows eight by eight, `stride` bytes apart, through the swizzle."""
    stride, width = (descriptor >> 32 & 0x3FFF) << 4, {1: 128, 2: 64, 3: 32}[descriptor >> 62]
    row, column = np.ogrid[:rows, :columns]
    return image[swizzle(offset + row // 8 * stride + row % 8 * width + 2 * column, width) // 2]


@pytest.mark.parametrize("tile_k", [64, 128])
def test_plan_of_a_stage(tile_k):
    """The instructions of one stage, from an image of shared memory to the sums of one warpgroup."""
    tokens, half = 24, ml_dtypes.bfloat16
    weights, a, x = operands(tokens, 64, tile_k, half)
    words = np.asarray(fragments.lane_words(a.metadata, 4)).view(np.uint32)[0]
    a_image, x_image = (shared_image(np.asarray(tile).view(np.uint16)) for tile in (a.values, x))
    sums = np.zeros((64, tokens), np.float32)
    for step in _hopper_kernel.steps(tile_k):
        kept = read_operand(a_image, _hopper_kernel.descriptor(tile_k // 2), step.a_offset, 64, 16).view(half)
        right = read_operand(x_image, _hopper_kernel.descriptor(tile_k), step.x_offset, tokens, 32).view(half)
        left = np.zeros((64, 32), np.float32)
        for row, group in np.ndindex(64, 8):
            lane = 32 * (row // 16) + 4 * (row % 8) + 2 * step.selector + group // 4
            nibble = int(words[step.word, lane]) >> (16 * (row % 16 // 8) + 4 * (group % 4)) & 15
            left[row, 4 * group + (nibble & 3)] = kept[row, 2 * group]
            left[row, 4 * group + (nibble >> 2)] = kept[row, 2 * group + 1]
        sums += left @ right.astype(np.float32).T
    assert len(_hopper_kernel.steps(tile_k)) == tile_k // 32
    np.testing.assert_allclose(sums.T, dense_product(weights, x), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ whole products

SHAPES = {
    "one_token": (1, 128, 64),
    "odd": (71, 100, 84),
    "rows_of_tiles": (64, 130, 144),
}
CASES = [
    pytest.param(name, shape, dtype, id=f"{name}-{label}-{dtype.__name__}")
    for name, (label, shape), dtype in itertools.product(KERNELS, SHAPES.items(), [ml_dtypes.bfloat16])
] + [pytest.param(name, SHAPES["odd"], np.float16, id=f"{name}-odd-float16") for name in KERNELS]


@pytest.mark.parametrize(("name", "shape", "dtype"), CASES)
def test_product(name, shape, dtype):
    """Padding, grid, pipeline and indices are those of the GPU; outputs start as NaN."""
    weights, a, x = operands(*shape, dtype)
    y = KERNELS[name].product(a, x, interpret=True)
    assert y.shape == shape[:2] and y.dtype == x.dtype
    assert_close(y, dense_product(weights, x), dtype)


CONFIGS = [
    hopper.Config(tile_tokens=64, tile_k=128, stages=2, cluster=1, raster=1),
    hopper.Config(tile_tokens=64, stages=2, cluster=1, in_flight=1),
    hopper.Config(tile_tokens=64, groups=3, stages=2, cluster=1, clusters=1),
    pytest.param(
        hopper.Config(tile_tokens=64, stages=2, cluster=2),
        marks=pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax 0.10 does not interpret clusters"),
    ),
    ampere.Config(tile_k=128, stages=2, raster=1),
    ampere.Config(stages=2),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_shape_of_the_kernel(config):
    kernel = ampere if isinstance(config, ampere.Config) else hopper
    weights, a, x = operands(70, 100, 144, ml_dtypes.bfloat16)
    y = kernel.product(a, x, config=config, interpret=True)
    assert_close(y, dense_product(weights, x), ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    ("row_tiles", "token_tiles", "raster"), [(1, 1, 8), (8, 3, 8), (7, 5, 3), (3, 4, 1), (16, 2, 4)]
)
def test_blocks_cover_every_tile_once(row_tiles, token_tiles, raster):
    linear = jnp.arange(row_tiles * token_tiles)
    index = jax.vmap(lambda k: mosaic.tile_index(k, row_tiles, token_tiles, raster))
    found = list(zip(*map(np.ndarray.tolist, map(np.asarray, index(linear))), strict=True))
    assert sorted(found) == list(np.ndindex(row_tiles, token_tiles))
    band = min(raster, row_tiles)
    assert {row for row, _ in found[: band * token_tiles]} == set(range(band))


def test_outputs_start_as_nan():
    """What `test_product` relies on."""

    def kernel(y_ref):
        y_ref.at[mosaic.pl.ds(0, 8)][...] = jnp.zeros((8, 128), jnp.bfloat16)

    y = mosaic.plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((16, 128), jnp.bfloat16),
        grid=(1,),
        grid_names=("tile",),
        interpret=mosaic.interpreter(),
    )()
    assert not np.isnan(y[:8]).any() and np.isnan(y[8:]).all()


@pytest.mark.parametrize("name", KERNELS)
def test_nan_in_padding_stays_out(name):
    """A NaN spreads to the outputs of its token, and to no other."""
    weights, a, x = operands(70, 128, 64, ml_dtypes.bfloat16)
    y = np.asarray(KERNELS[name].product(a, x.at[3, 5].set(jnp.nan), interpret=True), np.float32)
    expected = dense_product(weights, x)
    assert np.isnan(y[3]).all()
    assert_close(np.delete(y, 3, 0), np.delete(expected, 3, 0), ml_dtypes.bfloat16)


# ------------------------------------------------------------------------------------------------- what is refused


def test_supports_by_device(monkeypatch):
    monkeypatch.setattr(ampere, "FIRST_JAX", (0, 10, 0))
    found = {
        capability: [
            name
            for name, kernel in KERNELS.items()
            if kernel.supports(Product(jnp.bfloat16, 4096, 4096, 4096), gpu(capability)) is None
        ]
        for capability in ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0", "gfx942")
    }
    assert found.pop("9.0") == ["hopper"]
    assert {capability for capability, names in found.items() if names == ["ampere"]} == {"8.0", "8.6", "8.9", "12.0"}
    assert [names for names in found.values() if names].count(["ampere"]) == 4


@pytest.mark.parametrize("name", KERNELS)
def test_supports_gives_the_reason(name, monkeypatch):
    monkeypatch.setattr(ampere, "FIRST_JAX", (0, 10, 0))
    right = gpu({"hopper": "9.0", "ampere": "8.0"}[name])

    def supports(dtype, *sizes, device=right):
        return KERNELS[name].supports(Product(dtype, *sizes), device)

    assert supports(jnp.float16, 1000, 1000, 1008) is None
    assert "float32" in supports(jnp.float32, 1024, 1024, 1024)
    assert "device is" in supports(jnp.bfloat16, 1024, 1024, 1024, device=jax.devices("cpu")[0])
    assert "padding would multiply the work by" in supports(jnp.bfloat16, 40, 1024, 1024)
    assert "empty" in supports(jnp.bfloat16, 0, 1024, 1024)
    fewest = {"hopper": 52, "ampere": 103}[name]
    assert supports(jnp.bfloat16, fewest, 1024, 1024) is None
    assert "padding" in supports(jnp.bfloat16, fewest - 1, 1024, 1024)
    monkeypatch.setattr(mosaic, "UNAVAILABLE", "jax lacks it")
    assert supports(jnp.bfloat16, 1024, 1024, 1024) == "jax lacks it"


@pytest.mark.parametrize(
    ("capability", "fits"), [("8.0", True), ("8.6", False), ("8.7", True), ("8.9", False), ("12.0", False)]
)
def test_the_shared_memory_of_each_ampere_is_respected(capability, fits, monkeypatch):
    monkeypatch.setattr(ampere, "FIRST_JAX", (0, 10, 0))
    product, device = Product(jnp.bfloat16, 4096, 4096, 4096), gpu(capability)
    assert ampere.supports(product, device) is None
    two_large_stages = ampere.Config(tile_k=128, stages=2)
    assert two_large_stages.shared_bytes == 102_400
    reason = ampere.supports(product, device, two_large_stages)
    assert reason is None if fits else f"102400 bytes of shared memory of 101376 on GPU {capability}" in reason


def test_ampere_is_refused_before_tracing(monkeypatch):
    """Old releases of jax abort the process when they compile it."""
    monkeypatch.setattr(ampere, "FIRST_JAX", (99, 0, 0))
    monkeypatch.setattr(_ampere_kernel, "multiply", None)
    _, a, x = operands(128, 128, 64, ml_dtypes.bfloat16)
    assert "needs 99.0.0 or newer" in ampere.supports(Product(jnp.bfloat16, 128, 128, 64), gpu("8.0"))
    with pytest.raises(NotImplementedError, match=r"needs 99\.0\.0 or newer"):
        ampere.product(a, x)


@pytest.mark.parametrize("name", KERNELS)
def test_product_refuses(name, monkeypatch):
    product = KERNELS[name].product
    _, a, x = operands(8, 16, 64, ml_dtypes.bfloat16)
    with refused(r"x must be \(tokens, 64\)"):
        product(a, x[:, :32], interpret=True)
    with refused("x is float16 and the sparse matrix bfloat16"):
        product(a, x.astype(jnp.float16), interpret=True)
    wide = SparseMatrix(a.values.astype(jnp.float32), a.metadata, a.k)
    with pytest.raises(NotImplementedError, match="float32"):
        product(wide, x.astype(jnp.float32), interpret=True)
    monkeypatch.setattr(mosaic, "UNAVAILABLE", "jax lacks it")
    with pytest.raises(NotImplementedError, match="jax lacks it"):
        product(a, x, interpret=True)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (hopper.Config, {"tile_k": 96}, "tile_k must be 64 or 128"),
        (hopper.Config, {"tile_tokens": 512}, "tile_tokens must be"),
        (hopper.Config, {"stages": 6}, "bytes of shared memory"),
        (hopper.Config, {"stages": 1, "in_flight": 1}, "stages must be more than in_flight"),
        (hopper.Config, {"cluster": 4}, "cluster is 1 or 2"),
        (hopper.Config, {"clusters": 0}, "clusters is positive"),
        (hopper.Config, {"tile_tokens": 256, "groups": 3, "stages": 2}, "3 with at most 192 tile_tokens"),
        (ampere.Config, {"tile_k": 32}, "tile_k must be 64 or 128"),
        (ampere.Config, {"stages": 1}, "stages must be at least 2"),
        (ampere.Config, {"tile_k": 128, "stages": 4}, "bytes of shared memory"),
    ],
)
def test_config_refuses(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_imports_without_mosaic():
    """A jax without Mosaic GPU: the library imports, and the kernels say what is missing."""
    program = """
import sys
sys.modules["jax.experimental.pallas.mosaic_gpu"] = None
from tests.matmul.cases import gpu
import jax, jax.numpy as jnp
from nm_jax.matmul import Product, ampere, hopper
from nm_jax.matmul._compress import SparseMatrix
a = SparseMatrix(jnp.zeros((16, 8), jnp.bfloat16), jnp.zeros((16, 1), jnp.uint16), 16)
ampere.FIRST_JAX = (0, 10, 0)
for kernel, capability in ((ampere, "8.0"), (hopper, "9.0")):
    print(kernel.supports(Product(jnp.bfloat16, 256, 256, 256), gpu(capability)))
    try:
        kernel.product(a, jnp.zeros((8, 16), jnp.bfloat16))
    except NotImplementedError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and all("lacks a part of Pallas Mosaic GPU" in line for line in lines), done.stdout


def test_pallas_is_loaded_by_the_first_use_of_a_kernel():
    program = """
import sys
import jax.numpy as jnp
import nm_jax as nm
from tests.matmul.cases import gpu
loaded = lambda: any(name.startswith("jax.experimental.pallas") for name in sys.modules)
x = w = jnp.zeros((4, 4))
nm.nm_matmul(x, w, implementation="reference"), nm.nm_matmul(x, w), nm.dot_general()
product = nm.matmul.Product(jnp.bfloat16, 256, 256, 256)
print(loaded(), nm.matmul.IMPLEMENTATIONS[0].supports(product, gpu("9.0")), loaded())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.stdout.split() == ["False", "None", "True"], done.stderr
