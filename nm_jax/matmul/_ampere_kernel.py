"""The kernel of `ampere.py` in Pallas Mosaic GPU, and the instructions of Ampere's sparse tensor cores that it runs."""

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
from nm_jax.matmul._mosaic import arith, fragmented_array, ir, llvm, memref, pl, plgpu
from nm_jax.matmul._tiles import PTX_TYPES, swizzle_bytes
from nm_jax.matmul.ampere import TILE, WORD_WARPS, Config, reorder

_WARP = 64  # rows of A, and of X, that a warp multiplies
_STEP = 32  # columns of A, before compression, that an instruction covers
_A_TILES, _X_TILES = _WARP // 16, _WARP // 8  # instructions that cover the sums of a warp


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
    row_tiles, token_tiles = values.shape[0] // TILE, tokens // TILE
    chunks = config.tile_k // CHUNK
    leaf = _Decoded() if interpret else _TensorCores(config, PTX_TYPES[jnp.dtype(x.dtype)], values.shape[0])
    a_layout, x_layout = mosaic.swizzled(config.tile_k // 2), mosaic.swizzled(config.tile_k)
    specs = [
        plgpu.BlockSpec((TILE, config.tile_k // 2), lambda step: (0, step), transforms=a_layout),
        plgpu.BlockSpec((chunks, 32 * WORD_WARPS), lambda step: (step, 0)),
        plgpu.BlockSpec((TILE, config.tile_k), lambda step: (0, step), transforms=x_layout),
    ]

    def kernel(values_ref, words_ref, x_ref, y_ref):
        row_tile, token_tile = mosaic.tile_index(lax.axis_index("tile"), row_tiles, token_tiles, config.raster)
        sums = plgpu.emit_pipeline(
            lambda _, a, e, b, acc: leaf.multiply(acc, a, e, b),
            grid=(k // config.tile_k,),
            in_specs=specs,
            max_concurrent_steps=config.stages,
            init_carry=leaf.zeros(),
        )(
            values_ref.at[pl.ds(row_tile * TILE, TILE)],
            words_ref.at[row_tile],
            x_ref.at[pl.ds(token_tile * TILE, TILE)],
        )
        leaf.store(sums, y_ref, token_tile * TILE, row_tile * TILE)

    options: dict[str, Any] = {"interpret": mosaic.interpreter()} if interpret else {}
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((tokens, values.shape[0]), x.dtype),
        grid=(row_tiles * token_tiles,),
        grid_names=("tile",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **options,
    )(values, words, x)


class _Decoded:
    """Stands in for the instructions where there are none: multiplies what the same packed words decode to."""

    def zeros(self):
        return jnp.zeros((TILE, TILE), jnp.float32)

    def multiply(self, acc, a, e, b):
        return add_product(acc, a[...], e[...], b[...])

    def store(self, sums, y_ref, token, row):
        where = (pl.ds(token, TILE), pl.ds(row, TILE))
        y_ref.at[where][...] = reorder(sums).T.astype(y_ref.dtype)


@dataclasses.dataclass(frozen=True)
class _Lane:
    """Where a thread stands: its lane, and which 64 rows of A and of X its warp multiplies."""

    lane: Any
    a_warp: Any
    x_warp: Any

    @classmethod
    def current(cls) -> "_Lane":
        c = mosaic.constant
        thread = mosaic.thread_index()
        warp = arith.andi(arith.shrui(thread, c(5)), c(3))
        return cls(arith.andi(thread, c(31)), arith.shrui(warp, c(1)), arith.andi(warp, c(1)))


@dataclasses.dataclass(frozen=True)
class _TensorCores:
    """What a block does with a stage, in the instructions of the GPU."""

    config: Config
    ptx_type: str
    rows: int

    @property
    def _sums(self):
        tiling = plgpu.Tiling(((TILE, TILE), (_WARP, _WARP), (16, 8), (8, 8), (2,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-9, -8), lane_dims=(-3, -2), vector_dim=-1)

    def zeros(self):
        return plgpu.layout_cast(jnp.zeros((TILE, TILE), jnp.float32), self._sums)

    def multiply(self, acc, a, e, b):
        tile_k = self.config.tile_k
        layouts = mosaic.swizzled(tile_k // 2), (), mosaic.swizzled(tile_k)
        inline = plgpu.inline_mgpu(
            arg_types=(self._sums, *map(plgpu.RefType, layouts)),
            return_type=plgpu.ShapeDtypeStruct((TILE, TILE), jnp.float32, layout=self._sums),
        )
        return inline(self._emit_multiply)(acc, a, e, b)

    def store(self, sums, y_ref, token, row):
        splat = plgpu.Layout.WG_SPLAT
        inline = plgpu.inline_mgpu(arg_types=(self._sums, plgpu.RefType(()), splat, splat))
        inline(self._emit_store)(sums, y_ref, token, row)

    def _emit_multiply(self, _, acc, a, e, b):
        tile_k = self.config.tile_k
        thread = _Lane.current()
        a_matrices = _Matrices.of_a(a, tile_k // 2, thread)
        x_matrices = _Matrices.of_x(b, tile_k, thread)
        sums = _scalars(acc)
        for start in range(0, tile_k, _STEP):
            words = [_load_word(e, start // CHUNK, tile, thread) for tile in range(_A_TILES)]
            a_registers = [a_matrices.load(2 * tile, start // 2) for tile in range(_A_TILES)]
            for x_tile in range(_X_TILES):
                x_registers = x_matrices.load(x_tile, start)
                for a_tile in range(_A_TILES):
                    mine = _sums_of(a_tile, x_tile)
                    selector = start % CHUNK // _STEP
                    operands = [*a_registers[a_tile], *x_registers, *sums[mine], words[a_tile]]
                    sums[mine] = _mma(operands, selector, self.ptx_type)
        return _like(acc, sums)

    def _emit_store(self, _, acc, y, token, row):
        """A thread has eight neighbouring entries of each of its rows of Y: one write of 16 bytes."""
        c, i64 = mosaic.constant, ir.IntegerType.get_signless(64)
        thread, sums = _Lane.current(), _scalars(acc)
        eight, pair = arith.shrui(thread.lane, c(2)), arith.andi(thread.lane, c(3))
        row = _sum(row.registers.flat[0], arith.muli(thread.a_warp, c(_WARP)), arith.muli(eight, c(8)))
        token = _sum(token.registers.flat[0], arith.muli(thread.x_warp, c(_WARP)), arith.muli(pair, c(2)))
        start = llvm.ptrtoint(i64, mosaic.utils.memref_ptr(y))
        start = arith.addi(start, arith.muli(arith.extui(i64, row), c(2, 64)))
        for x_tile in range(_X_TILES):
            for column in range(2):
                halves = [sums[_sums_of(a_tile, x_tile)][column::2] for a_tile in range(_A_TILES)]
                packed = [_round_pair(low, high, self.ptx_type) for low, high in halves]
                where = arith.extui(i64, arith.addi(token, c(8 * x_tile + column)))
                address = arith.addi(start, arith.muli(where, c(2 * self.rows, 64)))
                mosaic.assemble([], [address, *packed], "st.global.v4.b32 [$0], {$1, $2, $3, $4};", "l,r,r,r,r")


@dataclasses.dataclass(frozen=True)
class _Matrices:
    """8 x 8 matrices in a swizzled tile, as `ldmatrix` reads them: four at a time, lane 8 q + r naming row r of the
    q-th.

    Attributes:
      start: address of this lane's row in the four matrices at row and column 0.
      row_bytes: of the tile.
    """

    start: Any
    row_bytes: int

    @classmethod
    def of_a(cls, ref, columns, thread):
        """16 x 16 of A: the second and the fourth matrix are eight rows down, the third and the fourth to the right."""
        c = mosaic.constant
        matrix = arith.shrui(thread.lane, c(3))
        row_eight = _sum(arith.muli(thread.a_warp, c(_WARP // 8)), arith.andi(matrix, c(1)))
        return cls._at(ref, columns, thread, row_eight, arith.shrui(matrix, c(1)))

    @classmethod
    def of_x(cls, ref, columns, thread):
        """8 x 32 of X: the matrices lie side by side."""
        c = mosaic.constant
        return cls._at(ref, columns, thread, arith.muli(thread.x_warp, c(_WARP // 8)), arith.shrui(thread.lane, c(3)))

    @classmethod
    def _at(cls, ref, columns, thread, row_eight, chunk):
        c, width = mosaic.constant, swizzle_bytes(columns)
        row = arith.andi(thread.lane, c(7))
        swizzle = arith.shrui(row, c({128: 0, 64: 1, 32: 2}[width]))
        inside = arith.addi(arith.muli(row, c(width)), arith.shli(arith.xori(chunk, swizzle), c(4)))
        base = llvm.ptrtoint(ir.IntegerType.get_signless(32), mosaic.utils.memref_ptr(ref))
        start = _sum(base, arith.muli(row_eight, c(8 * 2 * columns)), inside)
        return cls(start, 2 * columns)

    def load(self, row_eight: int, column: int):
        """The four registers of the matrices `row_eight` eights of rows down, and `column` columns to the right."""
        c, width = mosaic.constant, min(128, self.row_bytes)
        piece, inside = divmod(2 * column, width)
        # The tile is aligned to its swizzle, so columns inside a piece change the address by an exclusive or.
        address = arith.addi(arith.xori(self.start, c(inside)), c(row_eight * 8 * self.row_bytes + piece * 8 * width))
        ptx = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];"
        return mosaic.assemble([ir.IntegerType.get_signless(32)] * 4, [address], ptx, "=r,=r,=r,=r,r")


def _load_word(ref, chunk, tile, thread):
    """This lane's word of metadata for 16 rows of A."""
    index, c = ir.IndexType.get(), mosaic.constant
    place = _sum(arith.muli(thread.a_warp, c(_A_TILES * 32)), c(32 * tile), thread.lane)
    return memref.load(ref, [arith.constant(index, chunk), arith.index_castui(index, place)])


def _mma(operands, selector, ptx_type):
    """16 rows of A times 8 of X over 32 columns, plus sums. Operands: four registers of each, four sums, metadata."""
    ptx = (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k{_STEP}.row.col.f32.{ptx_type}.{ptx_type}.f32 "
        f"{{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9, $10, $11}}, {{$12, $13, $14, $15}}, $16, {selector};"
    )
    constraints = "=f,=f,=f,=f," + "r," * 8 + "f,f,f,f,r"
    return mosaic.assemble([ir.F32Type.get()] * 4, operands, ptx, constraints, pure=True)


def _round_pair(low, high, ptx_type):
    """Two sums, rounded, in one register."""
    i32 = ir.IntegerType.get_signless(32)
    return mosaic.assemble([i32], [high, low], f"cvt.rn.{ptx_type}x2.f32 $0, $1, $2;", "=r,f,f", pure=True)[0]


def _sums_of(a_tile, x_tile):
    """Which of a thread's sums belong to an instruction: rows g and g + 8, two columns each."""
    first = 4 * (a_tile * _X_TILES + x_tile)
    return slice(first, first + 4)


def _scalars(acc):
    """A thread's sums, one by one."""
    return [llvm.extractelement(pair, position=mosaic.constant(k)) for pair in acc.registers.flat for k in range(2)]


def _like(acc, sums):
    """Sums, put back together as `acc` holds them."""
    pairs = np.empty(len(sums) // 2, dtype=object)
    for k in range(len(pairs)):
        pair = llvm.mlir_undef(acc.registers.flat[0].type)
        for half in range(2):
            pair = llvm.insertelement(pair, sums[2 * k + half], position=mosaic.constant(half))
        pairs[k] = pair
    return fragmented_array.FragmentedArray(
        _registers=pairs.reshape(acc.registers.shape), _layout=acc.layout, _is_signed=None
    )


def _sum(*terms):
    return functools.reduce(arith.addi, terms)
