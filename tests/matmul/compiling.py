"""Compiles programs for GPUs that this machine does not have, each GPU in a process of its own.

A process compiles Mosaic kernels for one architecture only: after the first it keeps calling `ptxas` for that one.
"""

import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import multiprocessing
import os
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
from jax._src import xla_bridge
from jax.experimental import topologies
from jax.experimental.mosaic.gpu import launch_context
from jax.sharding import SingleDeviceSharding
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import func

from nm_jax._core.nonzero import nonzero
from nm_jax.matmul import ampere, hopper, nm_matmul, pack
from nm_jax.matmul._compress import SparseMatrix, compress
from nm_jax.matmul._parameter import parameter, positions
from tests.matmul.hopper_machine import Descriptor

# What the compiler asks of a GPU that is not there.
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_core}
  threads_per_core_limit: {threads}
  core_count: {cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: 85899345920
  shared_memory_per_block_optin: {shared_block}
  cuda_compute_capability {{ {capability} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{name}"
"""
GPUS = {
    "a100": {
        "name": "NVIDIA A100-SXM4-80GB",
        "capability": "major: 8",
        "threads": 2048,
        "cores": 108,
        "fpus": 64,
        "clock": 1.41,
        "bandwidth": 2039 * 10**9,
        "cache": 40 * 2**20,
        "shared_core": 167936,
        "shared_block": 166912,
    },
    "h100": {
        "name": "NVIDIA H100 80GB HBM3",
        "capability": "major: 9",
        "threads": 2048,
        "cores": 132,
        "fpus": 128,
        "clock": 1.98,
        "bandwidth": 3352 * 10**9,
        "cache": 50 * 2**20,
        "shared_core": 233472,
        "shared_block": 232448,
    },
    "rtx5090": {
        "name": "NVIDIA GeForce RTX 5090",
        "capability": "major: 12 feature_extension: ACCELERATED_FEATURES",
        "threads": 1536,
        "cores": 170,
        "fpus": 128,
        "clock": 2.41,
        "bandwidth": 1792 * 10**9,
        "cache": 96 * 2**20,
        "shared_core": 102400,
        "shared_block": 101376,
    },
}
DUMPS = ("*.ptx", "*.ptxas")
KERNELS = {"a100": ampere, "h100": hopper, "rtx5090": ampere}
HALVES = {"bf16": jnp.bfloat16, "f16": jnp.float16}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Text of a compiled program; PTX and report of the assembler for each of its Mosaic kernels; the TMA descriptors
    that they are given."""

    text: str
    ptx: list[str]
    reports: list[str]
    descriptors: list[Descriptor]


def missing():
    """What has to be installed to compile for GPUs, or `None`."""
    if not _installed("jax_plugins", "xla_cuda13"):
        return "the CUDA plugin of jax is missing: pip install -e '.[gpu-compile]'"
    if shutil.which("ptxas") is None and not _installed("nvidia", "cu13"):
        return "ptxas is missing: pip install -e '.[gpu-compile]'"
    return None


def _installed(package, module):
    return importlib.util.find_spec(package) is not None and importlib.util.find_spec(f"{package}.{module}") is not None


def worker():
    """A process that compiles for one GPU."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(max_workers=1, mp_context=context)


def product(gpu, config, tokens, rows, k, half):
    """Compiles one product of a kernel."""
    dtype, kernel = HALVES[half], KERNELS[gpu]
    a = SparseMatrix(_shape(dtype, rows, k // 2), _shape(jnp.uint16, rows, k // 16), k)
    return _compile(_device(gpu), lambda a, x: kernel.product(a, x, config=config), a, _shape(dtype, tokens, k))


def train_step(gpu, tokens, k, rows):
    """Compiles the loss of one layer, and its gradients."""
    device, implementation = _device(gpu), KERNELS[gpu].__name__.rpartition(".")[2]

    def loss(w, x, target):
        y = nm_matmul(x, w, "2:4-T", implementation=implementation, device=device)
        return jnp.sum(jnp.square((y - target).astype(jnp.float32)))

    shapes = [_shape(jnp.bfloat16, *sizes) for sizes in ((k, rows), (tokens, k), (tokens, rows))]
    return _compile(device, jax.grad(loss, argnums=(0, 1)), *shapes)


def packing(gpu, what, *how):
    """Compiles what packs a weight of 16 bits: `in product` and `pack`, one side, or `at once`."""
    w, mask = _shape(jnp.bfloat16, 4096, 4096), _shape(jnp.bool_, 4096, 4096)
    if what == "in product":
        turned = (lambda w: w.T) if how[0] == "forward" else lambda w: w
        return _compile(_device(gpu), lambda w: compress(turned(w), nonzero(turned(w)))[0], w).text
    if what == "at once":
        where = jax.eval_shape(lambda mask: positions(mask, "io", True), mask)
        return _compile(_device(gpu), lambda where, w: _sides(parameter(where, w)), where, w).text
    side, masked = how
    arguments = (w, mask) if masked else (w,)
    return _compile(_device(gpu), lambda *args: _sides(pack(*args, orientation=side)), *arguments).text


def _sides(packed):
    """Values and metadata of the sides that are there."""
    return [(side.values, side.metadata) for side in (packed.forward, packed.backward) if side is not None]


def _device(gpu):
    jax.devices()  # registers the plugin
    target = TARGET.format(**GPUS[gpu])
    topology = xla_bridge.make_pjrt_topology("cuda", gpu, target_config=target, topology="1x1x1")
    return topologies.TopologyDescription(topology._make_compile_only_devices()).devices[0]


def _shape(dtype, *sizes):
    return jax.ShapeDtypeStruct(sizes, dtype)


def _compile(device, function, *arguments):
    here = SingleDeviceSharding(device)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
        # The default device is where Pallas looks for the architecture.
        with jax.default_device(device), recorded_descriptors() as descriptors:
            compiled = jax.jit(function, in_shardings=here, out_shardings=here).lower(*arguments).compile()
        texts = {kind: [path.read_text() for path in sorted(pathlib.Path(folder).glob(kind))] for kind in DUMPS}
    return Compiled(compiled.as_text(), *texts.values(), descriptors)


@contextlib.contextmanager
def recorded_descriptors():
    """Notes every TMA descriptor that Mosaic makes, in the order in which a kernel's parameter holds them."""
    original, found = launch_context.LaunchContext._get_tma_desc, []

    def record(self, gmem_ref, transforms, peer, box, swizzle, *rest, **options):
        before = len(self.tma_descriptors)
        made = original(self, gmem_ref, transforms, peer, box, swizzle, *rest, **options)
        if len(self.tma_descriptors) > before:
            kind = ir.MemRefType(launch_context._find_kernel_argument_for_gmem_ref(gmem_ref).type)
            cut = _transformed(kind, transforms)
            width = 16 if swizzle is None else int(swizzle)
            strides = tuple(cut.get_strides_and_offset()[0])
            found.append(Descriptor(str(kind.element_type), tuple(cut.shape), strides, width, tuple(box)))
        return made

    launch_context.LaunchContext._get_tma_desc = record
    try:
        yield found
    finally:
        launch_context.LaunchContext._get_tma_desc = original


def _transformed(kind, transforms):
    """The type of an array after transforms, which know it only of programs: of one that is thrown away."""
    types = []
    with ir.InsertionPoint(ir.Module.create(ir.Location.unknown()).body):

        @func.FuncOp.from_py_func(kind)
        def probe(ref):
            for transform in transforms:
                ref = transform.apply(ref)
            types.append(ir.MemRefType(ref.type))

    return types[0]
