"""Gram matrices of the inputs of a model's layers, streamed over batches.

A layer's output is X W, with the rows of X contracted. All that a least-squares problem in W needs of X is
H = X^T X, however many rows there are. `gram` evaluates a model and sums H, and the sum and the number of the rows, for
every parameter that you ask for, in the order in which the parameter's own dimensions are contracted.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, PyTree

from nm_jax._core.rules import LeafRules
from nm_jax._core.sharding import partitioned
from nm_jax._model._batches import argument_tuples
from nm_jax._model._compiled import Arrays, Skeleton, kept_with_function
from nm_jax._model.gram._layout import Layout, chosen_paths, inner_loops, taps_of
from nm_jax._model.gram._moments import Moments, product_moments
from nm_jax._model.gram._patches import window_moments
from nm_jax._model.gram._record import Gram
from nm_jax._model.tracing import Site, Tap, walk_model
from nm_jax._model.tracing._jaxpr import Equation, Literal, Opened, bind, branches, called, loop


def gram(
    apply: Callable,
    params: PyTree,
    batches: Iterable[Any],
    leaves: str | Sequence[str] | LeafRules | None = None,
    row_mask: Callable[..., Array | np.ndarray] | Iterable[Array | np.ndarray] | None = None,
) -> PyTree[Gram | None]:
    """Evaluates a model on batches and sums the Gram matrices of the inputs of its layers: H = sum of x x^T.

    Args:
      apply: the model's forward pass, `apply(params, *inputs)`, in evaluation mode; its result is not used.
      params: parameters.
      batches: tuples of inputs (anything else is a single input), as `apply` takes them; the last may be smaller. Not
        a bare array, and not a tuple of arrays, of which it cannot be told whether they are one batch or several.
      leaves: regular expressions of paths, of which a parameter must match one; or a plan, whose sparse leaves are
        meant. `None`: every parameter that is contracted in one way, has an output axis and gives a Gram matrix.
      row_mask: which rows count, with the shape of the leading dimensions of the activations, such as (batch, length)
        for padded text or (batch,): a function of the inputs, or an iterable with one array per batch. Padded
        positions must be masked here, or H is wrong by a factor.

    Returns:
      A tree like `params` of `Gram` records, `None` where there is none. Parameters that contract the same input
      (query, key and value) share its arrays.

    Raises:
      ValueError: naming the parameter, if one that `leaves` asks for gives no Gram matrix: it is used in several ways,
        or not contracted; by a ragged product; sliced along its contraction, or by an index of run time; in a `while`
        loop of unknown length or in `shard_map`. Also when a mask does not fit the rows of an activation, or a regular
        expression matches no path.

    Cost: one forward pass and 2 K^2 FLOPs per row of every distinct input; a fifth of that for a 3 x 3 convolution
    without strides. Memory: 4 K^2 bytes per matrix, beside what a forward pass takes; patches of a convolution are
    never there at once (of a one-dimensional one they are). Every shape of a batch is compiled once, with donated sums,
    and that is kept as long as `apply` lives: it must be pure, as for `jax.jit`. Parameters and inputs may be sharded
    over a mesh. Sums are in float32 at the highest precision whatever the model computes in. Goes through the batches
    once: a generator will do. Not for use inside `jit`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> def apply(params, x):
      ...     return jnp.maximum(x @ params["a"], 0) @ params["b"]
      >>> params = {"a": jnp.eye(4), "b": jnp.ones((4, 2))}
      >>> batches = (jnp.arange(4.0 * k).reshape(k, 4) for k in (3, 5))
      >>> grams = nm.gram(apply, params, batches)
      >>> grams["b"].h.shape, grams["b"].contraction, int(grams["b"].rows[0])
      ((1, 4, 4), 'io', 8)
    """
    skeleton, arrays = Skeleton.of(params)
    capture = _capture(apply, skeleton, chosen_paths(params, leaves))
    masks = row_mask if row_mask is None or callable(row_mask) else iter(row_mask)
    sums, layout = None, None
    for inputs in argument_tuples(batches):
        keep = None
        if masks is not None:
            keep = masks(*inputs) if callable(masks) else next(masks, None)
            if keep is None:
                raise ValueError("row_mask has fewer arrays than there are batches; give one per batch")
            keep = jnp.asarray(keep).astype(bool)
        if layout is None:
            layout = capture.layout(arrays, inputs)
            sums = layout.zeros()
        sums = capture.add(sums, arrays, inputs, keep)
    if layout is None or sums is None:
        raise ValueError("batches is empty; a Gram matrix needs at least one")
    return layout.records(params, sums)


class _Capture:
    """The sums over the batches of one model, for some of its parameters; compiled for every shape of a batch once."""

    def __init__(self, apply: Callable, skeleton: Skeleton, regexes: tuple[str, ...] | None):
        self._layouts: dict[Any, Layout] = {}
        self._trace = functools.partial(_trace, apply, skeleton, regexes)
        self.add = jax.jit(functools.partial(_add_batch, self._trace), donate_argnums=0)

    def layout(self, arrays: Arrays, inputs: tuple) -> Layout:
        """What is summed."""
        values, treedef = jax.tree.flatten((arrays, inputs))
        shapes = treedef, *(jnp.shape(value) for value in values)
        if shapes not in self._layouts:
            self._layouts[shapes] = self._trace(arrays, inputs)[1]
        return self._layouts[shapes]


_capture = kept_with_function(_Capture)


def _trace(apply: Callable, skeleton: Skeleton, regexes: tuple[str, ...] | None, arrays: Arrays, inputs):
    traced = walk_model(apply, skeleton.filled(arrays), inputs)
    return traced, Layout.of(traced, regexes)


def _add_batch(trace: Callable, sums: list[Moments], arrays: Arrays, inputs: tuple, keep: Array | None):
    """The sums after one more batch."""
    traced, layout = trace(arrays, inputs)
    if [s.h.shape for s in layout.zeros()] != [s.h.shape for s in sums]:
        raise ValueError("the model uses its parameters differently on different batches; sum them apart and add them")
    evaluation = _Evaluation(layout, keep)
    values = [*(arrays[k] for k in traced.arrays), *jax.tree.leaves(inputs)]
    _, after = evaluation.run(traced.program, values, traced.site, dict(enumerate(sums)))
    return [after[k] for k in range(len(sums))]


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    """Evaluates a program and adds to the sums on the way."""

    layout: Layout
    keep: Array | None

    def run(self, program: Opened, args: Sequence[Any], site: Site, sums: dict[int, Moments]):
        """(the results, the sums after)."""
        jaxpr = program.jaxpr
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*program.consts, *args], strict=True))

        def read(var: Any) -> Any:
            return var.val if isinstance(var, Literal) else known[var]

        for index, eqn in enumerate(jaxpr.eqns):
            operands = [read(var) for var in eqn.invars]
            for tap, slot in self.layout.work.get((id(site), index), ()):
                added = self._moments(tap, operands[tap.operand])
                sums = sums | {slot: jax.tree.map(jnp.add, sums[slot], added)}
            if index in site.inner:
                results, sums = self._inside(eqn, operands, site.inner[index], sums)
            else:
                results = bind(eqn, operands)
            known.update(zip(eqn.outvars, results, strict=True))
        return [read(var) for var in jaxpr.outvars], sums

    def _inside(self, eqn: Equation, operands: list, sites: list[Site], sums: dict[int, Moments]):
        if (inner := called(eqn)) is not None:
            return self.run(inner, operands, sites[0], sums)
        if eqn.primitive.name == "cond":
            return self._cond(eqn, operands, sites, sums)
        if eqn.primitive.name == "scan":
            return self._scan(eqn, operands, sites[0], sums)
        return bind(eqn, operands), sums

    def _used(self, sites: list[Site]) -> list[int]:
        """The sums that something inside adds to."""
        work = [self.layout.work.get((site, index), ()) for inner in sites for site, index, _ in taps_of(inner)]
        return sorted({slot for pairs in work for _, slot in pairs})

    def _cond(self, eqn: Equation, operands: list, sites: list[Site], sums: dict[int, Moments]):
        used = {slot: sums[slot] for slot in self._used(sites)}
        ways = [
            lambda sums, *args, branch=branch, site=site: self.run(branch, args, site, sums)
            for branch, site in zip(branches(eqn), sites, strict=True)
        ]
        results, used = lax.switch(operands[0], ways, used, *operands[1:])
        return results, sums | used

    def _scan(self, eqn: Equation, operands: list, site: Site, sums: dict[int, Moments]):
        """Moments of parameters that the loop goes through come out one per iteration; the others are carried."""
        this = loop(eqn)
        used = self._used([site])
        each = {slot: inner_loops(self.layout.slots[slot], site.loop) for slot in used}
        carried = {slot: sums[slot] for slot in used if each[slot] is None}
        fresh = {slot: self.layout.slots[slot] for slot in used if each[slot] is not None}
        constants, rest = operands[: this.consts], operands[this.consts :]

        def body(state, item):
            values, summed = state
            zeros = {k: Moments.zeros(each[k] or (), slot.batch, slot.size) for k, slot in fresh.items()}
            results, after = self.run(this.body, [*constants, *values, *item], site, summed | zeros)
            out = {k: after[k] for k in carried}, {k: after[k] for k in fresh}
            return (results[: this.carry], out[0]), (results[this.carry :], out[1])

        start = (rest[: this.carry], carried)
        (values, carried), (items, found) = lax.scan(
            body, start, rest[this.carry :], length=this.length, reverse=this.reverse
        )
        found = {slot: jax.tree.map(jnp.add, sums[slot], moments) for slot, moments in found.items()}
        return [*values, *items], sums | carried | found

    def _moments(self, tap: Tap, x: Array) -> Moments:
        (dims, batch), windows = tap.layout, tap.windows
        path = self.layout.traces[tap.view.leaf].path
        if windows is None:
            rows = tuple(size for dim, size in enumerate(x.shape) if dim not in dims and dim not in batch)
            kept = self._kept(rows, path)
            return partitioned(lambda x, keep: product_moments(x, dims, batch, keep), PartitionSpec(), x, kept)
        x = x.transpose(dims[0], *dims[2:], dims[1])
        rows = (x.shape[0], *windows.outputs(windows.padded(x.shape[1:-1])))
        kept = self._kept(rows, path)
        return partitioned(lambda x, keep: window_moments(x, windows, keep), PartitionSpec(), x, kept)

    def _kept(self, rows: tuple[int, ...], path: str) -> Array | None:
        """The mask, if it fits the rows of an activation."""
        if self.keep is not None and rows[: self.keep.ndim] != self.keep.shape:
            raise ValueError(
                f"{path}: row_mask has shape {self.keep.shape}, but the rows of its input have shape {rows}, which do "
                "not begin so; give a mask that fits, or leave the parameter out of `leaves`"
            )
        return self.keep
