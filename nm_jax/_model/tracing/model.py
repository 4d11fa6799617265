"""How a model uses each of its parameters, read off its jaxpr."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from nm_jax._core.paths import located
from nm_jax._core.rules import KnowsAxes, is_array
from nm_jax._core.tables import aligned, row_of, shape_text
from nm_jax._model.tracing._jaxpr import Opened, opened
from nm_jax._model.tracing.views import View
from nm_jax._model.tracing.walk import Site, Use, Value, Walk

_CONTRACTIONS = ("dot", "conv", "ragged_dot")
# Uses that go together with a contraction: what was made of a parameter changes a weight.
_HARMLESS = ("derived", "params")
_WHY = {
    "gather": "looked up, not contracted",
    "elementwise": "elementwise, not contracted",
    "scale": "it scales, and is not contracted",
    "params": "contracted with other parameters only",
    "carried": "it changes inside a loop",
}


@dataclasses.dataclass(frozen=True)
class LeafTrace:
    """How one parameter is used.

    Attributes:
      path: '/'-joined keys.
      shape: its shape.
      uses: every operation where it meets data, in the order of the program.

    Examples:
      >>> import jax.numpy as jnp, nm_jax as nm
      >>> leaf = nm.trace(lambda p, x: x @ p["w"].T, {"w": jnp.ones((16, 8))}, jnp.ones((2, 8)))["w"]
      >>> leaf.op, leaf.axes, leaf.count, leaf.flops, leaf.reason
      ('dot', 'oi', 1, 512, '')
    """

    path: str
    shape: tuple[int, ...]
    uses: tuple[Use, ...]

    @property
    def contractions(self) -> tuple[Use, ...]:
        """The uses that contract it."""
        return tuple(use for use in self.uses if use.op in _CONTRACTIONS)

    @property
    def kinds(self) -> list[tuple[str, int]]:
        """The different ways in which it is contracted: (one letter per dimension, feature groups)."""
        return list(dict.fromkeys((_contraction(use), use.groups) for use in self.contractions))

    @property
    def doubt(self) -> str:
        """Why its axes cannot be told, or `""`: it is not contracted, or in conflicting ways."""
        ops = list(dict.fromkeys(use.op for use in self.uses))
        if not ops:
            return "the model does not read it"
        if not self.contractions:
            opaque = [use.via for use in self.uses if use.op == "opaque"]
            if opaque:
                return f"its entries cannot be followed through {opaque[0]}"
            if set(ops) <= set(_HARMLESS):
                return _WHY["params"] if "params" in ops else "it changes other weights, and is not contracted itself"
            return "; ".join(_WHY.get(op, f"used by {op}") for op in ops if op not in _HARMLESS)
        others = [op for op in ops if op not in (*_CONTRACTIONS, *_HARMLESS)]
        if len(self.kinds) > 1 or others:
            ways = [f"contracted as {kind}" for kind, _ in self.kinds] + [
                _WHY.get(op, op).split(",")[0] for op in others
            ]
            return f"ambiguous: {' and '.join(ways)}"
        if "?" in self.kinds[0][0]:
            return f"ambiguous: dimension {self.kinds[0][0].index('?')} is contracted in part"
        return ""

    @property
    def contraction(self) -> str | None:
        """One letter per dimension, all that is contracted `i` (a convolution kernel `iiio`); `None` in doubt."""
        return None if self.doubt else self.kinds[0][0]

    @property
    def axes(self) -> str | None:
        """One letter per dimension, how it is grouped (a convolution kernel `bbio`: along the features at one kernel
        position); `None` in doubt."""
        return None if self.doubt else _axes(self.contractions[0])

    @property
    def reason(self) -> str:
        """Why it cannot be N:M sparse whatever its sizes, or `""`."""
        if self.axes is None:
            return self.doubt
        if changed := [use.changed for use in self.contractions if use.changed]:
            return f"what is contracted is {changed[0]}, which is not zero where it is"
        features = [size for size, letter in zip(self.shape, self.axes, strict=True) if letter == "i"]
        if self.op == "conv" and np.prod(features, initial=1) == 1 and ("o" not in self.axes or self.groups > 1):
            return "depthwise: one input feature per group"
        return "" if "o" in self.axes else "it has no output axis"

    @property
    def op(self) -> str:
        """The operations that use it."""
        return "+".join(dict.fromkeys(use.op for use in self.uses if use.op not in _HARMLESS) or {"": 0})

    @property
    def groups(self) -> int:
        """Feature groups of a convolution, otherwise 1."""
        return self.contractions[0].groups if self.contractions else 1

    @property
    def flops(self) -> int:
        """FLOPs of its contractions in one forward pass, an addition and a multiplication counted as two."""
        return sum(use.flops * use.count for use in self.uses)

    @property
    def count(self) -> int:
        """How many times it is used in one forward pass, iterations of loops counted."""
        return sum(use.count for use in self.uses if use.op not in _HARMLESS)

    def cells(self) -> dict[str, str]:
        """The row as it is printed."""
        return {
            "path": self.path,
            "shape": shape_text(self.shape),
            "op": self.op + (f"/{self.groups}" if self.groups > 1 else ""),
            "contracts": self.contraction or "",
            "axes": self.axes or "",
            "uses": str(self.count),
            "MFLOP": f"{self.flops / 1e6:.3g}" if self.flops else "",
            "remark": self.reason,
        }


def _contraction(use: Use) -> str:
    table = {"i": "i", "k": "i", "ik": "i", "o": "o", "b": "b"}
    return "".join(table.get(letters, "?") for letters in use.letters)


def _axes(use: Use) -> str:
    table = {"i": "i", "k": "b", "ik": "i", "o": "o", "b": "b"}
    return "".join(table[letters] for letters in use.letters)


@dataclasses.dataclass(frozen=True)
class Trace(KnowsAxes):
    """How a model uses its parameters: print it, or ask for a leaf by its path.

    Attributes:
      leaves: one per parameter, in the order of `jax.tree.leaves`.
      flops: of all contractions of one forward pass, those without parameters (attention) included.
      constants: shapes of the constants that data is contracted with: weights that `apply` closes over, which are not
        among the parameters; also identity matrices and the like.
      first: paths of the parameters that are contracted with inputs, or with what no other contraction with parameters
        and no look-up made of them: of several inputs, one or more for each.
      last: paths of the parameters whose products reach an output without passing another parameter's contraction: of
        several heads, one or more for each.

    Examples:
      >>> import jax.numpy as jnp, nm_jax as nm
      >>> params = {"body": jnp.ones((8, 8)), "policy": jnp.ones((8, 4)), "value": jnp.ones((8, 1))}
      >>> def forward(p, x):
      ...     hidden = jnp.tanh(x @ p["body"])
      ...     return hidden @ p["policy"], hidden @ p["value"]
      >>> trace = nm.trace(forward, params, jnp.ones((2, 8)))
      >>> trace.first, trace.last, trace["body"].axes
      (('body',), ('policy', 'value'), 'io')
    """

    leaves: tuple[LeafTrace, ...]
    flops: int
    constants: tuple[tuple[int, ...], ...]
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()

    def __getitem__(self, path: str) -> LeafTrace:
        return row_of(self.leaves, path, "among the parameters")

    def known_axes(self) -> dict[str, tuple[str | None, str]]:
        return {leaf.path: (leaf.axes, leaf.reason) for leaf in self.leaves}

    def __str__(self) -> str:
        lines = aligned([leaf.cells() for leaf in self.leaves])
        for shape in self.constants:
            lines.append(f"data is contracted with a constant of shape {shape}, which is not among the parameters")
        return "\n".join(lines)


class Traced(NamedTuple):
    """A model as a jaxpr of (the arrays among the leaves of the parameters, then of the inputs)."""

    program: Opened
    site: Site
    walk: Walk
    paths: list[str]
    shapes: list[tuple[int, ...]]
    arrays: list[int]  # the leaves that are arrays
    last: set[int]  # the leaves whose products reach an output


class Program(NamedTuple):
    """A model as a jaxpr of (the arrays among the leaves of the parameters, then of the inputs)."""

    jaxpr: Opened
    paths: list[str]
    shapes: list[tuple[int, ...]]
    arrays: list[int]  # the leaves that are arrays


def program_of(apply: Callable, params: PyTree, inputs: tuple) -> Program:
    """The jaxpr of a model."""
    nodes, treedef = located(params), jax.tree.structure(params)
    leaves = [node.value for node in nodes]
    arrays = [k for k, leaf in enumerate(leaves) if is_array(leaf)]

    def call(given, inputs):
        filled = list(leaves)
        for k, value in zip(arrays, given, strict=True):
            filled[k] = value
        return apply(jax.tree.unflatten(treedef, filled), *inputs)

    program = opened(jax.make_jaxpr(call)([leaves[k] for k in arrays], inputs))
    shapes = [tuple(leaf.shape) if k in arrays else () for k, leaf in enumerate(leaves)]
    return Program(program, [node.path for node in nodes], shapes, arrays)


def walk_model(apply: Callable, params: PyTree, inputs: tuple) -> Traced:
    """The jaxpr of a model and what its parameters do there."""
    program, paths, shapes, arrays = program_of(apply, params, inputs)
    walk = Walk(shapes, paths)
    values = [Value((View.of(k, shapes[k]),)) if 0 not in shapes[k] else Value() for k in arrays]
    values += [walk.data() for _ in range(len(program.jaxpr.invars) - len(values))]
    results, site = walk.run(program, values)
    walk.uses = [[use for use in uses if use.op] for uses in walk.uses]
    return Traced(program, site, walk, paths, shapes, arrays, walk.last(results))


def trace(apply: Callable, params: PyTree, *inputs: Any) -> Trace:
    """Reads off a model how each parameter is used: which dimensions are contracted, by which operation, how often.

    Args:
      apply: the model's forward pass, `apply(params, *inputs)`; any pure function that jax can trace. Trace the forward
        pass, not its gradient. State that is not a parameter goes in as an input, or is closed over.
      params: parameters, in any container; shapes (`jax.eval_shape`) are enough. Leaves that are not arrays are passed
        on as they are.
      *inputs: the other arguments, arrays or shapes. Python numbers are traced like arrays: close over the static ones.

    Returns:
      A `Trace`: one row per parameter. Axes are followed through casts, transposes, reshapes, slices, concatenation,
      elementwise changes (masks, scales, straight-through estimators), `jit`, `remat`, custom derivatives, `vmap`,
      `cond` (all branches count), `scan` and loops. A parameter that is used in conflicting ways, or whose entries
      cannot be followed, has no axes and a reason; nothing is guessed.

    Evaluates nothing; costs one trace of `apply`. Do not call it inside `jit` or `vmap`: it returns no arrays.

    Examples:
      >>> import jax, jax.numpy as jnp, nm_jax as nm
      >>> params = {"table": jnp.ones((10, 8)), "layers": jnp.ones((3, 8, 8))}
      >>> def forward(p, tokens):  # layers in a scan
      ...     return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), p["table"][tokens], p["layers"])[0]
      >>> trace = nm.trace(forward, params, jnp.arange(4))
      >>> trace["layers"].axes, trace["layers"].count, trace["table"].reason
      ('bio', 3, 'looked up, not contracted')
    """
    traced = walk_model(apply, params, inputs)
    uses = map(tuple, traced.walk.uses)
    leaves = [LeafTrace(*row) for row in zip(traced.paths, traced.shapes, uses, strict=True)]
    first, last = (tuple(traced.paths[k] for k in sorted(ends)) for ends in (traced.walk.first, traced.last))
    return Trace(tuple(leaves), traced.walk.flops, tuple(traced.walk.constants), first, last)
