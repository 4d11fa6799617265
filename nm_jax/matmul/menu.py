"""Every implementation of a sparse product.

To add one:

1. Write a file in this folder with the two functions `supports` and `product` of `base.Implementation`. What takes long
   to import, or may be missing, goes into a file of its own that the first product loads.
2. Add a line to `IMPLEMENTATIONS`: with `is_kernel=False` unless it runs on sparse tensor cores.

The contract suite, `tests/matmul/test_contract.py`, then covers it: as it is, or, if its product takes
`interpret=True`, interpreted.
"""

from nm_jax.matmul import ampere, hopper, reference
from nm_jax.matmul.base import Implementation

IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("hopper", hopper.supports, hopper.product, version=2, config=hopper.Config),
    Implementation("ampere", ampere.supports, ampere.product, config=ampere.Config),
    Implementation("reference", reference.supports, reference.product, is_kernel=False),
)
"""What `implementation=` knows by name."""
