"""Blocks of layers fitted together: what a layer alone cannot keep, its neighbours make up for."""

import dataclasses
import functools
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from nm_jax._core.paths import empty, located
from nm_jax._core.tables import aligned
from nm_jax._masks.apply import apply_masks
from nm_jax._masks.trees import masks_by_path
from nm_jax._model._batches import argument_tuples
from nm_jax._model._compiled import Skeleton
from nm_jax._model.blocks import Block, Program
from nm_jax._model.tracing import LeafTrace
from nm_jax._reconstruct._block_fit import Compiled, Sample, error, fitted
from nm_jax._reconstruct._outputs import OutputChange, compare_outputs

_SET_ASIDE = 5  # one of so many batches, if none are held out


@dataclasses.dataclass(frozen=True)
class FittedBlock:
    """What became of one block.

    Attributes:
      paths: its masked parameters.
      fitted: how many parameters of it were changed, those without a mask included.
      before: error of its output, relative to the dense network's there, with the weights it had, on inputs that its
        new weights were not made for.
      after: the same with those it has now; never above `before`.
      steps: how many steps of Adam its weights are from; 0: those it had were better.

    Examples:
      >>> import nm_jax as nm
      >>> nm.FittedBlock(("up/kernel", "down/kernel"), 4, before=0.2, after=0.1, steps=300).cells()["now"]
      '10%'
    """

    paths: tuple[str, ...]
    fitted: int
    before: float
    after: float
    steps: int

    def cells(self) -> dict[str, str]:
        """The row as it is printed."""
        more = f" and {len(self.paths) - 3} more" if len(self.paths) > 3 else ""
        return {
            "block": ", ".join(self.paths[:3]) + more,
            "fitted": str(self.fitted),
            "error": f"{100 * self.before:.3g}%",
            "now": f"{100 * self.after:.3g}%",
            "steps": str(self.steps),
        }


@dataclasses.dataclass(frozen=True)
class BlockReport:
    """What became of every block that has masked parameters; its string is a table.

    Attributes:
      blocks: in the order of the model.
      held_out: whether errors are of inputs that the weights were not made for.
      before: how far the outputs of the network were from those of the dense one; `None` without floating outputs.
      after: how far they are now; never further.
      undone: whether the network had become worse although no block had, so that everything is as it was.

    Examples:
      >>> import nm_jax as nm
      >>> nm.BlockReport((nm.FittedBlock(("up/kernel",), 1, 0.2, 0.1, 300),), True, None, None).blocks[0].after
      0.1
    """

    blocks: tuple[FittedBlock, ...]
    held_out: bool
    before: OutputChange | None
    after: OutputChange | None
    undone: bool = False

    def __str__(self) -> str:
        count = f"{len(self.blocks)} {'block' if len(self.blocks) == 1 else 'blocks'}"
        where = "inputs held out" if self.held_out else "the inputs they were fitted on"
        lines = [f"{count}; error of the output relative to the dense network's there, before and after, on {where}"]
        lines += aligned([block.cells() for block in self.blocks])
        if self.before is not None:
            lines += [f"outputs of the network before: {self.before}", f"outputs of the network: {self.after}"]
        return "\n".join([*lines, "all of it undone: the network had become worse"] if self.undone else lines)


