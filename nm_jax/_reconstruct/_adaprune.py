"""AdaPrune for whole models: every masked layer gets the weights that keep its outputs (Section 5 of the paper)."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Unpack

import jax
from jaxtyping import Array, PyTree

from nm_jax._core.paths import empty, located
from nm_jax._masks.apply import apply_masks
from nm_jax._masks.trees import masks_by_path
from nm_jax._model._batches import argument_tuples
from nm_jax._model.gram import gram
from nm_jax._model.tracing import trace
from nm_jax._reconstruct._layers import LayerOptions, each_layer, masked_only
from nm_jax._reconstruct._report import PrunedLayer, PruneReport


def adaprune(
    apply: Callable,
    params: PyTree,
    masks: PyTree,
    batches: Iterable[Any],
    *,
    held_out: Iterable[Any] | None = None,
    row_mask: Callable[..., Array] | None = None,
    leaves: str | Sequence[str] | None = None,
    order: str = "parallel",
    biases: bool = True,
    on_layer: Callable[[PrunedLayer], None] | None = None,
    **how: Unpack[LayerOptions],
) -> tuple[PyTree, PruneReport]:
    """Masks a model and changes the weights that are left so that every layer's output stays what it was.

    For each layer: minimise ||X W - X (S * V)||^2 over V (Eq. 5), with X the layer's calibration inputs

    Args:
      apply: the model's forward pass, `apply(params, *inputs)`, in evaluation mode.
      params: dense parameters.
      masks: a tree like `params` from `nm_jax.compute_masks`; `None` where a leaf stays as it is. Of a plan
        (`nm_jax.plan`), the first and the last layer stay dense.
      batches: calibration inputs, tuples as `apply` takes them (anything else is a single input); they are kept in a
        list. A few hundred examples are enough for most networks; the report says how many rows each layer got for
        each weight.
      held_out: more of them, for the report alone: how well the new weights do on inputs they were not made for.
      row_mask: which rows of the inputs count (`nm_jax.gram`); needed for padded sequences.
      leaves: regular expressions of the masked parameters to reconstruct; the others are masked only. `None`: all.
      order: `"parallel"`, every layer sees the inputs that it has in the dense model, which takes one pass over the
        batches; or `"sequential"`, those it has behind the layers that are pruned already, one pass for each layer.
      biases: whether the bias beside a kernel takes up the mean of the change: a sibling with an entry per output,
        called `bias` (beside `in_proj_weight`, `in_proj_bias`; beside `w`, `b`), its keys nested or flat with dots.
        The report says it of a layer when none is known.
      on_layer: called with each layer's row when it is done: progress.
      **how: as in `nm_jax.reconstruct`: `ridge`, `iterations`, `method` (`"adam"` draws one of the batches for each
        iteration), `learning_rate`; and `centred`, which in a model whose batch norms are tuned afterwards
        (`nm_jax.tune_batch_norm`) leaves them the mean of the change.

    Returns:
      The new parameters, sparse where there is a mask; leaves without one (but for the biases) are the same arrays.
      And the report.

    Raises:
      ValueError: naming the parameter, when a masked one gives no Gram matrix (exclude it with `leaves`), when masks or
        inputs do not fit, or when the inputs are not finite.

    Takes one forward pass and the Gram matrices (`nm_jax.gram`), plus a fraction of a second per layer; what was
    compiled is used again by later calls with the same `apply` and shapes. Not for use inside `jit`. Source: Section 5,
    Eq. 5, and Section A.1.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import nm_jax as nm
      >>> def apply(params, x):
      ...     return x @ params["kernel"] + params["bias"]
      >>> keys = jax.random.split(jax.random.key(0))
      >>> params = {"kernel": jax.random.normal(keys[0], (8, 4)), "bias": jnp.zeros(4)}
      >>> masks = nm.compute_masks(params, "2:4-T")
      >>> new, report = nm.adaprune(apply, params, masks, [jax.random.normal(keys[1], (50, 8))])
      >>> nm.verify(new, "2:4-T").ok, report["kernel"].bias
      (True, True)
    """
    if order not in ("parallel", "sequential"):
        raise ValueError(f"order must be 'parallel' or 'sequential', got {order!r}")
    batches = list(argument_tuples(batches))
    if not batches:
        raise ValueError("batches is empty: AdaPrune needs calibration inputs")
    masked = [path for path, mask in masks_by_path(masks).items() if not empty(mask)]
    regexes = [leaves] if isinstance(leaves, str) else leaves
    chosen = [path for path in masked if regexes is None or any(re.search(regex, path) for regex in regexes)]
    if not chosen:
        raise ValueError(f"nothing to reconstruct: leaves={leaves!r}, masked: {', '.join(masked) or 'nothing'}")
    # Adam draws from the batches; the other method only needs their sum.
    parts = [[batch] for batch in batches] if how.get("method") == "adam" else [batches]

    def collect(paths: list[str], model: PyTree, samples: Iterable[Any]) -> PyTree:
        return gram(apply, model, samples, [f"^{re.escape(path)}$" for path in paths], row_mask)

    if held_out is not None:
        held_out = argument_tuples(held_out, "held_out")
    held = None if held_out is None else collect(chosen, params, held_out)
    if order == "parallel":
        grams = [collect(chosen, params, part) for part in parts]
        return each_layer(params, masks, grams, held, biases, on_layer, how)
    traced = trace(apply, params, *batches[0])
    now = apply_masks(params, _only(masks, set(masked) - set(chosen)))
    rows = [masked_only(path, mask) for path, mask in masks_by_path(masks).items() if path in masked]
    rows = [row for row in rows if row.path not in chosen]
    for path in sorted(chosen, key=lambda path: traced[path].contractions[0].order):
        grams = [collect([path], now, part) for part in parts]
        now, report = each_layer(now, _only(masks, {path}), grams, held, biases, on_layer, how)
        rows += report.layers
    return now, PruneReport(tuple(rows))


def _only(masks: PyTree, paths: set[str]) -> PyTree:
    """The masks at some paths, `None` elsewhere."""
    kept = [leaf.value if leaf.path in paths else None for leaf in located(masks, empty)]
    return jax.tree.unflatten(jax.tree.structure(masks, is_leaf=empty), kept)
