"""The kernel of `hopper.py` in Pallas Mosaic GPU, and the instructions of Hopper's sparse tensor cores that it runs."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from nm_jax.matmul import _mosaic as mosaic
from nm_jax.matmul._fragments import CHUNK, add_product
from nm_jax.matmul._hopper_cost import processors
from nm_jax.matmul._mosaic import arith, fragmented_array, ir, llvm, memref, nvvm, pl, plgpu
from nm_jax.matmul._tiles import PTX_TYPES, swizzle_bytes
from nm_jax.matmul.hopper import GROUP_ROWS, OUT_TOKENS, WARPS, Config

INTERPRETS_CLUSTERS = jax.__version_info__ >= (0, 11)
_STEP = 32  # columns of A, before compression, that an instruction covers
_MEMORY_REGISTERS = 56  # of a thread of the warpgroup that only moves data


@dataclasses.dataclass(frozen=True)
class Step:
    """Where one instruction finds its operands in a stage: bytes past the start of A and of X in shared memory, which
    word of metadata, and which half of the lanes gives it."""

    a_offset: int
    x_offset: int
    word: int
    selector: int


def steps(tile_k: int) -> list[Step]:
    """The instructions of one stage, 32 columns each."""
    return [
        Step(_offset(start // 2, tile_k // 2), _offset(start, tile_k), start // CHUNK, start % CHUNK // _STEP)
        for start in range(0, tile_k, _STEP)
    ]


def _offset(column: int, columns: int) -> int:
    """Bytes from the start of a swizzled tile to a column of its first row. The swizzle itself is left out: hardware
    applies it to the final address."""
    width = swizzle_bytes(columns)
    piece, inside = divmod(2 * column, width)
    return piece * 8 * width + inside


def descriptor(columns: int) -> int:
    """The constant part of the descriptor of a swizzled tile with rows of `columns` 16-bit entries.

    Bytes from eight rows to the next eight, over 16, from bit 32, and the kind of swizzle from bit 62 (PTX ISA, "Matrix
    descriptor format").
    """
    width = swizzle_bytes(columns)
    return (8 * 2 * columns >> 4) << 32 | {128: 1, 64: 2, 32: 3}[width] << 62


unavailable = mosaic.unavailable


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def multiply(
    values: Float[Array, "rows kept"],
    words: Int32[Array, "tiles chunks lanes"],
    x: Float[Array, "tokens k"],
    config: Config,
    interpret: bool,
) -> Float[Array, "tokens rows"]:
    tokens, k = x.shape
    row_tiles, token_tiles = values.shape[0] // config.tiles[1], tokens // config.tile_tokens
    clusters = config.clusters or processors() // config.cluster
    tiles, chunks = row_tiles * token_tiles, config.tile_k // CHUNK
    leaf = _Decoded() if interpret else _TensorCores(config, PTX_TYPES[jnp.dtype(x.dtype)])
    block = functools.partial(plgpu.BlockSpec, delay_release=config.in_flight)
    shared_x: dict[str, Any] = {"collective_axes": ("cluster",)} if config.cluster > 1 else {}
    specs = [
        block(
            (config.tile_rows, config.tile_k // 2),
            lambda step: (0, step),
            transforms=mosaic.swizzled(config.tile_k // 2),
        ),
        block((config.groups, chunks, 32 * WARPS), lambda step: (0, step, 0)),
        block(
            (config.tile_tokens, config.tile_k),
            lambda step: (0, step),
            transforms=mosaic.swizzled(config.tile_k),
            **shared_x,
        ),
    ]

    def pipeline(multiply, compute):
        return plgpu.emit_pipeline_warp_specialized(
            multiply,
            grid=(k // config.tile_k,),
            in_specs=specs,
            max_concurrent_steps=config.stages,
            num_compute_wgs=config.groups,
            wg_axis="group",
            memory_registers=_MEMORY_REGISTERS,
            compute_context=compute,
        )

    def one_tile(linear, allocations, values_ref, words_ref, x_ref, y_ref, out):
        row_tile, token_tile = mosaic.tile_index(linear, row_tiles, token_tiles, config.raster)
        if config.cluster > 1:
            row_tile = row_tile * config.cluster + lax.axis_index("cluster")
        group = lax.axis_index("group")

        def multiply(_, a, e, b, acc):
            return leaf.multiply(acc, a.at[pl.ds(group * GROUP_ROWS, GROUP_ROWS)], e, b, group)

        def compute(pipeline):
            acc = leaf.finish(pipeline(leaf.zeros((GROUP_ROWS, config.tile_tokens)))).astype(x.dtype)
            for start in range(0, config.tile_tokens, OUT_TOKENS):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                leaf.store_transposed(out.at[group], acc[:, start : start + OUT_TOKENS])
                plgpu.commit_smem()
                where = (
                    pl.ds(token_tile * config.tile_tokens + start, OUT_TOKENS),
                    pl.ds(row_tile * config.tile_rows + group * GROUP_ROWS, GROUP_ROWS),
                )
                plgpu.copy_smem_to_gmem(out.at[group], y_ref.at[where])

        pipeline(multiply, compute)(
            values_ref.at[pl.ds(row_tile * config.tile_rows, config.tile_rows)],
            words_ref.at[pl.ds(row_tile * config.groups, config.groups)],
            x_ref.at[pl.ds(token_tile * config.tile_tokens, config.tile_tokens)],
            allocations=allocations,
        )

    def kernel(values_ref, words_ref, x_ref, y_ref, out):
        operands = values_ref, words_ref, x_ref

        # Stages outlive a tile: while its sums are written, those of the next one are loaded.
        def all_tiles(allocations):
            if config.in_flight:
                one_tile(lax.axis_index("tile"), allocations, *operands, y_ref, out)
            else:

                @plgpu.nd_loop((tiles,), collective_axes="tile")
                def _(loop):
                    one_tile(loop.index[0], allocations, *operands, y_ref, out)

            plgpu.wait_smem_to_gmem(0)

        allocations = pipeline(_nothing, _nothing).get_allocations(*operands)
        pl.run_scoped(all_tiles, allocations=allocations, collective_axes="group")

    options: dict[str, Any] = {"interpret": mosaic.interpreter()} if interpret else {}
    if config.cluster > 1:
        options |= {"cluster": (config.cluster,), "cluster_names": ("cluster",)}
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((tokens, values.shape[0]), x.dtype),
        scratch_types=[
            plgpu.SMEM((config.groups, OUT_TOKENS, GROUP_ROWS), x.dtype, transforms=mosaic.swizzled(GROUP_ROWS))
        ],
        grid=(tiles if config.in_flight else min(tiles, clusters),),
        grid_names=("tile",),
        num_threads=config.groups + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **options,
    )(values, words, x)


def _nothing(*_, **__):
    """What memory a pipeline needs does not depend on what it does."""


class _Decoded:
    """Stands in for the instruction where there is none: multiplies what the same packed words decode to."""

    def zeros(self, shape):
        return jnp.zeros(shape, jnp.float32)

    def multiply(self, acc, a, e, b, group):
        return add_product(acc, a[...], e[group], b[...])

    def finish(self, acc):
        return acc

    def store_transposed(self, ref, tile):
        ref[...] = tile.T


@dataclasses.dataclass(frozen=True)
class _TensorCores:
    """What a warpgroup does with a stage, in the instructions of the GPU.

    The sums stay in 32-bit registers from the first instruction to the last. With products in flight nothing else may
    touch these registers, so no barrier and no conversion comes between two stages.
    """

    config: Config
    ptx_type: str

    @property
    def _sums(self):
        return plgpu.Layout.TILED(
            plgpu.Tiling(((64, 8), (16, 8), (8, 8), (2,), (1,))), warp_dims=(-8,), lane_dims=(-4, -3), vector_dim=-1
        )

    def _sums_type(self):
        return plgpu.ShapeDtypeStruct((GROUP_ROWS, self.config.tile_tokens), jnp.float32, layout=self._sums)

    def zeros(self, shape):
        return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), self._sums)

    def multiply(self, acc, a, e, b, group):
        tile_k = self.config.tile_k
        arguments = (
            self._sums,
            plgpu.RefType(mosaic.swizzled(tile_k // 2)),
            plgpu.RefType(()),
            plgpu.RefType(mosaic.swizzled(tile_k)),
            plgpu.Layout.WG_SPLAT,
        )
        inline = plgpu.inline_mgpu(arg_types=arguments, return_type=self._sums_type())
        return inline(self._emit)(acc, a, e, b, group)

    def finish(self, acc):
        if self.config.in_flight:
            inline = plgpu.inline_mgpu(arg_types=(self._sums,), return_type=self._sums_type())
            acc = inline(lambda _, sums: _wait(sums, 0))(acc)
        return plgpu.layout_cast(acc, plgpu.Layout.WGMMA)

    def store_transposed(self, ref, tile):
        transposed = ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))
        transposed[...] = plgpu.layout_cast(tile, plgpu.Layout.WGMMA_TRANSPOSED)

    def _emit(self, _, acc, a, e, b, group):
        tile_k = self.config.tile_k
        starts = _descriptor_value(a, tile_k // 2), _descriptor_value(b, tile_k)
        words = _load_words(e, group.registers.flat[0], tile_k // CHUNK)
        if not self.config.in_flight:
            acc = fragmented_array.optimization_barrier(acc)  # or sums might be computed after the fence
        nvvm.wgmma_fence_aligned()
        sums = list(acc.registers.flat)
        for step in steps(tile_k):
            operands = [
                arith.addi(start, mosaic.constant(offset >> 4, 64))
                for start, offset in zip(starts, (step.a_offset, step.x_offset), strict=True)
            ]
            sums = _wgmma(sums, *operands, words[step.word], step.selector, self.config.tile_tokens, self.ptx_type)
        nvvm.wgmma_commit_group_sync_aligned()
        registers = np.array(sums, dtype=object).reshape(acc.registers.shape)
        acc = fragmented_array.FragmentedArray(_registers=registers, _layout=acc.layout, _is_signed=None)
        return _wait(acc, self.config.in_flight)


def _wait(acc, in_flight):
    """Waits until at most `in_flight` stages are unfinished; sums of which none is are then safe to read."""
    nvvm.wgmma_wait_group_sync_aligned(in_flight)
    return acc if in_flight else fragmented_array.optimization_barrier(acc)


def _descriptor_value(ref, columns):
    """The descriptor of a tile in shared memory."""
    i64 = ir.IntegerType.get_signless(64)
    address = llvm.ptrtoint(i64, mosaic.utils.memref_ptr(ref))
    start = arith.shrui(arith.andi(address, mosaic.constant(0x3FFFF, 64)), mosaic.constant(4, 64))
    high = arith.shli(mosaic.constant(descriptor(columns) >> 32, 64), mosaic.constant(32, 64))
    return arith.ori(start, high)


def _load_words(ref, group, chunks):
    """This lane's words of metadata, in registers before the fence that comes next."""
    index, i32 = ir.IndexType.get(), ir.IntegerType.get_signless(32)
    lane = arith.index_castui(index, arith.remui(mosaic.thread_index(), mosaic.constant(32 * WARPS)))
    words = []
    for chunk in range(chunks):
        where = [arith.index_castui(index, group), arith.constant(index, chunk), lane]
        words += mosaic.assemble([i32], [memref.load(ref, where)], "mov.b32 $0, $1;", "=r,r")
    return words


def _wgmma(sums, a, b, word, selector, tokens, ptx_type):
    """One instruction: sums, 64 rows of A and `tokens` of X, plus the product over 32 columns."""
    count = len(sums)
    registers = ", ".join(f"${k}" for k in range(count))
    a_operand, b_operand, word_operand = (f"${2 * count + k}" for k in range(3))
    ptx = (
        "{ .reg .pred add; setp.ne.b32 add, 1, 0; "
        f"wgmma.mma_async.sp.sync.aligned.m64n{tokens}k{_STEP}.f32.{ptx_type}.{ptx_type} "
        f"{{{registers}}}, {a_operand}, {b_operand}, {word_operand}, {selector}, add, 1, 1, 0, 0; }}"
    )
    constraints = ",".join(["=f"] * count + [str(k) for k in range(count)] + ["l", "l", "r"])
    return mosaic.assemble([sums[0].type] * count, [*sums, a, b, word], ptx, constraints)
