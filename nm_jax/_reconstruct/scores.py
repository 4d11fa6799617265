"""Scores that look at a layer's inputs: what a mask should keep the most of, given calibration data.

They are arrays like the weights and go wherever scores go, to any solver and any pattern, transposable ones included:

    grams = nm.gram(apply, params, batches, plan)
    masks = nm.compute_masks(params, plan, scores=nm.score_tree(nm.obc, params, grams))

To add a score:

1. Write `def name(w, gram)` in this file: scores like `w`, in float32, of a weight and the record of its inputs.
   `LayerMatrices.of(w, gram)` checks that they fit; its `split` gives the matrices (matrices, K, outputs) of a leaf of
   any layout, its `join` puts their scores back, and `InputMoments.of(gram)` is what they meet. `partitioned` runs that
   with the leaf's own sharding.
2. Add it to `SCORES` at the end of this file: the contract suite (`tests/reconstruct/test_scores.py`) then covers it.

To make it public, add its line to `nm_jax/__init__.pyi`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from nm_jax._core.sharding import partitioned, spec
from nm_jax._model.gram import Gram
from nm_jax._reconstruct._matrices import InputMoments, LayerMatrices

_DAMPING = 1e-2


def wanda(w: Float[Array, "..."], gram: Gram) -> Float[Array, "..."]:
    """|w_k| * ||x_k||: the magnitude of a weight times the norm of the inputs that meet it.

    Its square is the error of the layer's output when this weight alone is pruned.

    Args:
      w: weights.
      gram: the Gram matrices of their inputs.

    Returns:
      Scores in float32, in units of the root mean square of the inputs' norms. Works under `jit` and `vmap`.

    Raises:
      ValueError: when shapes do not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> gram = nm.Gram.from_inputs(jnp.array([[3.0, 1.0], [3.0, -1.0]]))  # the first input is three times the second
      >>> scores = nm.wanda(jnp.array([[1.0], [2.0]]), gram)
      >>> bool(scores[0, 0] > scores[1, 0])
      True

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (2023).
    """
    return partitioned(functools.partial(_wanda, LayerMatrices.of(w, gram)), spec(w), w, gram)


def _wanda(layer: LayerMatrices, w, gram: Gram) -> Float[Array, "..."]:
    moments = InputMoments.of(gram)
    norms = jnp.sqrt(jnp.maximum(jnp.diagonal(moments.h, axis1=1, axis2=2), 0))[:, :, None]
    return layer.join(jnp.abs(layer.split(w.astype(jnp.float32))) * norms)


def obc(w: Float[Array, "..."], gram: Gram, damping: float = _DAMPING) -> Float[Array, "..."]:
    """w_k^2 / [(H + damping I)^-1]_kk: the error that remains when this weight alone is pruned and the others adapt.

    Use it before `reconstruct`, which does adapt them: an input that others can stand in for costs little.

    Args:
      w: weights.
      gram: the Gram matrices of their inputs.
      damping: added to the diagonal of H, relative to its mean. It keeps the inverse finite when H is singular, as it
        is when there are fewer rows than weights.

    Returns:
      Scores in float32, in units of the mean diagonal of H. Works under `jit` and `vmap`. Costs K^3 flops.

    Raises:
      ValueError: when shapes do not fit, or for a damping that is not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> rows = jnp.array([[1.0, 1.0, 0.0], [-1.0, -1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, -1.0]])
      >>> scores = nm.obc(jnp.ones((3, 1)), nm.Gram.from_inputs(rows))  # the first two inputs are the same
      >>> bool(scores[2, 0] > 10 * scores[0, 0])
      True

    Source: Frantar and Alistarh, "Optimal Brain Compression" (2022), Section 4; Hassibi and Stork (1992).
    """
    if damping <= 0:
        raise ValueError(f"damping must be positive, or a singular H has no inverse, got {damping}")
    return partitioned(functools.partial(_obc, LayerMatrices.of(w, gram), damping), spec(w), w, gram)


def _obc(layer: LayerMatrices, damping: float, w, gram: Gram) -> Float[Array, "..."]:
    moments = InputMoments.of(gram)
    identity = jnp.broadcast_to(jnp.eye(moments.h.shape[1], dtype=moments.h.dtype), moments.h.shape)
    factor = jnp.linalg.cholesky(moments.h + damping * identity)
    inverse = jax.scipy.linalg.solve_triangular(factor, identity, lower=True)
    uncertainty = jnp.sum(inverse**2, axis=1)[:, :, None]
    return layer.join(layer.split(w.astype(jnp.float32)) ** 2 / uncertainty)


def score_tree(score: Callable[[Array, Gram], Array], params: PyTree, grams: PyTree[Gram | None]) -> PyTree:
    """The scores of every parameter that has Gram matrices, and magnitudes of the others.

    Args:
      score: `wanda`, `obc`, or any function of a weight and its Gram matrices.
      params: parameters.
      grams: a tree like `params` of records, as `nm_jax.gram` returns it, with `None` where there is none.

    Returns:
      A tree like `params`, for the argument `scores` of `nm_jax.compute_masks`.

    Raises:
      ValueError: when shapes or trees do not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> params = {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}
      >>> grams = nm.gram(lambda p, x: x @ p["kernel"] + p["bias"], params, [jnp.eye(8)], "kernel")
      >>> masks = nm.compute_masks(params, "2:4-T", scores=nm.score_tree(nm.wanda, params, grams))
      >>> int(masks["kernel"].sum())
      16
    """

    def absent(node):
        return node is None or isinstance(node, Gram)

    leaves = jax.tree.leaves(params)
    records = jax.tree.leaves(grams, is_leaf=absent)
    if len(records) != len(leaves):
        raise ValueError(f"grams has {len(records)} entries for {len(leaves)} parameters; collect them for this model")
    scored = [jnp.abs(w) if g is None else score(w, g) for w, g in zip(leaves, records, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), scored)


# Those that the contract suite covers.
SCORES: tuple[Callable[[Array, Gram], Array], ...] = (
    wanda,
    obc,
)
