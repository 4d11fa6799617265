# The public API in reading order. To add a name, add its line here; `nm_jax/__init__.py` loads it when it is used.

__version__: str

# Patterns: what a mask may look like.
from ._core.patterns import NM as NM
from ._core.patterns import Pattern as Pattern
from ._core.patterns import SequentialNM as SequentialNM
from ._core.patterns import TransposableNM as TransposableNM
from ._core.patterns import Unstructured as Unstructured
from ._core.patterns import mask_diversity as mask_diversity
from ._core.patterns import parse_pattern as parse_pattern

# Masks: of one weight, of a tree, and whether a network has what it should have.
from . import solvers as solvers
from .solvers import solve as solve
from ._masks.compute import compute_masks as compute_masks
from ._masks.apply import apply_masks as apply_masks
from ._masks.verify import LeafReport as LeafReport
from ._masks.verify import Report as Report
from ._masks.verify import verify as verify

# Training: one optax transformation, and what to read from its state.
from ._training.transformation import sparse_training as sparse_training
from ._training.decay import Decay as Decay
from ._training.decay import GradientDecay as GradientDecay
from ._training.decay import StepDecay as StepDecay
from ._training.choose_decay import choose_decay as choose_decay
from . import recipes as recipes
from ._training.state import RefreshStats as RefreshStats
from ._training.state import SparseTrainingState as SparseTrainingState
from ._training.reading import dense_params as dense_params
from ._training.reading import masks as masks
from ._training.reading import pack_params as pack_params
from ._training.reading import refresh_stats as refresh_stats
from ._training.reading import sparse_params as sparse_params
from ._training.reading import with_params as with_params
from ._training.straight_through import sr_ste as sr_ste
from ._training.straight_through import sr_ste_term as sr_ste_term
from ._training.straight_through import ste as ste
from ._training.soft_threshold import s_ste as s_ste
from ._training.soft_threshold import s_ste_scale as s_ste_scale

# The model: how it uses its parameters, and what becomes of them.
from ._model.plan import Plan as Plan
from ._model.plan import PlannedLeaf as PlannedLeaf
from ._model.plan import plan as plan
from ._model.tracing import LeafTrace as LeafTrace
from ._model.tracing import Trace as Trace
from ._model.tracing import Use as Use
from ._model.tracing import trace as trace
from ._model.gram import Gram as Gram
from ._model.gram import gram as gram

# A pretrained network, without training.
from ._reconstruct._convert import Conversion as Conversion
from ._reconstruct._violations import Violations as Violations
from ._reconstruct._violations import choose_patterns as choose_patterns
from ._reconstruct._best import ConversionStep as ConversionStep
from ._reconstruct._convert import convert as convert
from ._reconstruct._convert import fit_masks as fit_masks
from ._reconstruct._violations import pattern_violations as pattern_violations
from ._reconstruct._violations import violation_probability as violation_probability
from ._reconstruct._report import PrunedLayer as PrunedLayer
from ._reconstruct._report import PruneReport as PruneReport
from ._reconstruct._adaprune import adaprune as adaprune
from ._reconstruct._layers import reconstruct_layers as reconstruct_layers
from ._reconstruct._refine import RefinedLayer as RefinedLayer
from ._reconstruct._refine import RefinedMask as RefinedMask
from ._reconstruct._refine import RefineReport as RefineReport
from ._reconstruct._refine import refine_mask as refine_mask
from ._reconstruct._refine import refine_masks as refine_masks
from ._reconstruct._blocks import BlockReport as BlockReport
from ._reconstruct._blocks import FittedBlock as FittedBlock
from ._reconstruct._blocks import fit_blocks as fit_blocks
from ._reconstruct._layer import Reconstruction as Reconstruction
from ._reconstruct._absorb_mean import absorb_mean as absorb_mean
from ._reconstruct._layer import output_error as output_error
from ._reconstruct._layer import reconstruct as reconstruct
from ._reconstruct.scores import obc as obc
from ._reconstruct.scores import score_tree as score_tree
from ._reconstruct.scores import wanda as wanda
from ._reconstruct._permutation import Permutation as Permutation
from ._reconstruct._permutation import find_permutation as find_permutation
from ._reconstruct._permute import ChannelGroup as ChannelGroup
from ._reconstruct._permute import PermutedLayer as PermutedLayer
from ._reconstruct._permute import PermuteReport as PermuteReport
from ._reconstruct._permute import permute as permute
from ._reconstruct._batch_norm import tune_batch_norm as tune_batch_norm

# Products with 2:4 weights on sparse tensor cores.
from . import matmul as matmul
from .matmul import PackedWeight as PackedWeight
from .matmul import attach as attach
from .matmul import conv_general_dilated as conv_general_dilated
from .matmul import dot_general as dot_general
from .matmul import einsum as einsum
from .matmul import nm_matmul as nm_matmul
from .matmul import pack as pack
from .matmul import repack as repack
from .matmul import unpack as unpack

# Checkpoints: safetensors files in and out.
from .checkpoint import Checkpoint as Checkpoint
from .checkpoint import CheckpointReport as CheckpointReport
from .checkpoint import FormatError as FormatError
from .checkpoint import load_checkpoint as load_checkpoint
from .checkpoint import prune_checkpoint as prune_checkpoint
from .checkpoint import save_checkpoint as save_checkpoint
from .checkpoint import save_scores as save_scores
from .checkpoint import verify_checkpoint as verify_checkpoint
