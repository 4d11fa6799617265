"""AdaPrune for whole models: every masked layer gets the weights that keep its outputs (Section 5 of the paper)."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias, TypedDict, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from nm_jax._core.rules import empty, path_of
from nm_jax._core.tables import aligned
from nm_jax._masks.apply import apply_masks
from nm_jax._masks.trees import leaves_by_path
from nm_jax._model.gram import Gram, gram
from nm_jax._model.tracing import trace
from nm_jax._reconstruct._layer import Reconstruction, output_error, reconstruct
from nm_jax._reconstruct._least_squares import Method

Order: TypeAlias = Literal["parallel", "sequential"]


@dataclasses.dataclass(frozen=True)
class PrunedLayer:
    """What happened to one layer.

    Attributes:
      path: of its weights.
      shape: of its weights.
      kept: fraction of the weights that the mask keeps.
      size: K, the weights of one output.
      rows: calibration inputs that it saw.
      before: error of its output with the masked weights, relative to the output; `None` without calibration.
      after: the same with the new weights.
      held_out_before: the first on inputs that were not calibrated on; `None` when there are none.
      held_out_after: the second on these.
      iterations: of the solver.
      bias: whether its bias took up the mean of the change.
    """

    path: str
    shape: tuple[int, ...]
    kept: float
    size: int | None = None
    rows: int | None = None
    before: float | None = None
    after: float | None = None
    held_out_before: float | None = None
    held_out_after: float | None = None
    iterations: int | None = None
    bias: bool = False

    def cells(self) -> dict[str, str]:
        """The row as it is printed."""
        shape = "x".join(map(str, self.shape))
        cells = {"path": self.path, "shape": shape, "kept": f"{100 * self.kept:.1f}%"}
        if self.before is None:
            return cells | {"remark": "masked only"}
        cells |= {"rows/K": f"{self.rows / self.size:.3g}" if self.rows is not None and self.size else ""}
        errors = {
            "error": self.before,
            "now": self.after,
            "held out": self.held_out_before,
            "now ": self.held_out_after,
        }
        cells |= {name: f"{100 * error:.3g}%" for name, error in errors.items() if error is not None}
        return cells | {"iterations": str(self.iterations), "remark": "bias moved" if self.bias else ""}


@dataclasses.dataclass(frozen=True)
class PruneReport:
    """What happened to every masked layer; its string is a table.

    Attributes:
      layers: one row per masked parameter, in the order in which they were reconstructed.
    """

    layers: tuple[PrunedLayer, ...]

    def __getitem__(self, path: str) -> PrunedLayer:
        for layer in self.layers:
            if layer.path == path:
                return layer
        raise KeyError(f"{path!r} is not among the masked layers")

    def __str__(self) -> str:
        count = f"{len(self.layers)} pruned {'layer' if len(self.layers) == 1 else 'layers'}"
        header = f"{count}; error of the output relative to it, with masked weights and with the new ones"
        return "\n".join([header, *aligned([layer.cells() for layer in self.layers])])


class How(TypedDict, total=False):
    """Arguments of `nm_jax.reconstruct` that are the same for all layers."""

    centred: bool | None
    ridge: float | None
    method: Method
    iterations: int | None
    learning_rate: float


def reconstruct_layers(
    params: PyTree[Array],
    masks: PyTree[Bool[Array, "..."] | None],
    grams: PyTree[Gram | None],
    *,
    held_out: PyTree[Gram | None] | None = None,
    biases: bool = True,
    on_layer: Callable[[PrunedLayer], None] | None = None,
    **how: Unpack[How],
) -> tuple[PyTree[Array], PruneReport]:
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
    """
    return _reconstruct_layers(params, masks, [grams], held_out, biases, on_layer, how)


