"""The layers of a model: masked, and given the weights that keep their outputs, one after another."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, TypedDict, Unpack

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from nm_jax._core.paths import empty, located, map_located
from nm_jax._masks.apply import apply_masks
from nm_jax._masks.trees import leaves_by_path, masks_by_path
from nm_jax._model.gram import Gram
from nm_jax._reconstruct._counting import share
from nm_jax._reconstruct._layer import Reconstruction, output_error, reconstruct
from nm_jax._reconstruct._report import PrunedLayer, PruneReport

# What a bias is called beside a kernel of some name: the rest of the name stays (`in_proj_weight`, `in_proj_bias`).
_BIAS_NAMES = (("kernel", "bias"), ("weight", "bias"), ("w", "b"))


class LayerOptions(TypedDict, total=False):
    """Arguments of `nm_jax.reconstruct` that are the same for all layers."""

    centred: bool | None
    ridge: float | None
    method: str
    iterations: int | None
    learning_rate: float


def reconstruct_layers(
    params: PyTree,
    masks: PyTree,
    grams: PyTree,
    *,
    held_out: PyTree | None = None,
    biases: bool = True,
    on_layer: Callable[[PrunedLayer], None] | None = None,
    **how: Unpack[LayerOptions],
) -> tuple[PyTree, PruneReport]:
    """Masks a model and changes the weights that are left, given the Gram matrices of its layers' inputs.

    `adaprune` is this after an evaluation of the model. Apart, one evaluation serves many masks.

    Args:
      params: dense parameters.
      masks: a tree like `params` from `nm_jax.compute_masks`; `None` where a leaf stays as it is.
      grams: a tree like `params` from `nm_jax.gram`; a masked parameter that has no record is masked only.
      held_out: such a tree for other inputs, for the report alone.
      biases: as in `adaprune`.
      on_layer: called with each layer's row when it is done: progress.
      **how: as in `nm_jax.reconstruct`: `centred`, `ridge`, `method`, `iterations`, `learning_rate`.

    Returns:
      The new parameters and the report.

    Raises:
      ValueError: when shapes or trees do not fit, or when nothing is masked.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import nm_jax as nm
      >>> def apply(params, x):
      ...     return x @ params["kernel"]
      >>> keys = jax.random.split(jax.random.key(0))
      >>> params = {"kernel": jax.random.normal(keys[0], (8, 4))}
      >>> grams = nm.gram(apply, params, [jax.random.normal(keys[1], (50, 8))])
      >>> new, report = nm.reconstruct_layers(params, nm.compute_masks(params, "2:4"), grams)
      >>> report["kernel"].after < report["kernel"].before
      True
    """
    return each_layer(params, masks, [grams], held_out, biases, on_layer, how)


def masked_only(path: str, mask: Array) -> PrunedLayer:
    return PrunedLayer(path, jnp.shape(mask), share(mask))


def each_layer(params, masks, grams: list[PyTree], held_out, biases: bool, on_layer, how: LayerOptions):
    """`reconstruct_layers`, with one tree of Gram matrices for each batch."""
    masked = {path: mask for path, mask in masks_by_path(masks).items() if not empty(mask)}
    dense, now = leaves_by_path(params), leaves_by_path(apply_masks(params, masks))
    if not masked:
        raise ValueError("masks has no mask: nothing would be pruned")
    collected, held = [records(tree) for tree in grams], records(held_out)
    rows = []
    for path, mask in masked.items():
        own = [part[path] for part in collected if path in part]
        row = masked_only(path, mask)
        if own:
            bias = bias_beside(path, own[0], dense) if biases else None
            try:
                # Where two kernels share a bias, it takes up both changes.
                old_bias: Any = None if bias is None else now[bias]
                found = reconstruct(dense[path], own, mask, bias=old_bias, **how)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            remark = "no bias of it is known" if biases and bias is None else ""
            row = dataclasses.replace(_describe(row, own, found), remark=remark)
            if path in held:
                moved = None if found.bias is None else found.bias - old_bias
                judge = functools.partial(output_error, dense[path], gram=held[path])
                free = bool(how.get("centred")) and bias is None
                row = dataclasses.replace(
                    row,
                    held_out_before=float(judge(now[path], centred=free)),
                    held_out_after=float(judge(found.weight, bias_change=moved, centred=free)),
                )
            now |= {path: found.weight} if bias is None else {path: found.weight, bias: found.bias}
        rows.append(row)
        if on_layer is not None:
            on_layer(row)
    new = map_located(lambda path, _: now[path], params)
    return new, PruneReport(tuple(rows))


def _describe(row: PrunedLayer, records: list[Gram], found: Reconstruction) -> PrunedLayer:
    return dataclasses.replace(
        row,
        size=records[0].h.shape[-1],
        rows=sum(int(record.rows[0]) for record in records),
        before=float(found.before),
        after=float(found.after),
        iterations=int(found.iterations),
        bias=found.bias is not None,
    )


def records(tree: PyTree[Gram | None]) -> dict[str, Gram]:
    """The records by the path of their parameter."""
    return {leaf.path: leaf.value for leaf in located(tree, lambda node: isinstance(node, Gram))}


def bias_beside(path: str, record: Gram, leaves: dict[str, Array]) -> str | None:
    """The path of the bias of a layer: beside its kernel, with an entry for each output in their order."""
    if "b" in record.contraction.lstrip("b"):
        return None
    shape = jnp.shape(leaves[path])
    outputs = [size for size, letter in zip(shape, record.contraction, strict=True) if letter in "bo"]
    for sibling in _siblings(path):
        if sibling != path and not empty(leaves.get(sibling)) and list(jnp.shape(leaves[sibling])) == outputs:
            return sibling
    return None


def _siblings(path: str) -> list[str]:
    """What the bias beside a kernel may be called; keys may be nested, or flat with dots as PyTorch writes them."""
    cut = max(path.rfind("/"), path.rfind(".")) + 1
    start, name = path[:cut], path[cut:]
    renamed = [re.sub(rf"(^|_){kernel}(?=_|$)", rf"\1{bias}", name) for kernel, bias in _BIAS_NAMES]
    return [start + bias for bias in dict.fromkeys([*renamed, "bias"]) if bias != name]
