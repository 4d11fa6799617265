"""What became of the layers of a model that was pruned."""

import dataclasses

from nm_jax._core.tables import aligned, row_of, shape_text


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
      remark: what else there is to say, such as that no bias of it is known.

    Examples:
      >>> import nm_jax as nm
      >>> row = nm.PrunedLayer("dense/kernel", (4, 4), 0.5, size=4, rows=100, before=0.2, after=0.1, iterations=16)
      >>> print(nm.PruneReport((row,)))
      1 pruned layer; error of the output relative to it, with masked weights and with the new ones
      path          shape  kept   rows/K  error  now  iterations
      dense/kernel  4x4    50.0%  25      20%    10%  16
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
    remark: str = ""

    def cells(self) -> dict[str, str]:
        """The row as it is printed."""
        cells = {"path": self.path, "shape": shape_text(self.shape), "kept": f"{100 * self.kept:.1f}%"}
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
        return cells | {"iterations": str(self.iterations), "remark": "bias moved" if self.bias else self.remark}


@dataclasses.dataclass(frozen=True)
class PruneReport:
    """What happened to every masked layer; its string is a table.

    Attributes:
      layers: one row per masked parameter, in the order in which they were reconstructed.

    Examples:
      >>> import nm_jax as nm
      >>> report = nm.PruneReport((nm.PrunedLayer("dense/kernel", (4, 4), 0.5),))
      >>> report["dense/kernel"].kept
      0.5
    """

    layers: tuple[PrunedLayer, ...]

    def __getitem__(self, path: str) -> PrunedLayer:
        return row_of(self.layers, path, "among the masked layers")

    def __str__(self) -> str:
        count = f"{len(self.layers)} pruned {'layer' if len(self.layers) == 1 else 'layers'}"
        header = f"{count}; error of the output relative to it, with masked weights and with the new ones"
        return "\n".join([header, *aligned([layer.cells() for layer in self.layers])])
