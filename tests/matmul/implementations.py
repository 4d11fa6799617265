"""The implementations that can run without a GPU, for the contract suite and for models."""

import functools

import jax.numpy as jnp

from nm_jax.matmul import Implementation, ampere, hopper, reference
from nm_jax.matmul import _mosaic as mosaic


def _interpreted(module, config):
    """A kernel in Pallas' interpreter: grid, pipeline and indices as on a GPU, the instruction replaced."""

    def supports(dtype, tokens, rows, k, device):
        del tokens, rows, k, device
        return None if jnp.dtype(dtype) in mosaic.PTX_TYPES else "sparse tensor cores take bfloat16 or float16 here"

    product = functools.partial(module.product, config=config, interpret=True)
    return Implementation(f"{module.__name__.rpartition('.')[2]}-interpreted", supports, product, self_check=False)


REFERENCE = Implementation("reference", reference.supports, reference.product, self_check=False)
HOPPER = _interpreted(hopper, hopper.Config(tile_tokens=64, stages=2))
AMPERE = _interpreted(ampere, None)
RUNNABLE = [REFERENCE, HOPPER, AMPERE]
