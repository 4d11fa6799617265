"""Products with 2:4 weights on sparse tensor cores."""

from nm_jax.matmul._api import nm_matmul as nm_matmul
from nm_jax.matmul._compress import SparseMatrix as SparseMatrix
from nm_jax.matmul._layers import conv_general_dilated as conv_general_dilated
from nm_jax.matmul._layers import dot_general as dot_general
from nm_jax.matmul._layers import einsum as einsum
from nm_jax.matmul._packing import PackedSide as PackedSide
from nm_jax.matmul._packing import PackedWeight as PackedWeight
from nm_jax.matmul._packing import pack as pack
from nm_jax.matmul._packing import repack as repack
from nm_jax.matmul._packing import unpack as unpack
from nm_jax.matmul._parameter import PackedParameter as PackedParameter
from nm_jax.matmul._parameter import attach as attach
from nm_jax.matmul._parameter import promote_dtype as promote_dtype
from nm_jax.matmul._profile import Measurement as Measurement
from nm_jax.matmul._profile import load_profile as load_profile
from nm_jax.matmul._profile import profile_path as profile_path
from nm_jax.matmul._profile import save_profile as save_profile
from nm_jax.matmul.base import Implementation as Implementation
from nm_jax.matmul.base import Product as Product
from nm_jax.matmul.menu import IMPLEMENTATIONS as IMPLEMENTATIONS
