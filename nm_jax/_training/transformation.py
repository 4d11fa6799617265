"""Sparse training as one optax transformation: change one line, and the network that trains is N:M sparse."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from nm_jax._core.nonzero import nonzero
from nm_jax._core.rules import Leaf, Rules, SparseLeaf, empty, parse_rules, path_of, resolve
from nm_jax._masks.compute import Scores
from nm_jax._masks.leaves import SolvedLeaf, solve_leaves
from nm_jax._masks.trees import fill, leaves_by_path
from nm_jax._training.straight_through import sr_ste_term
from nm_jax.solvers import Solver


class RefreshStats(NamedTuple):
    """What the last refresh did: one entry per sparse leaf, in the order of the tree's leaves.

    Attributes:
      flip_rate: fraction of mask entries that it changed.
      retained: share of the l1 norm of the dense weights that the mask keeps.
      gap: relative distance to the proved optimum; 0 = proved optimal, -1 = the solver gives no proof.
      nan: whether the dense weights had NaN.
    """

    flip_rate: Float[Array, " leaves"]
    retained: Float[Array, " leaves"]
    gap: Float[Array, " leaves"]
    nan: Bool[Array, " leaves"]


class SparseTrainingState(NamedTuple):
    """State of `sparse_training`.

    Attributes:
      step: updates done.
      masks: tree like the parameters, boolean, one byte per sparse weight; `optax.MaskedNode` where a leaf is dense.
      dense: tree like the parameters: the dense weights, at least float32; `optax.MaskedNode` where a leaf is dense
        anyway. `None` when the mask is fixed.
      stats: what the last refresh did.
      inner: state of the inner transformation, made for the dense weights.
    """

    step: Int[Array, ""]
    masks: PyTree
    dense: PyTree | None
    stats: RefreshStats
    inner: Any


def sparse_training(
    inner: optax.GradientTransformation,
    rules: Rules,
    *,
    refresh_every: int | None = 40,
    decay: float = 2e-4,
    solver: Solver | None = None,
    scores: Scores | None = None,
    begin_step: int = 0,
    end_step: int | None = None,
    partial: str = "skip",
) -> optax.GradientTransformationExtraArgs:
    """Trains N:M sparse parameters with any optimiser: SR-STE, with masks refreshed from the dense weights.

    ```python
    tx = nm.sparse_training(optax.adamw(3e-4), "2:4-T")  # was: tx = optax.adamw(3e-4)
    ```

    The state keeps a dense copy of every sparse parameter, as the paper does. The parameters that the model sees are
    `mask * dense` after every applied update, so the gradient that the loop takes at them *is* the straight-through
    gradient. An update

    1. adds the SR-STE term `decay * (1 - mask) * dense` to it,
    2. lets `inner` update the dense weights, in at least float32,
    3. refreshes the masks from them when due,
    4. returns `mask * dense - params` in the params' dtype: zeros are exact, kept entries within one rounding of the
       dense weights, and errors do not accumulate.

    Evaluation, checkpoints and sparse kernels always see sparse weights. Start the loop from
    `nm.sparse_params(opt_state, params)` to have that for the very first gradient too.

    Args:
      inner: any optax optimiser that does not evaluate the loss itself.
      rules: a pattern such as `"2:4-T"`, or `(path regex, pattern or None, optional axes)` (see `nm_jax.rules`).
      refresh_every: updates between two refreshes; 40 in the paper. `None`: the mask is found once and stays (the
        paper's retraining of a pretrained network). No dense copy is kept then, and gradients are masked before
        `inner`.
      decay: strength of the SR-STE term; 2e-4 in SR-STE and in the paper.
      solver: solver for every sparse leaf; `None` takes the default for each pattern.
      scores: function of a dense weight that says what its mask keeps the most of; `None`: `abs`.
      begin_step: number of dense updates before the first mask.
      end_step: no refresh after this many updates; the last masks stay.
      partial: leaves whose sizes m does not divide: `"skip"` (they stay dense), `"pad"` or `"error"`.

    Returns:
      A transformation whose `update` needs `params`. State: the inner state, 4 bytes (dense copy, float32) and 1 byte
      (mask) per sparse weight. Masks are found inside the compiled step, when due; other steps add elementwise work
      only. Under `jax.vmap` a refresh is run for all members when it is due for one: with steps in common, as in an
      ensemble, that is when it is due.

    Composition:
      - Make it the *last* link of `optax.chain`: what follows would scale or clip `mask * dense - params`. Clipping,
        weight decay, schedules and `optax.inject_hyperparams` go inside; gradients are unscaled before.
      - `optax.MultiSteps`, `apply_if_finite`, `masked` and `multi_transform` go outside.
      - Line searches evaluate the loss at dense points along a line: they are refused.

    Raises:
      ValueError: from this function for wrong arguments; from `init` for rules that do not fit the parameters (and for
        NaN among concrete ones); from `update` without params, for a tree other than the state's, and for line
        searches.
    """
    parse_rules(rules)
    fixed = refresh_every is None
    if refresh_every is not None and refresh_every < 1:
        raise ValueError(f"refresh_every must be at least 1, or None for a fixed mask, got {refresh_every}")
    if begin_step < 0 or (end_step is not None and end_step < begin_step):
        raise ValueError(f"steps need 0 <= begin_step <= end_step, got {begin_step} and {end_step}")
    if decay < 0:
        raise ValueError(f"decay must not be negative, got {decay}")
    inner = optax.with_extra_args_support(inner)

    def find_masks(leaves, weights):
        if scores is None:
            solved = solve_leaves(leaves, weights, solver, transform=jnp.abs)
        else:
            solved = solve_leaves(leaves, [scores(w) for w in weights], solver)
        return [s.mask for s in solved], solved

    def init(params):
        leaves = resolve(params, rules, partial)
        weights, treedef = jax.tree.flatten(params)
        sparse = [leaf for leaf in leaves if isinstance(leaf, SparseLeaf)]
        # Copies, never aliases of the parameters: the caller may donate both.
        dense = [
            jnp.array(w, jnp.float32 if w.dtype.itemsize < 4 else w.dtype, copy=True)
            if isinstance(leaf, SparseLeaf)
            else w
            for leaf, w in zip(leaves, weights, strict=True)
        ]
        kept = [d for leaf, d in zip(leaves, dense, strict=True) if isinstance(leaf, SparseLeaf)]
        if begin_step > 0:
            masks = [jnp.ones(leaf.shape, bool) for leaf in sparse]
            stats = _stats(masks, masks, kept, None)
        else:
            masks, stats = _initial(tuple(sparse), kept, find_masks)
            _raise_for_nan(sparse, stats)
        inner_state = inner.init(params if fixed else treedef.unflatten(dense))
        _refuse_line_searches(inner_state)
        return SparseTrainingState(
            step=jnp.zeros((), jnp.int32),
            masks=fill(treedef, leaves, masks, optax.MaskedNode()),
            dense=None if fixed else fill(treedef, leaves, kept, optax.MaskedNode()),
            stats=stats,
            inner=inner_state,
        )

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError("sparse_training needs the parameters: call tx.update(grads, opt_state, params)")
        leaves = resolve(params, rules, partial)
        sparse = [leaf for leaf in leaves if isinstance(leaf, SparseLeaf)]
        weights, treedef = jax.tree.flatten(params)
        gradients = treedef.flatten_up_to(updates)
        masks = _for_leaves(state.masks, leaves, "masks")
        step = state.step + 1

        if fixed:
            dense = weights
            gradients = [_mask(g, m) for g, m in zip(gradients, masks, strict=True)]
        else:
            stored = _for_leaves(state.dense, leaves, "dense weights")
            dense = [w if d is None else d for w, d in zip(weights, stored, strict=True)]
            gradients = [g if m is None else g.astype(d.dtype) for g, m, d in zip(gradients, masks, dense, strict=True)]
            if decay:
                gradients = [
                    g if m is None else g + sr_ste_term(d, m, decay)
                    for g, m, d in zip(gradients, masks, dense, strict=True)
                ]
        inner_updates, inner_state = inner.update(
            treedef.unflatten(gradients), state.inner, treedef.unflatten(dense), **extra_args
        )
        inner_updates = treedef.flatten_up_to(inner_updates)
        moved = [(d + u).astype(d.dtype) for d, u, m in zip(dense, inner_updates, masks, strict=True) if m is not None]
        kept = [m for m in masks if m is not None]
        due = _due(step, refresh_every, begin_step, end_step)
        if due is not None and sparse:
            # A loop of no turn or one: unlike the branches of `lax.cond`, it leaves masks that stay where they are (XLA
            # would copy them, twice, on every step). Nothing in it has a gradient; `update` as a whole still does.
            frozen, stats = jax.lax.stop_gradient((moved, state.stats))

            def refresh(carry):
                _, old, _ = carry
                found, solved = find_masks(sparse, frozen)
                return jnp.zeros((), bool), found, _stats(old, found, frozen, solved)

            _, kept, stats = jax.lax.while_loop(lambda carry: carry[0], refresh, (due, kept, stats))
        else:
            stats = state.stats

        result, values, keeps = [], iter(moved), iter(kept)
        for leaf, weight, change in zip(leaves, weights, inner_updates, strict=True):
            if isinstance(leaf, SparseLeaf):
                value, keep = next(values), next(keeps)
                # With a fixed mask `change` is the exact step; the dense copy needs the difference.
                step_to = change.astype(weight.dtype) if fixed else value.astype(weight.dtype) - weight
                change = jnp.where(keep, step_to, -weight)
            result.append(change)
        new_state = SparseTrainingState(
            step=step,
            masks=fill(treedef, leaves, kept, optax.MaskedNode()),
            dense=None if fixed else fill(treedef, leaves, moved, optax.MaskedNode()),
            stats=stats,
            inner=inner_state,
        )
        return treedef.unflatten(result), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _due(step, refresh_every, begin_step, end_step):
    """Whether masks are found anew after this update; `None` when they never are."""
    if refresh_every is None:
        return step == begin_step if begin_step > 0 else None
    due = (step >= begin_step) & ((step - begin_step) % refresh_every == 0)
    return due if end_step is None else due & (step <= end_step)


def _initial(sparse: tuple[SparseLeaf, ...], kept: list[Array], find_masks: Callable):
    """Masks and statistics at the start, compiled as one."""

    @jax.jit
    def run(kept):
        masks, solved = find_masks(sparse, kept)
        return masks, _stats(masks, masks, kept, solved)

    return run(kept)


def _stats(old: list[Array], new: list[Array], dense: list[Array], solved: list[SolvedLeaf] | None) -> RefreshStats:
    def each(function, *lists, dtype=jnp.float32):
        return jnp.array([function(*items) for items in zip(*lists, strict=True)], dtype).reshape(-1)

    def retained(mask, weight):
        magnitude = jnp.abs(weight).astype(jnp.float32)
        total = jnp.sum(magnitude)
        return jnp.where(total > 0, jnp.sum(jnp.where(mask, magnitude, 0)) / jnp.where(total > 0, total, 1), 1)

    proofs = [jnp.float32(-1) for _ in new] if solved is None else [s.gap for s in solved]
    nans = [jnp.any(jnp.isnan(d)) for d in dense] if solved is None else [s.nan for s in solved]
    return RefreshStats(
        flip_rate=each(lambda a, b: jnp.mean((a != b).astype(jnp.float32)), old, new),
        retained=each(retained, new, dense),
        gap=each(lambda gap: gap, proofs),
        nan=each(lambda nan: nan, nans, dtype=bool),
    )


def _raise_for_nan(sparse: list[SparseLeaf], stats: RefreshStats) -> None:
    if isinstance(stats.nan, jax.core.Tracer):
        return
    for leaf, nan in zip(sparse, stats.nan, strict=True):
        if nan:
            raise ValueError(f"{leaf.path}: the parameter or its scores are NaN; check the initialisation")


def _refuse_line_searches(inner_state: Any) -> None:
    searches = (optax.ScaleByBacktrackingLinesearchState, optax.ScaleByZoomLinesearchState)

    def is_search(node):
        return isinstance(node, searches)

    if any(is_search(node) for node in jax.tree.leaves(inner_state, is_leaf=is_search)):
        raise ValueError(
            "sparse_training cannot wrap a line search, which would evaluate the loss at dense weights; "
            "use an optimiser with a learning rate (optax.lbfgs: pass linesearch=None)"
        )


def _mask(value, mask):
    return value if mask is None else jnp.where(mask, value, 0)


def _for_leaves(tree: PyTree, leaves: list[Leaf], what: str) -> list[Array | None]:
    """The entries of a state's tree for the leaves of the parameters, `None` for dense ones."""
    by_path = leaves_by_path(tree)
    entries = []
    for leaf in leaves:
        entry = by_path.pop(leaf.path, None)
        if empty(entry) == isinstance(leaf, SparseLeaf):
            differs = "no" if empty(entry) else "unexpected"
            raise ValueError(f"the state has {differs} {what} for {leaf.path}; call init for this tree")
        if not empty(entry) and entry.shape != leaf.shape:
            raise ValueError(
                f"{leaf.path}: the state's {what} have shape {entry.shape}, the parameter has {leaf.shape}; "
                "call init for this tree"
            )
        entries.append(None if empty(entry) else entry)
    for path, entry in by_path.items():
        if not empty(entry):
            raise ValueError(f"the state has {what} for {path}, which is not among the parameters; call init again")
    return entries


# ------------------------------------------------------------------------------------------- reading a state


def _states(opt_state: Any) -> list[SparseTrainingState]:
    """All states of `sparse_training` in the state of any optimiser, as plain arrays."""

    def ours(node):
        return isinstance(node, SparseTrainingState)

    found = [node for node in jax.tree.leaves(opt_state, is_leaf=ours) if ours(node)]
    if not found:
        raise ValueError("this optimiser state holds no state of sparse_training; was tx.init called on it?")

    # Flax NNX wraps every array of an optimiser state in a Variable.
    def wrapped(node):
        return hasattr(node, "get_value")

    return [jax.tree.map(lambda n: n.get_value() if wrapped(n) else n, state, is_leaf=wrapped) for state in found]


def _merge(trees: list[PyTree]) -> PyTree:
    """One tree out of several that are empty in different places, as under `optax.multi_transform`."""
    filled = [tree for tree in trees if not empty(tree)]
    if len(filled) < 2:
        return filled[0] if filled else None
    first = filled[0]
    treedef: Any = jax.tree.structure(first, is_leaf=lambda node: node is not first)
    return treedef.unflatten([_merge(list(nodes)) for nodes in zip(*map(treedef.flatten_up_to, filled), strict=True)])


def _hollow(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda node: None if empty(node) else node, tree, is_leaf=empty)


def masks(opt_state: Any) -> PyTree[Bool[Array, "..."] | None]:
    """The masks in an optimiser state, however deep `sparse_training` sits in it (`chain`, `multi_transform`, ...).

    Returns:
      A tree like the parameters, True = kept, `None` for a leaf that is dense.
    """
    return _hollow(_merge([state.masks for state in _states(opt_state)]))


def dense_params(opt_state: Any, params: PyTree[Array] | None = None) -> PyTree[Array | None]:
    """The dense weights behind the sparse parameters.

    Args:
      opt_state: state of an optimiser that has `sparse_training` in it.
      params: the parameters; when given, leaves without a dense copy (dense anyway) are taken from here.

    Returns:
      A tree like the parameters, at least float32 for sparse ones; `None` for leaves without a dense copy when
      `params` is not given.

    An exponential moving average is sparse when it is taken of these and masked at the end:
    `nm.apply_masks(ema_of_dense, nm.masks(opt_state))`.
    """
    states = _states(opt_state)
    if all(state.dense is None for state in states):
        raise ValueError("the mask is fixed (refresh_every=None), so no dense copy is kept; use the params")
    dense = _hollow(_merge([state.dense for state in states]))
    if params is None:
        return dense
    by_path = leaves_by_path(dense)

    def pick(keys, param):
        stored = by_path.get(path_of(keys))
        return param if stored is None else stored

    return jax.tree_util.tree_map_with_path(pick, params)


def sparse_params(opt_state: Any, params: PyTree[Array]) -> PyTree[Array]:
    """`params`, with every sparse leaf set to `mask * dense` of the state, in its own dtype.

    Start a loop from it, and its very first gradient is taken at sparse parameters. It also takes back a step that is
    in the parameters but not yet in the state.
    """
    by_mask = leaves_by_path(masks(opt_state))
    fixed = all(state.dense is None for state in _states(opt_state))
    by_dense = {} if fixed else leaves_by_path(dense_params(opt_state))

    def value(keys, param):
        mask = by_mask.get(path_of(keys))
        if mask is None:
            return param
        dense = by_dense.get(path_of(keys))
        return _mask(param if dense is None else dense.astype(param.dtype), mask)

    return jax.tree_util.tree_map_with_path(value, params)


def with_params(opt_state: Any, params: PyTree[Array]) -> Any:
    """The optimiser state after the parameters were edited from outside (loaded, clipped, averaged).

    Without it the next update would overwrite the edit. The dense weights become `params` wherever a mask keeps them
    or they are not zero; pruned entries that are zero keep the dense weight they had. Masks change at the next refresh.

    Args:
      opt_state: state of an optimiser that has `sparse_training` in it.
      params: the edited parameters.

    Returns:
      A state of the same structure.
    """
    edited = leaves_by_path(params)

    def reseed(state):
        if not isinstance(state, SparseTrainingState) or state.dense is None:
            return state
        kept = leaves_by_path(state.masks)

        def value(keys, dense):
            path = path_of(keys)
            if empty(edited.get(path)):
                raise ValueError(f"params has no leaf {path}, which the state holds dense weights for")
            param = edited[path]
            if jnp.shape(param) != dense.shape:
                raise ValueError(f"{path}: params has shape {jnp.shape(param)}, the state has {dense.shape}")
            return jnp.where(kept[path] | nonzero(param), param.astype(dense.dtype), dense)

        return state._replace(dense=jax.tree_util.tree_map_with_path(value, state.dense))

    _states(opt_state)  # raises where there is none
    return jax.tree.map(reseed, opt_state, is_leaf=lambda node: isinstance(node, SparseTrainingState))


def refresh_stats(opt_state: Any) -> RefreshStats:
    """What the last refresh did, per sparse leaf, in the order of the leaves of the parameters.

    With several states (`optax.multi_transform`) one after the other. Scalars for logging under `jit`:
    `refresh_stats(opt_state).flip_rate.mean()`.
    """
    found = [state.stats for state in _states(opt_state)]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)