def adaprune(
    apply: Callable,
    params: PyTree[Array],
    masks: PyTree[Bool[Array, "..."] | None],
    batches: Iterable[Any],
    *,
    held_out: Iterable[Any] | None = None,
    row_mask: Callable[..., Array] | None = None,
    leaves: str | Sequence[str] | None = None,
    order: Order = "parallel",
    biases: bool = True,
    on_layer: Callable[[PrunedLayer], None] | None = None,
    **how: Unpack[How],
) -> tuple[PyTree[Array], PruneReport]:
    """Masks a model and changes the weights that are left so that every layer's output stays what it was.

    For each layer: minimise ||X W - X (S * V)||^2 over V (Eq. 5), with X the layer's calibration inputs

    Args:
      apply: the model's forward pass, `apply(params, *inputs)`, in evaluation mode.
      params: dense parameters.
      masks: a tree like `params` from `nm_jax.compute_masks`; `None` where a leaf stays as it is. Of a plan
        (`nm_jax.plan`), the first and the last layer stay dense.
      batches: calibration inputs, tuples as `apply` takes them (anything else is a single input). A few hundred
        examples are enough for most networks; the report says how many rows each layer got for each weight.
      held_out: more of them, for the report alone: how well the new weights do on inputs they were not made for.
      row_mask: which rows of the inputs count (`nm_jax.gram`); needed for padded sequences.
      leaves: regular expressions of the masked parameters to reconstruct; the others are masked only. `None`: all.
      order: `"parallel"`, every layer sees the inputs that it has in the dense model, which takes one pass over the
        batches; or `"sequential"`, those it has behind the layers that are pruned already, one pass for each layer.
      biases: whether the bias beside a kernel (a sibling called `bias` with an entry per output) takes up the mean of
        the change.
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

    Takes one forward pass and the Gram matrices (`nm_jax.gram`), plus a fraction of a second per layer. Not for use
    inside `jit`. Source: Section 5, Eq. 5, and Section A.1.
    """
    if order not in ("parallel", "sequential"):
        raise ValueError(f"order must be 'parallel' or 'sequential', got {order!r}")
    batches = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    if not batches:
        raise ValueError("batches is empty: AdaPrune needs calibration inputs")
    masked = [path for path, mask in leaves_by_path(masks).items() if not empty(mask)]
    regexes = [leaves] if isinstance(leaves, str) else leaves
    chosen = [path for path in masked if regexes is None or any(re.search(regex, path) for regex in regexes)]
    if not chosen:
        raise ValueError(f"nothing to reconstruct: leaves={leaves!r}, masked: {', '.join(masked) or 'nothing'}")
    # Adam draws from the batches; the other method only needs their sum.
    parts = [[batch] for batch in batches] if how.get("method") == "adam" else [batches]

    def collect(paths: list[str], model: PyTree[Array], samples: Iterable[Any]) -> PyTree[Gram | None]:
        return gram(apply, model, samples, [f"^{re.escape(path)}$" for path in paths], row_mask)

    held = None if held_out is None else collect(chosen, params, held_out)
    if order == "parallel":
        grams = [collect(chosen, params, part) for part in parts]
        return _reconstruct_layers(params, masks, grams, held, biases, on_layer, how)
    traced = trace(apply, params, *batches[0])
    now = apply_masks(params, _only(masks, set(masked) - set(chosen)))
    rows = [_masked_only(path, mask) for path, mask in leaves_by_path(masks).items() if path in masked]
    rows = [row for row in rows if row.path not in chosen]
    for path in sorted(chosen, key=lambda path: traced[path].contractions[0].order):
        grams = [collect([path], now, part) for part in parts]
        now, report = _reconstruct_layers(now, _only(masks, {path}), grams, held, biases, on_layer, how)
        rows += report.layers
    return now, PruneReport(tuple(rows))


def _only(masks: PyTree[Array | None], paths: set[str]) -> PyTree[Array | None]:
    """The masks at some paths, `None` elsewhere."""

    def keep(keys, mask):
        return mask if path_of(keys) in paths else None

    return jax.tree_util.tree_map_with_path(keep, masks, is_leaf=empty)


def _masked_only(path: str, mask: Array) -> PrunedLayer:
    return PrunedLayer(path, jnp.shape(mask), float(jnp.mean(mask)))


def _reconstruct_layers(params, masks, grams: list[PyTree], held_out, biases: bool, on_layer, how: How):
    """`reconstruct_layers`, with one tree of Gram matrices for each batch."""
    dense, now = leaves_by_path(params), leaves_by_path(apply_masks(params, masks))
    masked = {path: mask for path, mask in leaves_by_path(masks).items() if not empty(mask)}
    if not masked:
        raise ValueError("masks has no mask: nothing would be pruned")
    collected, held = [_records(tree) for tree in grams], _records(held_out)
    rows = []
    for path, mask in masked.items():
        records = [part[path] for part in collected if path in part]
        row = _masked_only(path, mask)
        if records:
            bias = _bias_beside(path, records[0], dense) if biases else None
            try:
                found = reconstruct(dense[path], records, mask, bias=None if bias is None else dense[bias], **how)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            row = _describe(row, records, found)
            if path in held:
                moved = None if bias is None else found.bias - dense[bias]
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
    new = jax.tree_util.tree_map_with_path(lambda keys, _: now[path_of(keys)], params)
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


def _records(tree: PyTree[Gram | None]) -> dict[str, Gram]:
    """The records by the path of their parameter."""
    nodes = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, Gram))[0]
    return {path_of(keys): record for keys, record in nodes}


def _bias_beside(path: str, record: Gram, leaves: dict[str, Array]) -> str | None:
    """The path of the bias of a layer: beside its kernel, with an entry for each output in their order."""
    sibling = "/".join([*path.split("/")[:-1], "bias"])
    if sibling == path or empty(leaves.get(sibling)) or "b" in record.contraction.lstrip("b"):
        return None
    shape = jnp.shape(leaves[path])
    outputs = [size for size, letter in zip(shape, record.contraction, strict=True) if letter in "bo"]
    return sibling if list(jnp.shape(leaves[sibling])) == outputs else None
