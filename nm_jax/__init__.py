"""N:M and transposable sparsity for JAX.

`import nm_jax as nm`. Change one line to train sparse: `tx = nm.sparse_training(optax.adamw(3e-4), "2:4-T")`.
"""

from nm_jax import solvers as solvers
from nm_jax.masks import LeafReport as LeafReport
from nm_jax.masks import Report as Report
from nm_jax.masks import apply_masks as apply_masks
from nm_jax.masks import compute_masks as compute_masks
from nm_jax.masks import verify as verify
from nm_jax.patterns import NM as NM
from nm_jax.patterns import Pattern as Pattern
from nm_jax.patterns import SequentialNM as SequentialNM
from nm_jax.patterns import TransposableNM as TransposableNM
from nm_jax.patterns import Unstructured as Unstructured
from nm_jax.patterns import mask_diversity as mask_diversity
from nm_jax.patterns import parse_pattern as parse_pattern
from nm_jax.solvers import solve as solve
from nm_jax.ste import sr_ste as sr_ste
from nm_jax.ste import sr_ste_term as sr_ste_term
from nm_jax.ste import ste as ste
from nm_jax.training import RefreshStats as RefreshStats
from nm_jax.training import SparseTrainingState as SparseTrainingState
from nm_jax.training import dense_params as dense_params
from nm_jax.training import masks as masks
from nm_jax.training import refresh_stats as refresh_stats
from nm_jax.training import sparse_params as sparse_params
from nm_jax.training import sparse_training as sparse_training
from nm_jax.training import with_params as with_params
