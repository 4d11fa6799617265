"""Sparse checkpoints: safetensors files, sharded or not, in and out, one tensor at a time."""

from nm_jax.checkpoint.arrays import load_checkpoint as load_checkpoint
from nm_jax.checkpoint.arrays import save_checkpoint as save_checkpoint
from nm_jax.checkpoint.prune import prune_checkpoint as prune_checkpoint
from nm_jax.checkpoint.reports import Checked as Checked
from nm_jax.checkpoint.reports import CheckpointReport as CheckpointReport
from nm_jax.checkpoint.reports import DenseTensor as DenseTensor
from nm_jax.checkpoint.reports import TensorReport as TensorReport
from nm_jax.checkpoint.store import Checkpoint as Checkpoint
from nm_jax.checkpoint.tensorfile import FormatError as FormatError
from nm_jax.checkpoint.verify import Examination as Examination
from nm_jax.checkpoint.verify import verify_checkpoint as verify_checkpoint
