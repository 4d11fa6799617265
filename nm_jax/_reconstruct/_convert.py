"""From the sparsity that a network has to the one that hardware runs (Section 5 and A.1 of the paper).

A network may be dense, unstructured, or N:M with other numbers. `convert` looks how far each leaf is from its pattern,
and gives those that break it masks and, by AdaPrune, weights that keep the outputs of their layers.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from jaxtyping import Array, Bool, PyTree

from nm_jax._core.rules import Rules
from nm_jax._core.tables import aligned
from nm_jax._masks.compute import Scores, compute_masks
from nm_jax._masks.verify import Report, verify
from nm_jax._model._batches import argument_tuples
from nm_jax._reconstruct._adaprune import adaprune
from nm_jax._reconstruct._best import ConversionStep, best, steps_text
from nm_jax._reconstruct._outputs import OutputChange, compare_outputs
from nm_jax._reconstruct._report import PruneReport
from nm_jax._reconstruct._violations import Survey, Violations
from nm_jax.solvers import Solver


def fit_masks(
    params: PyTree,
    rules: Rules,
    *,
    scores: PyTree | Scores | None = None,
    solver: Solver | None = None,
    partial: str = "skip",
) -> PyTree[Bool[Array, "..."] | None]:
    """Masks of a pattern for a model that is sparse already: a leaf that has the pattern keeps the mask it has.

    Args:
      params: parameters; zeros are what is pruned already.
      rules: as in `nm_jax.compute_masks`, which finds the other masks. A weight that is zero may be kept there, and
        AdaPrune may use it.
      scores: as there.
      solver: as there.
      partial: as there.

    Returns:
      A tree like `params` of masks, `None` for a leaf that stays dense.

    Raises:
      ValueError: as `nm_jax.compute_masks`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import nm_jax as nm
      >>> params = {"kernel": jnp.eye(8)}
      >>> masks = nm.fit_masks(params, "2:4-T")
      >>> bool((masks["kernel"] == (params["kernel"] != 0)).all())
      True
    """
    survey = Survey.of(params, rules, partial)
    return survey.all_masks(params, compute_masks(params, survey.broken, scores=scores, solver=solver))


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What `convert` did; its string says it layer by layer, and whether the network is still one.

    Attributes:
      masks: of the new parameters.
      violations: how far each leaf was from its pattern.
      layers: how well each layer's output is kept; layers that had their pattern are not among them.
      check: of the new parameters, by `nm_jax.verify`.
      outputs: how far the outputs of the network are from what they were; `None` when nothing was changed, or when it
        has no outputs in floating point.
      steps: with `effort="best"`, what was done and what each step gained; otherwise empty.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import nm_jax as nm
      >>> def apply(params, x):
      ...     return x @ params["kernel"]
      >>> params = {"kernel": jnp.eye(8)}  # it is 2:4 already
      >>> new, conversion = nm.convert(apply, params, "2:4", [jnp.ones((3, 8))])
      >>> conversion.check.ok, len(conversion.layers.layers), conversion.outputs
      (True, 0, None)
    """

    masks: PyTree[Bool[Array, "..."] | None]
    violations: tuple[Violations, ...]
    layers: PruneReport
    check: Report
    outputs: OutputChange | None = None
    steps: tuple[ConversionStep, ...] = ()

    def __str__(self) -> str:
        header = "groups (tiles) that broke the pattern, as counted and by Eq. 4, and nonzero weights that had to go"
        done = steps_text(self.steps) if self.steps else [str(self.layers)]
        lines = [header, *aligned([row.cells() for row in self.violations]), "", *done, ""]
        if self.outputs is not None:
            lines.append(f"outputs of the network: {self.outputs}")
        elif not self.layers.layers:
            lines.append("outputs of the network: nothing was changed")
        verdict = "passed" if self.check.ok else "FAILED"
        return "\n".join([*lines, f"verification {verdict}: {str(self.check).splitlines()[0]}"])


