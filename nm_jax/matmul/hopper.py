"""2:4 products on Hopper's sparse tensor cores: `wgmma.mma_async.sp` in a Pallas Mosaic GPU kernel.

A block computes Y^T = A X^T for a tile of rows of A, 64 for each of its two or three warpgroups that multiply, and
`tile_tokens` rows of X. One more warpgroup keeps `stages` tiles in flight from memory through the tensor memory
accelerator; the others multiply what has landed, and write their tiles transposed. Two blocks of a cluster have
different rows of A and the same rows of X, each loads half of these, and multicast gives them to both. A block goes
through several tiles: the stages of the next one are loaded while the sums of the last one are written.

What bounds it is counted in `_hopper_cost.py`. Nothing has been measured on hardware yet: the program that a GPU would
run is compiled, and run in an interpreter of its instructions.
"""

import dataclasses

import jax
from jaxtyping import Array, Float

from nm_jax.matmul._compress import SparseMatrix
from nm_jax.matmul._fragments import CHUNK, lane_words
from nm_jax.matmul._hopper_cost import best_raster, cycles
from nm_jax.matmul._tiles import MOST_PADDING, check_operands, check_tile_k, misfit, pad_operands, padding
from nm_jax.matmul.base import Product

CAPABILITIES = (range(90, 91),)  # wgmma exists on compute capability 9.0 only
GROUP_ROWS = 64  # rows of one warpgroup
SHARED_BYTES = 227 * 1024  # what a block may use of shared memory
WARPS = 4  # of a warpgroup
OUT_TOKENS = 64  # tokens that a warpgroup writes at a time


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of the kernel.

    Args:
      tile_tokens: rows of X of a block: 64, 128, 192 or 256. More of them reuse A more.
      groups: warpgroups that multiply, 64 rows of A each: 2 or 3. Registers of three hold sums of 192 tokens at most.
      tile_k: columns of a stage: 64 or 128.
      stages: tiles in flight.
      cluster: blocks that share their tile of X by multicast: 1 or 2.
      in_flight: stages whose products may be unfinished when the next is begun: 0 or 1. With 1, a stage is released
        one step late, and a cluster is launched for each tile: sums in flight leave no registers for going on.
      raster: row tiles, of a cluster, that consecutive clusters go through before the next tile of tokens.
      clusters: that are launched, each going through several tiles; `None`: as many as the GPU holds at a time.
    """

    tile_tokens: int = 256
    groups: int = 2
    tile_k: int = 64
    stages: int = 4
    cluster: int = 2
    in_flight: int = 0
    raster: int = 8
    clusters: int | None = None

    def __post_init__(self):
        check_tile_k(self.tile_k)
        if self.tile_tokens not in range(64, 257, 64):
            raise ValueError(f"tile_tokens must be 64, 128, 192 or 256, got {self.tile_tokens}")
        if self.groups not in (2, 3) or self.groups * self.tile_tokens > 3 * 192:
            raise ValueError(f"groups is 2, or 3 with at most 192 tile_tokens, got {self}")
        if self.cluster not in (1, 2) or self.in_flight not in (0, 1) or self.raster < 1:
            raise ValueError(f"cluster is 1 or 2, in_flight 0 or 1 and raster positive, got {self}")
        if self.clusters is not None and self.clusters < 1:
            raise ValueError(f"clusters is positive or None, got {self}")
        if self.stages <= self.in_flight:
            raise ValueError(f"stages must be more than in_flight, got {self}")
        if self.shared_bytes > SHARED_BYTES:
            raise ValueError(
                f"{self} uses {self.shared_bytes} bytes of shared memory of {SHARED_BYTES}; use fewer stages"
            )

    @property
    def tiles(self) -> tuple[int, int, int]:
        """Sizes that the kernel pads (tokens, rows, k) to multiples of."""
        return self.tile_tokens, self.tile_rows * self.cluster, self.tile_k

    @property
    def tile_rows(self) -> int:
        """Rows of A of a block."""
        return GROUP_ROWS * self.groups

    @property
    def stage_bytes(self) -> tuple[int, int, int]:
        """Bytes of the values, the words of metadata and the tile of X of one stage."""
        words = 4 * 32 * WARPS * self.groups * (self.tile_k // CHUNK)
        return self.tile_rows * self.tile_k, words, self.tile_tokens * self.tile_k * 2

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: its stages, the tiles it writes from, and 1 kB for barriers."""
        return self.stages * sum(self.stage_bytes) + self.tile_rows * OUT_TOKENS * 2 + 1024


SHIPPED = (
    Config(192, groups=3, stages=5),
    Config(256, groups=2, stages=5),
    Config(128, groups=2, stages=5),
    Config(64, groups=2, stages=4),
    Config(192, groups=3, stages=5, cluster=1),
    Config(128, groups=2, stages=5, cluster=1),
    Config(64, groups=2, stages=5, cluster=1),
)
"""What `default_config` chooses from."""


def default_config(tokens: int, rows: int, k: int) -> Config:
    """The shape used unless one is given: of those whose padding is not refused, the one that should take least time
    (`_hopper_cost.cycles`)."""
    sizes = (tokens, rows, k)
    config = min(SHIPPED, key=lambda c: (padding(sizes, c.tiles) > MOST_PADDING, cycles(c, *sizes)))
    return dataclasses.replace(config, raster=best_raster(config, *sizes))


def supports(product: Product, device: jax.Device, config: Config | None = None) -> str | None:
    """The contract of `Implementation.supports`.

    Sizes that tiles do not fit are padded. That pays while it adds at most a quarter to the work: fewer than 52 tokens
    are refused, for instance.
    """
    config = config or default_config(*product.sizes)
    return misfit(product, config.tiles, device, CAPABILITIES) or _kernel().unavailable()


def product(
    a: SparseMatrix, x: Float[Array, "tokens k"], *, config: Config | None = None, interpret: bool = False
) -> Float[Array, "tokens rows"]:
    """The contract of `Implementation.product`, in any shape of the kernel; `None` takes `default_config`
    (interpreted by a jax that interprets no clusters: without its cluster)."""
    check_operands(a, x)
    if reason := _kernel().unavailable():
        raise NotImplementedError(reason)
    if config is None:
        config = default_config(x.shape[0], a.rows, a.k)
        if interpret and not _kernel().INTERPRETS_CLUSTERS:
            config = dataclasses.replace(config, cluster=1)
    values, metadata, padded = pad_operands(a, x, config.tiles)
    words = lane_words(metadata, WARPS)
    return _kernel().multiply(values, words, padded, config, interpret)[: x.shape[0], : a.rows]


def _kernel():
    """The kernel itself: Pallas takes longer to import than all of this library."""
    from nm_jax.matmul import _hopper_kernel

    return _hopper_kernel
