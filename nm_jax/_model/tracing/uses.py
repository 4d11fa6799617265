"""What a walk through a jaxpr finds: values, uses of parameters, and where their activations can be tapped."""

import dataclasses
from collections.abc import Hashable
from typing import NamedTuple

from nm_jax._model.tracing.views import Dim, View
from nm_jax._model.tracing.windows import Windows


class Value(NamedTuple):
    """What is known of a value.

    Attributes:
      views: the parameters that it shows.
      lost: (parameter, operation): parameters that it depends on through an operation that hides their entries.
      data: whether it depends on the inputs of the model.
      number: two data values with one number are equal.
      behind: (parameter, step): the last contractions with parameters on the ways to it from the inputs; with
        parameter -1, something else than an input (a looked up embedding, a state that a loop starts from).
      scalar: the value of a constant that is the same everywhere.
    """

    views: tuple[View, ...] = ()
    lost: frozenset[tuple[int, str]] = frozenset()
    data: bool = False
    number: Hashable = None
    behind: frozenset[tuple[int, int]] = frozenset()
    scalar: float | None = None

    @property
    def blurred(self) -> frozenset[tuple[int, str]]:
        """`lost`, without the parameters that it also shows."""
        shown = {view.leaf for view in self.views}
        return frozenset(pair for pair in self.lost if pair[0] not in shown)


@dataclasses.dataclass(frozen=True)
class Use:
    """One operation where a parameter meets data.

    Attributes:
      op: `"dot"`, `"conv"` and `"ragged_dot"` contract it; `"gather"` looks it up; `"elementwise"`; `"scale"`
        multiplies a weight; `"derived"` changes a weight through `via`; `"opaque"` contracts what `via` made of it;
        `"params"` contracts it with other parameters; `"carried"` changes it in a loop; otherwise jax's own name.
      letters: for a contraction, what each dimension of the parameter is to it: any of `i` contracted, `k` contracted
        as the position in a convolution kernel, `o` output, `b` batch.
      groups: feature groups of a convolution.
      flops: of one execution, both multiplications and additions counted.
      count: number of executions (iterations of the loops around it).
      order: position among all contractions of data, in the order of the program.
      via: the operation that hid the entries.
      changed: for a contraction, what of the parameter is contracted, where that is not zero wherever the parameter
        is: a mask on it does not make the weight sparse.

    Examples:
      >>> import jax.numpy as jnp, nm_jax as nm
      >>> trace = nm.trace(lambda p, x: x @ (p["w"] + p["d"]), {k: jnp.ones((4, 4)) for k in "wd"}, jnp.ones((2, 4)))
      >>> (use,) = trace["w"].uses
      >>> use.op, use.letters, use.changed
      ('dot', ('i', 'o'), 'its sum with d')
    """

    op: str
    letters: tuple[str, ...] = ()
    groups: int = 1
    flops: int = 0
    count: int = 1
    order: int = -1
    via: str = ""
    changed: str = ""


class Tap(NamedTuple):
    """A contraction whose data operand gives a Gram matrix.

    Attributes:
      view: the parameter, as the operation sees it.
      operand: which operand is data.
      number: the number of its value.
      contracted: what the parameter runs through along every contracted dimension (of a convolution: kernel positions,
        then features).
      batch: the same for every batch dimension that it has (of a convolution: feature groups).
      layout: the contracted and the batch dimensions of the data operand; of a convolution, its dimensions in the order
        (images, features, *space), and nothing.
      windows: of a convolution.
      refusal: why it gives no Gram matrix, or `""`.
    """

    view: View
    operand: int
    number: Hashable
    contracted: tuple[Dim, ...]
    batch: tuple[Dim, ...]
    layout: tuple[tuple[int, ...], tuple[int, ...]]
    windows: Windows | None
    refusal: str


@dataclasses.dataclass
class Site:
    """Where in a jaxpr the taps are: by the index of the equation, its own or those of the jaxprs it evaluates."""

    loop: int | None = None
    taps: dict[int, list[Tap]] = dataclasses.field(default_factory=dict)
    inner: dict[int, list["Site"]] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.taps or self.inner)
