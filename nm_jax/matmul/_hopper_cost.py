"""What a tile of the Hopper kernel costs, by arithmetic: chooses its shape where nothing was measured.

Three things bound a step of a block, `tile_k` columns; the slowest counts. With g warpgroups of 64 rows, N tokens and a
cluster of c blocks:

- tensor cores: N / 2 cycles for a sparse m64nNk32, so g * tile_k / 32 of these;
- shared memory, 128 bytes in a cycle: each such instruction reads 64 x 16 kept values and N x 32 entries of X;
- L2, about 39 bytes in a cycle for each multiprocessor: values and words of the tile, and 1 / c of its X.
"""

import dataclasses
import math
from typing import Any

import jax

from nm_jax.matmul._tiles import padded

PROCESSORS = 132  # of an H100 SXM; other Hoppers have 114 to 132
L2_BYTES = 39  # in a cycle, for each multiprocessor when all read: assumed
SHARED_BYTES = 128  # in a cycle
START = 1500  # cycles of launching a block until its first stage has landed: assumed


def processors() -> int:
    """Multiprocessors of the GPU at hand; of an H100 where there is none."""
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else PROCESSORS


@dataclasses.dataclass(frozen=True)
class Step:
    """Counts of one step of a block.

    Attributes:
      l2_bytes: read from L2.
      tensor_cycles: of the tensor cores.
      shared_cycles: of reading operands in shared memory.
    """

    l2_bytes: int
    tensor_cycles: int
    shared_cycles: int

    @property
    def cycles(self) -> float:
        return max(self.l2_bytes / L2_BYTES, float(self.tensor_cycles), float(self.shared_cycles))


def step(config: Any) -> Step:
    """The counts of a `hopper.Config`."""
    values, words, x = config.stage_bytes
    instructions = config.groups * config.tile_k // 32
    shared_bytes = instructions * (64 * 16 * 2 + config.tile_tokens * 32 * 2) + words
    return Step(
        l2_bytes=values + words + x // config.cluster,
        tensor_cycles=instructions * config.tile_tokens // 2,
        shared_cycles=shared_bytes // SHARED_BYTES,
    )


def cycles(config: Any, tokens: int, rows: int, k: int) -> float:
    """Cycles of a whole product: blocks that start once and then go through rounds of tiles, each with its steps and
    the writing of its sums. With products in flight a block starts for every tile."""
    tokens, rows, k = padded((tokens, rows, k), config.tiles)
    blocks = tokens // config.tile_tokens * (rows // config.tile_rows)
    write = config.tile_rows * config.tile_tokens * 2 / L2_BYTES
    rounds = math.ceil(blocks / PROCESSORS)
    starts = rounds if config.in_flight else 1
    return starts * START + rounds * (k // config.tile_k * step(config).cycles + write)


def best_raster(config: Any, tokens: int, rows: int, k: int) -> int:
    """The raster whose blocks at a time read the fewest different bytes of A and X, so that L2 keeps them."""
    tokens, rows, _ = padded((tokens, rows, k), config.tiles)
    row_tiles, token_tiles = rows // config.tiles[1], tokens // config.tile_tokens
    values, words, x = config.stage_bytes
    clusters = PROCESSORS // config.cluster

    def different_bytes(raster):
        high = min(raster, row_tiles)
        wide = min(math.ceil(clusters / high), token_tiles)
        return high * config.cluster * (values + words) + wide * x

    return min((4, 8, 16, 32), key=lambda raster: (different_bytes(raster), raster))
