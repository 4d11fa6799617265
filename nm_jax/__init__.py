"""N:M and transposable sparsity for JAX.

`import nm_jax as nm`. Change one line to train sparse: `tx = nm.sparse_training(optax.adamw(3e-4), "2:4-T")`.

The public API is listed, in reading order, in `__init__.pyi`; each name is loaded when it is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.2.0"
