"""2:4 products on Hopper's sparse tensor cores: `wgmma.mma_async.sp` in a Pallas Mosaic GPU kernel.

A block computes Y^T = A X^T for a tile of 128 rows of A (two warpgroups of 64) and `tile_tokens` rows of X. A third
warpgroup keeps `stages` tiles in flight from memory through the tensor memory accelerator; the two others multiply
what has landed, and write their tiles transposed.

Expected, by arithmetic: at 256 tokens an instruction (m64n256k32) takes 128 cycles of the tensor cores and 144 of
reading shared memory, so 89 % of the sparse peak at most, 80 % at 128 tokens. Nothing has been measured on hardware
yet: the program that a GPU would run is compiled, and run in an interpreter of its instructions.
"""

import dataclasses

import jax
from jaxtyping import Array, Float

from nm_jax.matmul._compress import SparseMatrix
from nm_jax.matmul._fragments import CHUNK, lane_words
from nm_jax.matmul._tiles import check_operands, check_tile_k, misfit, pad_operands
from nm_jax.matmul.base import Product

CAPABILITY = range(90, 91)  # wgmma exists on compute capability 9.0 only
TILE_ROWS = 128
GROUP_ROWS = 64  # rows of one warpgroup
GROUPS = TILE_ROWS // GROUP_ROWS
SHARED_BYTES = 227 * 1024  # what a block may use of shared memory
WARPS = 4  # of a warpgroup
OUT_TOKENS = 64  # tokens that a warpgroup writes at a time


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of the kernel.

    Args:
      tile_tokens: rows of X of a block: 64, 128, 192 or 256. More of them reuse A more.
      tile_k: columns of a stage: 64 or 128.
      stages: tiles in flight.
      cluster: blocks that share their tile of X by multicast: 1 or 2.
      in_flight: stages whose products may be unfinished when the next is begun: 0 or 1. With 1, a stage is released
        one step late.
      raster: row tiles that consecutive blocks go through before the next tile of tokens.
    """

    tile_tokens: int = 256
    tile_k: int = 64
    stages: int = 4
    cluster: int = 1
    in_flight: int = 0
    raster: int = 8

    def __post_init__(self):
        check_tile_k(self.tile_k)
        if self.tile_tokens not in range(64, 257, 64):
            raise ValueError(f"tile_tokens must be 64, 128, 192 or 256, got {self.tile_tokens}")
        if self.cluster not in (1, 2) or self.in_flight not in (0, 1) or self.raster < 1:
            raise ValueError(f"cluster is 1 or 2, in_flight 0 or 1 and raster positive, got {self}")
        if self.stages <= self.in_flight:
            raise ValueError(f"stages must be more than in_flight, got {self}")
        if self.shared_bytes > SHARED_BYTES:
            raise ValueError(
                f"{self} uses {self.shared_bytes} bytes of shared memory of {SHARED_BYTES}; use fewer stages"
            )

    @property
    def tiles(self) -> tuple[int, int, int]:
        """Sizes that the kernel pads (tokens, rows, k) to multiples of."""
        return self.tile_tokens, TILE_ROWS * self.cluster, self.tile_k

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: its stages, the tiles it writes from, and 1 kB for barriers."""
        values = TILE_ROWS * self.tile_k
        words = GROUPS * self.tile_k // CHUNK * 512
        x = self.tile_tokens * self.tile_k * 2
        return self.stages * (values + words + x) + TILE_ROWS * OUT_TOKENS * 2 + 1024


def default_config(tokens: int, rows: int, k: int) -> Config:
    """The shape used unless one is given: the tile of tokens that pads least, and of those the largest."""
    del rows, k
    tile = min((256, 128, 64), key=lambda size: -(-tokens // size) * size)
    return Config(tile_tokens=tile, stages={256: 4, 128: 6, 64: 6}[tile])


def supports(product: Product, device: jax.Device, config: Config | None = None) -> str | None:
    """The contract of `Implementation.supports`.

    Sizes that tiles do not fit are padded. That pays while it adds at most a quarter to the work: fewer than 52 tokens
    are refused, for instance.
    """
    config = config or default_config(*product.sizes)
    return misfit(product, config.tiles, device, CAPABILITY) or _kernel().unavailable()


def product(
    a: SparseMatrix, x: Float[Array, "tokens k"], *, config: Config | None = None, interpret: bool = False
) -> Float[Array, "tokens rows"]:
    """The contract of `Implementation.product`, in any shape of the kernel; `None` takes `default_config`."""
    check_operands(a, x)
    if reason := _kernel().unavailable():
        raise NotImplementedError(reason)
    config = config or default_config(x.shape[0], a.rows, a.k)
    values, metadata, padded = pad_operands(a, x, config.tiles)
    words = lane_words(metadata, WARPS)
    return _kernel().multiply(values, words, padded, config, interpret)[: x.shape[0], : a.rows]


def _kernel():
    """The kernel itself: Pallas takes longer to import than all of this library."""
    from nm_jax.matmul import _hopper_kernel

    return _hopper_kernel
