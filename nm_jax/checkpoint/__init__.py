"""Sparse checkpoints: safetensors files, sharded or not, in and out, one tensor at a time."""

from nm_jax.checkpoint._arrays import load_checkpoint as load_checkpoint
from nm_jax.checkpoint._arrays import save_checkpoint as save_checkpoint
from nm_jax.checkpoint._prune import prune_checkpoint as prune_checkpoint
from nm_jax.checkpoint._prune import unpack_checkpoint as unpack_checkpoint
from nm_jax.checkpoint._reports import Checked as Checked
from nm_jax.checkpoint._reports import CheckpointReport as CheckpointReport
from nm_jax.checkpoint._reports import DenseTensor as DenseTensor
from nm_jax.checkpoint._reports import TensorReport as TensorReport
from nm_jax.checkpoint._reports import Totals as Totals
from nm_jax.checkpoint._reports import dense_tensors as dense_tensors
from nm_jax.checkpoint._scores import save_scores as save_scores
from nm_jax.checkpoint._store import Checkpoint as Checkpoint
from nm_jax.checkpoint._tensorfile import FormatError as FormatError
from nm_jax.checkpoint._verify import Examination as Examination
from nm_jax.checkpoint._verify import verify_checkpoint as verify_checkpoint