def convert(
    apply: Callable,
    params: PyTree,
    rules: Rules,
    batches: Iterable[Any],
    *,
    scores: PyTree | Scores | None = None,
    solver: Solver | None = None,
    partial: str = "skip",
    effort: str = "fast",
    **options: Any,
) -> tuple[PyTree, Conversion]:
    """A model with the pattern that the hardware supports, from whatever sparsity it has, without training.

    Dense -> N:M, unstructured -> N:M (`choose_patterns` gives the rules), 4:8 -> 2:4 -> 1:2, transposable or not: the
    same three steps, `fit_masks`, `adaprune` and `verify`. Layers that have the pattern already stay as they are. Then
    the network is evaluated before and after, because small errors of its layers can add up to another network.

    Args:
      apply: the model's forward pass, `apply(params, *inputs)`, in evaluation mode.
      params: parameters; zeros are what is pruned already.
      rules: a pattern, rules, or a plan (`nm_jax.plan`), which leaves the first and the last layer dense.
      batches: calibration inputs; they are kept in a list.
      scores: as in `nm_jax.compute_masks`.
      solver: as there.
      partial: as there.
      effort: `"fast"`, the three steps; or `"best"`, all that is known to help: channels are permuted first
        (`nm_jax.permute`), weights swapped in the masks (`nm_jax.refine_masks`), and blocks of layers fitted together
        at the end (`nm_jax.fit_blocks`). A step that would not help, or cannot be taken, is left out, and the report
        says why. The parameters may be in another order of channels then.
      **options: as in `nm_jax.adaprune`. With `held_out`, the outputs of the network are compared on these inputs; with
        `effort="best"` every fifth batch is set aside for it otherwise. That also takes `steps`, `boundaries`, `layers`
        and `seed` of `nm_jax.fit_blocks`.

    Returns:
      The new parameters, and what happened to each layer. A network with batch norm gains by having it tuned
      afterwards (`nm_jax.tune_batch_norm`).

    Raises:
      ValueError: as `nm_jax.compute_masks` and `nm_jax.adaprune`.

    Warns:
      UserWarning: when the outputs of the network have little to do with what they were.

    Costs `adaprune` and two forward passes, with `effort="best"` many times as much (`nm_jax.fit_blocks`); what was
    compiled is used again by later calls with the same `apply` and shapes. Not for use inside `jit`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import nm_jax as nm
      >>> def apply(params, x):
      ...     return jnp.tanh(x @ params["a"]) @ params["b"]
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {"a": jax.random.normal(keys[0], (8, 16)), "b": jax.random.normal(keys[1], (16, 4))}
      >>> x = jax.random.normal(keys[2], (64, 8))
      >>> new, conversion = nm.convert(apply, params, [("a", "4:8")], [x])
      >>> print(conversion)  # doctest: +ELLIPSIS
      groups (tiles) that broke the pattern, ...
      verification passed: 1 sparse leaf, all have their pattern
    """
    if effort not in ("fast", "best"):
        raise ValueError(f"effort must be 'fast' or 'best', got {effort!r}")
    survey = Survey.of(params, rules, partial)
    violations = tuple(survey.violations(params))
    new, layers, outputs = params, PruneReport(()), None
    steps: tuple[ConversionStep, ...] = ()
    if not any(share > 0 for share in survey.tiles.values()):
        masks = survey.all_masks(params, compute_masks(params, survey.broken, scores=scores, solver=solver))
        return new, Conversion(masks, violations, layers, verify(new, survey.rules))
    batches = list(argument_tuples(batches))
    if effort == "best":
        new, masks, layers, steps = best(apply, params, survey, batches, scores, solver, options)
        outputs = steps[-1].outputs
    else:
        found = compute_masks(params, survey.broken, scores=scores, solver=solver)
        masks = survey.all_masks(params, found)
        if options.get("held_out") is not None:
            options["held_out"] = list(argument_tuples(options["held_out"], "held_out"))
        new, layers = adaprune(apply, params, found, batches, **options)
        outputs = compare_outputs(apply, params, new, options.get("held_out") or batches, options.get("row_mask"))
    if outputs is not None and outputs.collapsed:
        warnings.warn(f"the outputs of the converted network: {outputs}", stacklevel=2)
    return new, Conversion(masks, violations, layers, verify(new, survey.rules), outputs, steps)
