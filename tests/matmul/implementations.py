"""Every implementation as it can run without a GPU, for the contract suite and for models."""

import dataclasses
import functools
import inspect

from nm_jax.matmul import IMPLEMENTATIONS
from nm_jax.matmul._tiles import PTX_TYPES


def _runnable(implementation):
    """A kernel in Pallas' interpreter: grid, pipeline and indices as on a GPU, the instruction replaced."""
    if "interpret" not in inspect.signature(implementation.product).parameters:
        return implementation

    def supports(product, device):
        del device
        return None if product.dtype in PTX_TYPES else "sparse tensor cores take bfloat16 or float16 here"

    product = functools.partial(implementation.product, interpret=True)
    name = f"{implementation.name}-interpreted"
    return dataclasses.replace(implementation, name=name, supports=supports, product=product, is_kernel=False)


RUNNABLE = [_runnable(implementation) for implementation in IMPLEMENTATIONS]
HOPPER, AMPERE, REFERENCE = (
    next(i for i in RUNNABLE if i.name.startswith(name)) for name in ("hopper", "ampere", "reference")
)
