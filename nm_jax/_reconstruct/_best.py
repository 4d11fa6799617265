"""All that can be done for a network that is to get a pattern, without training it: one step after another."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from jaxtyping import PyTree

from nm_jax._core.tables import aligned
from nm_jax._masks.apply import apply_masks
from nm_jax._masks.compute import compute_masks
from nm_jax._model.gram import gram
from nm_jax._reconstruct._adaprune import adaprune
from nm_jax._reconstruct._blocks import BlockReport, divided, fit_blocks
from nm_jax._reconstruct._outputs import OutputChange, compare_outputs
from nm_jax._reconstruct._permute import PermuteReport, permute
from nm_jax._reconstruct._refine import RefineReport, refine_masks
from nm_jax._reconstruct._report import PruneReport
from nm_jax._reconstruct._violations import Survey

_BLOCKS = ("steps", "boundaries", "layers", "seed")


@dataclasses.dataclass(frozen=True)
class ConversionStep:
    """One step of `nm_jax.convert(..., effort="best")`, and what it gained.

    Attributes:
      name: what was done.
      outputs: how far the outputs of the network were from what they were at first, after it, on inputs that nothing
        was made for; `None` without floating outputs.
      report: layer by layer, or block by block; `None` where there is nothing more to say.
      remark: why it was left out, or `""`.

    Examples:
      >>> import nm_jax as nm
      >>> step = nm.ConversionStep("channels permuted", None, None, "a leaf has its pattern already")
      >>> step.cells()["step"]
      'channels permuted'
    """

    name: str
    outputs: OutputChange | None
    report: PermuteReport | RefineReport | PruneReport | BlockReport | None
    remark: str = ""

    def cells(self) -> dict[str, str]:
        """The row as it is printed."""
        row = {"step": self.name, "remark": f"left out: {self.remark}" if self.remark else ""}
        if self.outputs is None:
            return row
        row["error of the outputs"] = f"{100 * self.outputs.error:.3g}%"
        if self.outputs.agreement is not None:
            row["same largest logit"] = f"{100 * self.outputs.agreement:.1f}%"
        return row


def steps_text(steps: tuple[ConversionStep, ...]) -> list[str]:
    """The lines of a report: a table of the steps, then what each says of the layers."""
    lines = ["after each step, on inputs that nothing was made for:", *aligned([step.cells() for step in steps])]
    for step in steps:
        if step.report is not None:
            lines += ["", f"{step.name}:", str(step.report)]
    return lines


def best(
    apply: Callable,
    params: PyTree,
    survey: Survey,
    batches: list[tuple],
    scores: Any,
    solver: Any,
    options: dict[str, Any],
) -> tuple[PyTree, PyTree, PruneReport, tuple[ConversionStep, ...]]:
    """New parameters, their masks, the report of AdaPrune, and the steps, the last of which is of these parameters.

    Args:
      apply: the model.
      params: as they are.
      survey: how far they are from their patterns.
      batches: calibration inputs.
      scores: as in `compute_masks`.
      solver: as there.
      options: of `adaprune`, and of `fit_blocks`.
    """
    blocks = {name: options.pop(name) for name in _BLOCKS if name in options}
    fit, held, _ = divided(batches, options.pop("held_out", None))
    row_mask = options.get("row_mask")

    def step(name: str, new: PyTree, report: Any = None, remark: str = "") -> ConversionStep:
        return ConversionStep(name, compare_outputs(apply, params, new, held, row_mask), report, remark)

    masks = compute_masks(params, survey.broken, scores=scores, solver=solver)
    steps = [step("masks alone", apply_masks(params, masks))]
    dense, why = params, _kept_in_order(survey, scores)
    if not why:
        try:
            dense, permuted = permute(apply, params, *fit[0], pattern=survey.rules)
            masks = compute_masks(dense, survey.broken, solver=solver)
            steps.append(step("channels permuted", apply_masks(dense, masks), permuted))
        except ValueError as error:
            why = str(error)
    if why:
        steps.append(dataclasses.replace(steps[0], name="channels permuted", remark=why))
    new, layers = adaprune(apply, dense, masks, fit, held_out=held, **options)
    steps.append(step("layers reconstructed", new, layers))
    wanted = [f"^{re.escape(row.path)}$" for row in layers.layers if row.after is not None]
    grams, others = (gram(apply, dense, part, wanted, row_mask) for part in (fit, held))
    how = {name: options[name] for name in ("ridge", "biases") if name in options}
    swapped, refined = refine_masks(dense, masks, survey.broken, grams, held_out=others, **how)
    then, relayered = adaprune(apply, dense, swapped, fit, held_out=held, **options)
    tried = step("weights swapped, layers reconstructed", then, refined)
    if _worse(tried, steps[-1]):
        steps.append(dataclasses.replace(steps[-1], name=tried.name, report=refined, remark="the outputs were worse"))
    else:
        masks, new, layers = swapped, then, relayered
        steps.append(tried)
    whole = survey.all_masks(params, masks)
    new, fitted = fit_blocks(apply, dense, new, whole, fit, held_out=held, row_mask=row_mask, **blocks)
    return new, whole, layers, (*steps, step("blocks fitted", new, fitted))


def _worse(new: ConversionStep, old: ConversionStep) -> bool:
    return new.outputs is not None and old.outputs is not None and not new.outputs.error <= old.outputs.error


def _kept_in_order(survey: Survey, scores: Any) -> str:
    """Why channels are not permuted, or `""`."""
    if scores is not None:
        return "scores are given for the channels as they stand"
    if any(share == 0 for share in survey.tiles.values()):
        return "some leaves have their pattern, which other orders may break"
    return ""
