"""Masks by what they do to the output: swaps that keep the pattern and lower the error of the layer."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from nm_jax._core.axes import Tiling
from nm_jax._core.paths import empty, located
from nm_jax._core.patterns import NM, Pattern, TransposableNM, parse_pattern
from nm_jax._core.rules import Rules, SparseLeaf, resolve
from nm_jax._core.tables import aligned, row_of, shape_text
from nm_jax._masks.trees import leaves_by_path, masks_by_path
from nm_jax._model.gram import Gram
from nm_jax._reconstruct._counting import count
from nm_jax._reconstruct._exchange import Places, begun, exchanged
from nm_jax._reconstruct._layer import output_error, reconstruct
from nm_jax._reconstruct._layers import bias_beside, records
from nm_jax._reconstruct._least_squares import Minimiser, Quadratic
from nm_jax._reconstruct._matrices import InputMoments, LayerMatrices

_ITERATIONS = 48  # of conjugate gradients, from the weights of the last round


@dataclasses.dataclass(frozen=True)
class RefinedMask:
    """A mask of one layer after `refine_mask`.

    Attributes:
      mask: with the same pattern.
      before: ||X W - X V||^2 / ||X W||^2 with the weights that reconstruction gave the mask before.
      after: the same with the new mask; never above `before`.
      changed: how many entries are kept that were not.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> gram = nm.Gram.from_inputs(jnp.eye(4) * jnp.array([3.0, 1.0, 1.0, 1.0]))
      >>> found = nm.refine_mask(jnp.ones((4, 1)), gram, jnp.array([[False], [False], [True], [True]]), "2:4")
      >>> found.mask[:, 0].tolist()[0], found.changed, found.after < found.before
      (True, 1, True)
    """

    mask: Bool[Array, "..."]
    before: float
    after: float
    changed: int


def refine_mask(
    w: Float[Array, "..."],
    gram: Gram,
    mask: Bool[Array, "..."],
    pattern: str | Pattern,
    *,
    axes: str = "io",
    centred: bool = False,
    ridge: float | None = None,
    rounds: int = 24,
) -> RefinedMask:
    """A mask that keeps its pattern and, with its weights reconstructed, the output of the layer better than before.

    minimise over masks S of the pattern, and V = S * V:  ||X W - X V||^2 + ridge * mean(diag H) * ||W - V||^2,

    by swaps: in a group, a weight that is kept for one that is not; in a transposable block, 2 x 2 exchanges

    Args:
      w: dense weights of a layer.
      gram: the Gram matrices of its inputs.
      mask: any mask of the pattern, True = kept; where the search starts.
      pattern: n:m or n:m-T.
      axes: one letter per dimension, how it is grouped, which need not be how `gram` says it is contracted: `bbio` for
        a convolution.
      centred: the mean of the output's change does not count, because a bias takes it up.
      ridge: as in `reconstruct`.
      rounds: at most so many; fewer when nothing is found any more.

    Returns:
      The mask, and the errors. `reconstruct` gives its weights.

    Raises:
      ValueError: for another kind of pattern, sizes that m does not divide, a mask that breaks it, or shapes that do
        not fit.

    Never worse by construction: a round changes a quarter of the groups of every output (of every stripe of m outputs,
    when transposable), solves all weights anew, and takes back what did not lower the error; then it tries fewer. The
    mask that it ends with is a local optimum of this search, not the optimum. A round costs m^2 operations per weight
    and a few dozen products with H; memory 4 m bytes per weight, several times. Not for use inside `jit`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import nm_jax as nm
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> x = jax.random.normal(keys[0], (100, 16)) @ jax.random.normal(keys[1], (16, 16))
      >>> w, gram = jax.random.normal(keys[2], (16, 8)), nm.Gram.from_inputs(x)
      >>> mask = nm.solve(jnp.abs(w), "2:4-T")
      >>> found = nm.refine_mask(w, gram, mask, "2:4-T")
      >>> found.after < found.before, nm.verify({"w": found.mask}, [("w", "2:4-T")]).ok
      (True, True)
    """
    pattern = parse_pattern(pattern)
    if not isinstance(pattern, NM | TransposableNM):
        raise ValueError(f"no swaps are known that keep {pattern}; give an n:m or n:m-T pattern")
    layer = LayerMatrices.of(w, gram)
    if jnp.shape(mask) != layer.shape:
        raise ValueError(f"the mask has shape {jnp.shape(mask)}, the weights have {layer.shape}")
    tiling = Tiling.of(layer.shape, axes, pattern)
    for name, size, tile in tiling.ragged:
        raise ValueError(f"the {name} axis has size {size}, and {tile} does not divide it; {pattern} does not fit")
    mask = jnp.asarray(mask).astype(bool)
    tiles = tiling.split(mask)
    if not bool(jnp.all(pattern.allows(tiles))):
        raise ValueError(f"the mask breaks {pattern} along {tiling.axes!r}: start from one that has it")
    moments = InputMoments.of(gram)
    problem = Quadratic.of(moments, Minimiser("pcg", _ITERATIONS, ridge, centred, 0.0))
    dense, places = layer.split(jnp.asarray(w).astype(jnp.float32)), Places.of(layer, tiling)
    state = begun(dense, layer.split(mask), problem, places, _ITERATIONS)
    for _ in range(rounds):
        state = exchanged(state, dense, problem, moments.weight, places, _ITERATIONS)
        if not bool(jnp.any(state.quota > 0)):
            break
    new = layer.join(state.kept)
    before, after = (float(reconstruct(w, gram, which, centred=centred, ridge=ridge).after) for which in (mask, new))
    if not after < before:
        return RefinedMask(mask, before, before, 0)
    return RefinedMask(new, before, after, count(new & ~mask))


@dataclasses.dataclass(frozen=True)
class RefinedLayer:
    """What swaps did for one layer.

    Attributes:
      path: of its weights.
      shape: of its weights.
      changed: how many entries are kept now that were not.
      before: error of its output with reconstructed weights, relative to the output; `None` where nothing was tried.
      after: the same with the new mask; never above `before`.
      held_out_before: the first on inputs that the mask was not made for; `None` when there are none.
      held_out_after: the second on these; never above.
      remark: why nothing was tried or changed, or `""`.

    Examples:
      >>> import nm_jax as nm
      >>> nm.RefinedLayer("up/kernel", (8, 4), 3, 0.2, 0.1).cells()["now"]
      '10%'
    """

    path: str
    shape: tuple[int, ...]
    changed: int = 0
    before: float | None = None
    after: float | None = None
    held_out_before: float | None = None
    held_out_after: float | None = None
    remark: str = ""

    def cells(self) -> dict[str, str]:
        """The row as it is printed."""
        errors = {
            "error": self.before,
            "now": self.after,
            "held out": self.held_out_before,
            "now ": self.held_out_after,
        }
        shown = {name: f"{100 * error:.3g}%" for name, error in errors.items() if error is not None}
        row = {"path": self.path, "shape": shape_text(self.shape), "swapped": str(self.changed)}
        return row | shown | {"remark": self.remark}


@dataclasses.dataclass(frozen=True)
class RefineReport:
    """What swaps did for every layer; its string is a table.

    Attributes:
      layers: one row per masked parameter.

    Examples:
      >>> import nm_jax as nm
      >>> nm.RefineReport((nm.RefinedLayer("up/kernel", (8, 4), 3, 0.2, 0.1),))["up/kernel"].after
      0.1
    """

    layers: tuple[RefinedLayer, ...]

    def __getitem__(self, path: str) -> RefinedLayer:
        return row_of(self.layers, path, "among the masked layers")

    def __str__(self) -> str:
        header = "error of the output with reconstructed weights, relative to it, with the masks as they were and now"
        return "\n".join([header, *aligned([layer.cells() for layer in self.layers])])


def refine_masks(
    params: PyTree,
    masks: PyTree,
    rules: Rules,
    grams: PyTree,
    *,
    held_out: PyTree | None = None,
    biases: bool = True,
    ridge: float | None = None,
    rounds: int = 24,
    on_layer: Callable[[RefinedLayer], None] | None = None,
) -> tuple[PyTree, RefineReport]:
    """The masks of a model after `refine_mask` of every layer that has a Gram matrix.

    Args:
      params: dense parameters.
      masks: a tree like `params` from `nm_jax.compute_masks`, `None` where a leaf stays as it is.
      rules: the pattern, rules or plan that the masks are of.
      grams: a tree like `params` from `nm_jax.gram`.
      held_out: such a tree for other inputs: a layer keeps its mask if the new one is no better on these.
      biases: whether the biases beside the kernels will take up the mean of the change, as `nm_jax.adaprune` lets them.
      ridge: as in `nm_jax.reconstruct`.
      rounds: as in `refine_mask`.
      on_layer: called with each layer's row when it is done: progress.

    Returns:
      A tree of masks for `nm_jax.reconstruct_layers`, and the report.

    Raises:
      ValueError: naming the parameter, when shapes, trees, rules or masks do not fit.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import nm_jax as nm
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> x = jax.random.normal(keys[0], (100, 16)) @ jax.random.normal(keys[1], (16, 16))
      >>> params = {"kernel": jax.random.normal(keys[2], (16, 8))}
      >>> grams = nm.gram(lambda p, x: x @ p["kernel"], params, [x])
      >>> masks, report = nm.refine_masks(params, nm.compute_masks(params, "2:4"), "2:4", grams)
      >>> report["kernel"].after < report["kernel"].before
      True
    """
    leaves, known = leaves_by_path(params), masks_by_path(masks)
    found, held = records(grams), records(held_out)
    new, rows = dict(known), []
    for leaf in resolve(params, rules, "skip"):
        if not isinstance(leaf, SparseLeaf) or empty(known.get(leaf.path)):
            continue
        path, mask, w = leaf.path, known[leaf.path], leaves[leaf.path]
        row = RefinedLayer(path, jnp.shape(w))
        if path not in found:
            row = dataclasses.replace(row, remark="no Gram matrix of its inputs")
        elif not isinstance(leaf.pattern, NM | TransposableNM):
            row = dataclasses.replace(row, remark=f"no swaps are known that keep {leaf.pattern}")
        else:
            gram = found[path]
            centred = biases and bias_beside(path, gram, leaves) is not None
            try:
                better = refine_mask(
                    w, gram, mask, leaf.pattern, axes=leaf.axes, centred=centred, ridge=ridge, rounds=rounds
                )
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            row = dataclasses.replace(row, changed=better.changed, before=better.before, after=better.after)
            if path in held:
                was, now = (
                    float(output_error(w, solved.weight, held[path], centred=centred))
                    for solved in (reconstruct(w, gram, m, centred=centred, ridge=ridge) for m in (mask, better.mask))
                )
                row = dataclasses.replace(row, held_out_before=was, held_out_after=now)
                if not now <= was:
                    row = RefinedLayer(
                        path, row.shape, 0, row.before, row.before, was, was, "no better on the inputs held out"
                    )
            new[path] = better.mask if row.changed else mask
        rows.append(row)
        if on_layer is not None:
            on_layer(row)
    nodes = [new[leaf.path] for leaf in located(masks, empty)]
    return jax.tree.unflatten(jax.tree.structure(masks, is_leaf=empty), nodes), RefineReport(tuple(rows))