def fit_blocks(
    apply: Callable,
    dense: PyTree,
    params: PyTree,
    masks: PyTree,
    batches: Iterable[Any],
    *,
    held_out: Iterable[Any] | None = None,
    row_mask: Callable[..., Array] | None = None,
    boundaries: Sequence[str] | None = None,
    layers: int = 2,
    leaves: str | Sequence[str] | None = None,
    steps: int = 300,
    learning_rate: float = 3e-3,
    seed: int = 0,
    on_block: Callable[[FittedBlock], None] | None = None,
) -> tuple[PyTree, BlockReport]:
    """Fits the weights of every block of a pruned model together, so that its output is that of the dense model.

    For each block f: minimise ||f(S * V; Z) - Y||^2 over V, with Z what the pruned blocks before it make of the
    calibration inputs and Y what the dense network has behind the block: later blocks repair earlier ones

    Args:
      apply: the model's forward pass, `apply(params, *inputs)`, in evaluation mode.
      dense: the parameters before anything was pruned.
      params: those to start from, such as `nm_jax.adaprune` made them; `dense` again starts from the masked weights.
      masks: a tree of masks, `None` where a leaf has none.
      batches: calibration inputs, tuples as `apply` takes them (anything else is a single input); kept in a list. A
        step takes one batch: 25 to 100 examples in each serve well, some hundreds in all.
      held_out: more of them, on which new weights are judged. `None`: every fifth of the batches is set aside for it;
        with fewer than five, weights are judged on the inputs they are fitted on, and the report says so.
      row_mask: a function of the inputs that says which rows count (`nm_jax.gram`), of padded sequences.
      boundaries: regular expressions of paths, in the order of the model: a block begins before the first use of a
        parameter that one of them finds. `[]`: the whole network is one block. `None`: read off the model: a block
        ends where a single value is passed on (behind the sum of a residual block, between plain layers) and the next
        weight is contracted. What no such place divides (the two arms of a U-Net, a scan over layers) is one block.
      layers: how many masked parameters a block that is read off the model has at least: with one, plain layers are
        blocks of their own.
      leaves: regular expressions of the parameters that may change. `None`: all that a block has but tables that are
        looked up and running statistics: also biases, scales of norms, and weights without a mask within the block
        (depthwise convolutions).
      steps: of Adam, for each block.
      learning_rate: at the start, relative to the root mean square of each parameter; it falls to zero by a cosine.
      seed: of the order of the batches.
      on_block: called with each block's row when it is done: progress.

    Returns:
      The new parameters, zero outside the masks, and the report.

    Raises:
      ValueError: naming what does not fit: masks, batches, boundaries, or outputs that are not finite.

    Every output channel of a weight also has a factor of its own, which is multiplied into it at the end: what a
    folded batch norm would have. A block keeps the weights it had if none of those seen on the way is better on the
    inputs held out; if in the end the outputs of the network are not, everything is as it was. Both are judgements on
    the same inputs: for a figure to report, take others.

    Time: three forward passes of the blocks per step, one batch each, over all blocks as much as `steps` batches cost
    the network in training; and one compilation per block. Memory: what the dense and the pruned network pass on
    between two blocks, for all batches, and the activations of one block for one batch. It differs from
    `nm_jax.adaprune`, which solves each layer exactly from its Gram matrix, in all of its options and costs many times
    as much: hence a function of its own, to be called after it, or again on its own result. Not for use inside `jit`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import nm_jax as nm
      >>> def apply(params, x):
      ...     return x + jnp.tanh(x @ params["up"]) @ params["down"]
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {"up": jax.random.normal(keys[0], (4, 8)), "down": jax.random.normal(keys[1], (8, 4))}
      >>> masks = nm.compute_masks(params, [("up|down", "2:4")])
      >>> batches = list(jax.random.normal(keys[2], (5, 16, 4)))
      >>> new, report = nm.fit_blocks(apply, params, params, masks, batches, boundaries=[], steps=20)
      >>> report.blocks[0].paths, report.blocks[0].after < report.blocks[0].before
      (('down', 'up'), True)
    """
    masked = {path: mask for path, mask in masks_by_path(masks).items() if not empty(mask)}
    if not masked:
        raise ValueError("masks has no mask: there is nothing to fit")
    if not Skeleton.of(dense)[0] == Skeleton.of(params)[0]:
        raise ValueError("dense and params are different trees; give the parameters of one model before and after")
    if layers < 1 or steps < 0:
        raise ValueError(f"layers must be 1 or more and steps 0 or more, got {layers} and {steps}")
    start = apply_masks(params, masks)
    skeleton, now = Skeleton.of(start)
    teacher = Skeleton.of(dense)[1]
    fit, held, own = divided(batches, held_out)
    paths = [leaf.path for leaf in located(start)]
    kept = {k: jnp.asarray(masked[path], bool) for k, path in enumerate(paths) if path in masked}
    regexes = [leaves] if isinstance(leaves, str) else leaves

    everything = [*fit, *(held if own else [])]

    @functools.cache
    def cut(number: int) -> tuple[list[LeafTrace], set[int], list[Block], list[Compiled]]:
        """The model in blocks, for batches of the shape of this one."""
        program = Program.of(apply, start, everything[number])
        free = {
            k
            for k, trace in enumerate(program.traces)
            if k in now and _fits(trace, now[k], k in kept)
            if regexes is None or any(re.search(regex, trace.path) for regex in regexes)
        }
        found = program.blocks(kept, free, layers) if boundaries is None else program.blocks_from(boundaries, free)
        names = [", ".join(paths[k] for k in sorted(block.leaves & kept.keys())) for block in found]
        compiled = [Compiled(program, block, name) for block, name in zip(found, names, strict=True)]
        return program.traces, free, found, compiled

    first: dict[Hashable, int] = {}
    cuts = [cut(first.setdefault(shapes, k)) for k, shapes in enumerate(map(_shapes, everything))]
    if len({tuple(block.leaves for block in found) for _, _, found, _ in cuts}) > 1:
        raise ValueError("batches of different shapes are cut into different blocks; give boundaries, or batches alike")
    traces, free, blocks, _ = cuts[0]
    if not any(block.leaves & free and block.leaves & kept.keys() for block in blocks):
        raise ValueError(f"nothing to fit: leaves={leaves!r}, masked: {', '.join(masked)}")
    samples = [
        Sample(inputs, (), (), None if row_mask is None else jnp.asarray(row_mask(*inputs)).astype(bool))
        for inputs in everything
    ]
    passed: list[tuple] = [()] * len(samples)  # by the dense network
    judged = slice(len(fit) if own else 0, None)
    rows, draw = [], np.random.default_rng(seed)
    for number, block in enumerate(blocks):
        here = [compiled[number] for *_, compiled in cuts]
        passed = [b.run(teacher, s.inputs, given) for b, s, given in zip(here, samples, passed, strict=True)]
        samples = [sample._replace(target=target) for sample, target in zip(samples, passed, strict=True)]
        chosen = sorted(block.leaves & free)
        if chosen and block.leaves & kept.keys():
            judge = functools.partial(error, here[judged], samples=samples[judged])
            orders = [draw.permutation(len(fit)) for _ in range(-(-steps // len(fit)))]
            new, before, after, taken = fitted(
                here,
                now,
                {k: kept[k] for k in chosen if k in kept},
                {k: _outputs(traces[k]) for k in chosen},
                samples[: len(fit)],
                np.concatenate([*orders, np.zeros(0, int)])[:steps].tolist(),
                learning_rate,
                judge,
            )
            now = {**now, **new}
            names = tuple(paths[k] for k in sorted(block.leaves & kept.keys()))
            rows.append(FittedBlock(names, len(chosen), before, after, taken))
            if on_block is not None:
                on_block(rows[-1])
        samples = [s._replace(given=b.run(now, s.inputs, s.given)) for b, s in zip(here, samples, strict=True)]
    new = skeleton.filled(now)
    inputs = [sample.inputs for sample in samples[judged]]
    changes = [compare_outputs(apply, dense, tree, inputs, row_mask) for tree in (start, new)]
    undone = changes[0] is not None and changes[1] is not None and not changes[1].error <= changes[0].error
    report = BlockReport(tuple(rows), own, changes[0], changes[0] if undone else changes[1], undone)
    return start if undone else new, report


def divided(batches: Iterable[Any], held_out: Iterable[Any] | None) -> tuple[list[tuple], list[tuple], bool]:
    """The batches to fit on, those to judge on, and whether the latter are others."""
    fit = list(argument_tuples(batches))
    if not fit:
        raise ValueError("batches is empty: blocks are fitted on calibration inputs")
    if held_out is not None:
        held = list(argument_tuples(held_out, "held_out"))
        if not held:
            raise ValueError("held_out is empty: give inputs, or None")
        return fit, held, True
    held = fit[_SET_ASIDE - 1 :: _SET_ASIDE]
    if not held:
        return fit, fit, False
    return [batch for k, batch in enumerate(fit) if k % _SET_ASIDE != _SET_ASIDE - 1], held, True


def _fits(trace: LeafTrace, leaf: Any, masked: bool) -> bool:
    """Whether steps of Adam make sense of a parameter."""
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating) or np.size(leaf) == 0:
        return False
    uses = {use.op for use in trace.uses}
    return masked or not ("gather" in uses or trace.path.endswith(("mean", "var")))


def _outputs(trace: LeafTrace) -> tuple[int, ...]:
    """The shape of a factor for each output of a weight; of what is not contracted, one without effect."""
    if trace.contraction is None:
        return (1,) * len(trace.shape)
    return tuple(1 if letter == "i" else size for size, letter in zip(trace.shape, trace.contraction, strict=True))


def _shapes(inputs: tuple) -> Hashable:
    values, treedef = jax.tree.flatten(inputs)
    return treedef, *((jnp.shape(value), str(jnp.result_type(value))) for value in values)
