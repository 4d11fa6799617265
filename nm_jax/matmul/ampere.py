"""2:4 products on the sparse tensor cores of Ampere and its kin: `mma.sp` in a Pallas Mosaic GPU kernel.

A block computes Y^T = A X^T for 128 rows of A and 128 rows of X, with four warps of 64 x 64 that keep their sums in
registers. `stages` tiles are on their way from memory at a time (`cp.async`); `ldmatrix` reads them from swizzled
shared memory without bank conflicts.

The rows of A are fed in another order: of every 64, row 8 c + g is given row 8 g + c. The sums of a thread then belong
to eight neighbouring entries of a row of Y, which it writes at once.

Nothing has been measured on hardware yet: the program that a GPU would run is compiled, and run in an interpreter of
its instructions.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from nm_jax.matmul._compress import SparseMatrix
from nm_jax.matmul._fragments import CHUNK, lane_words
from nm_jax.matmul._tiles import check_operands, check_tile_k, compute_capability, misfit, pad_operands
from nm_jax.matmul.base import Product

# Ampere, Ada, and the GPUs of Blackwell for workstations, which have these instructions and not those of `tcgen05`.
CAPABILITIES = (range(80, 90), range(120, 122))
FIRST_JAX = (0, 11, 2)
TILE = 128  # rows of A, and of X, that a block multiplies
WORD_WARPS = TILE // 16  # lane words come for 16 rows at a time
# What a block may use of shared memory, by compute capability times ten (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability").
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 87: 163 * 1024, 89: 99 * 1024, 120: 99 * 1024, 121: 99 * 1024}


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of the kernel.

    Args:
      tile_k: columns of a stage: 64 or 128.
      stages: tiles in flight. Three of 64 columns let two blocks share a multiprocessor of an A100.
      raster: row tiles that consecutive blocks go through before the next tile of tokens.
    """

    tile_k: int = 64
    stages: int = 3
    raster: int = 8

    def __post_init__(self):
        check_tile_k(self.tile_k)
        if self.stages < 2 or self.raster < 1:
            raise ValueError(f"stages must be at least 2 and raster positive, got {self}")
        if self.shared_bytes > max(SHARED_BYTES.values()):
            raise ValueError(
                f"{self} uses {self.shared_bytes} bytes of shared memory of {max(SHARED_BYTES.values())}; "
                "use fewer stages"
            )

    @property
    def tiles(self) -> tuple[int, int, int]:
        """Sizes that the kernel pads (tokens, rows, k) to multiples of."""
        return TILE, TILE, self.tile_k

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: values, words and X of its stages."""
        return self.stages * (TILE * self.tile_k + self.tile_k // CHUNK * WORD_WARPS * 128 + TILE * self.tile_k * 2)


def default_config(tokens: int, rows: int, k: int) -> Config:
    """The shape used unless one is given; it fits every member of the family."""
    del tokens, rows, k
    return Config()


def supports(product: Product, device: jax.Device, config: Config | None = None) -> str | None:
    """The contract of `Implementation.supports`.

    Sizes that tiles do not fit are padded. That pays while it adds at most a quarter to the work: fewer than 103 tokens
    are refused, for instance.
    """
    config = config or default_config(*product.sizes)
    return (
        _too_old()
        or misfit(product, config.tiles, device, CAPABILITIES)
        or _too_large(config, device)
        or _kernel().unavailable()
    )


def _too_old() -> str | None:
    """Earlier releases of jax do not refuse to compile for Ampere: they abort the process."""
    if jax.__version_info__ >= FIRST_JAX:
        return None
    return f"jax {jax.__version__} cannot compile this kernel; it needs {'.'.join(map(str, FIRST_JAX))} or newer"


def _too_large(config: Config, device: jax.Device) -> str | None:
    """Members of the family have less shared memory than an A100."""
    most = SHARED_BYTES.get(compute_capability(device) or 0, min(SHARED_BYTES.values()))
    if config.shared_bytes <= most:
        return None
    return f"{config} uses {config.shared_bytes} bytes of shared memory of {most} on {device.device_kind}"


def product(
    a: SparseMatrix, x: Float[Array, "tokens k"], *, config: Config | None = None, interpret: bool = False
) -> Float[Array, "tokens rows"]:
    """The contract of `Implementation.product`, in any shape of the kernel; `None` takes `default_config`."""
    check_operands(a, x)
    reason = _kernel().unavailable() or (None if interpret else _too_old())
    if reason is not None:
        raise NotImplementedError(reason)
    config = config or default_config(x.shape[0], a.rows, a.k)
    values, metadata, padded = pad_operands(a, x, config.tiles)
    words = lane_words(reorder(metadata), WORD_WARPS)
    return _kernel().multiply(reorder(values), words, padded, config, interpret)[: x.shape[0], : a.rows]


def reorder(matrix: Shaped[Array, "rows columns"]) -> Shaped[Array, "rows columns"]:
    """Row 8 g + c of every 64 goes to 8 c + g; the same again undoes it."""
    rows, columns = matrix.shape
    return jnp.swapaxes(matrix.reshape(rows // 64, 8, 8, columns), 1, 2).reshape(rows, columns)


def _kernel():
    """The kernel itself: Pallas takes longer to import than all of this library."""
    from nm_jax.matmul import _ampere_kernel

    return _ampere_kernel
