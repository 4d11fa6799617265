"""An interpreter of jaxprs that follows every parameter to the operations that use it. It evaluates nothing.

Of every value it knows which parameters it shows (`views`), which it was computed from in ways that hide their entries
(`lost`), and whether it depends on the model's inputs (`data`). A use is where a parameter meets data.
"""

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from nm_jax._model.tracing._jaxpr import Equation, Literal, Opened, branches, called, loop, opened, shape_of
from nm_jax._model.tracing.uses import Site, Tap, Use, Value
from nm_jax._model.tracing.views import Dim, View, extent, gathered, moved, reshaped
from nm_jax._model.tracing.windows import Windows
from nm_jax._model.tracing.zeros import ELEMENTWISE, SUMS, stays_zero


class Walk:
    """One walk through a jaxpr.

    Attributes:
      shapes: of the parameters.
      uses: of every parameter, in the order of the program.
      flops: of all contractions of data, with loops.
      constants: shapes of the constants that data is contracted with: weights that the function closes over.
      first: parameters that are contracted with what was made of the inputs without any contraction with parameters.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], paths: Sequence[str]):
        self.shapes = shapes
        self.paths = paths
        self.first: set[int] = set()
        self.uses: list[list[Use]] = [[] for _ in shapes]
        self.flops = 0
        self.constants: list[tuple[int, ...]] = []
        self._numbers = itertools.count()
        self._loops = itertools.count()
        self._orders = itertools.count()
        self._count = 1
        self._refusal = ""
        self._steps = itertools.count()
        self._contracted: set[int] = set()  # parameters that the operation at hand contracts with data
        self._followed: set[tuple[int, int]] = set()  # contractions that are followed by another one

    def data(self, behind: frozenset[tuple[int, int]] = frozenset()) -> Value:
        """A value that depends on the inputs, of which nothing else is known."""
        return Value(data=True, number=next(self._numbers), behind=behind)

    def last(self, results: Sequence[Value]) -> set[int]:
        """Parameters whose contractions lead to a result without any further contraction with parameters."""
        reached = frozenset[tuple[int, int]]().union(*(value.behind for value in results))
        return {leaf for leaf, _ in reached - self._followed if leaf >= 0}

    def run(self, program: Opened, values: Sequence[Value], loop: int | None = None) -> tuple[list[Value], Site]:
        """The values of the results, and where the taps are. Constants show no parameter."""
        site, jaxpr = Site(loop), program.jaxpr
        known: dict[Any, Value] = dict(zip(jaxpr.invars, values, strict=True))
        known |= {var: _constant(value) for var, value in zip(jaxpr.constvars, program.consts, strict=False)}

        def read(var: Any) -> Value:
            return _constant(var.val) if isinstance(var, Literal) else known.get(var, Value())

        for index, eqn in enumerate(jaxpr.eqns):
            operands = [read(var) for var in eqn.invars]
            results, taps, inner = self._equation(eqn, operands)
            if taps:
                site.taps[index] = taps
            if any(inner):
                site.inner[index] = inner
            known.update(zip(eqn.outvars, results, strict=True))
        return [read(var) for var in jaxpr.outvars], site

    def _equation(self, eqn: Equation, operands: list[Value]) -> tuple[list[Value], list[Tap], list[Site]]:
        name = eqn.primitive.name
        if (inner := called(eqn)) is not None:
            results, site = self.run(inner, operands)
            return results, [], [site]
        structured: dict[str, Callable] = {"scan": self._loop, "while": self._loop, "cond": self._cond}
        if name in structured:
            results, sites = structured[name](eqn, operands)
            return results, [], sites
        if name == "shard_map":
            return self._shard_map(eqn, operands)
        contractions: dict[str, Callable] = {
            "dot_general": self._dot,
            "conv_general_dilated": self._conv,
            "ragged_dot_general": self._ragged_dot,
        }
        if name in contractions:
            self._contracted = set()
            taps = contractions[name](eqn, operands)
            return [self._passed(self._merged(eqn, operands))], taps, []
        return self._move(eqn, operands), [], []

    def _use(self, leaf: int, op: str, **more: Any) -> None:
        self.uses[leaf].append(Use(op, count=self._count, **more))

    def _merged(self, eqn: Equation, operands: Sequence[Value]) -> Value:
        """The value of an operation that shows none of its operands."""
        if any(value.data for value in operands):
            return self.data(frozenset[tuple[int, int]]().union(*(value.behind for value in operands)))
        name = eqn.primitive.name
        shown = {(view.leaf, name) for value in operands for view in value.views}
        return Value(lost=frozenset(shown).union(*(value.blurred for value in operands)))

    def _passed(self, result: Value) -> Value:
        """The result of a contraction, with what was contracted as the last on its way."""
        if not result.data or not self._contracted:
            return result
        if not result.behind:
            self.first |= self._contracted
        self._followed |= result.behind
        step = next(self._steps)
        return result._replace(behind=frozenset((leaf, step) for leaf in self._contracted))

    # ------------------------------------------------------------------------------------- moving and elementwise

    def _move(self, eqn: Equation, operands: list[Value]) -> list[Value]:
        """Operations that contract nothing: they move entries, change them in their places, or hide them."""
        name = eqn.primitive.name
        if name == "optimization_barrier":
            return list(operands)
        if name == "gather" and any(value.data for value in operands):
            return [self._looked_up(eqn, operands)]
        first = operands[0] if operands else Value()
        if len(operands) == 1 and name in _RENUMBERED and (first.data or first.scalar is not None):
            views = (moved(eqn, view, 0) for view in first.views)
            number = (name, str(eqn.params), first.number)
            return [first._replace(views=tuple(view for view in views if view), number=number)]
        results = []
        for k, out in enumerate(eqn.outvars):
            value = self._merged(eqn, operands)
            if followed := [m for v in first.views if (m := moved(eqn, v, k)) is not None]:
                # An index may be data: what it chooses is the parameter's all the same.
                value = self._merged(eqn, [first])._replace(views=tuple(followed))
            else:
                shown = self._in_place(eqn, operands, shape_of(out)) if not value.data or name in _SCALING else ()
                value = value._replace(views=tuple(v for v in shown if not value.data or v.chosen is not None))
            results.append(value)
        if results and results[0].data:
            self._meets_data(eqn, operands)
        return results

    def _in_place(self, eqn: Equation, operands: list[Value], shape: tuple[int, ...]) -> tuple[View, ...]:
        """The views in a result whose entries are those of the operands in the same places."""
        name = eqn.primitive.name
        if name == "concatenate":
            return tuple(view for value in operands for view in value.views)
        if name not in ELEMENTWISE:
            return ()
        pairs = zip(operands, eqn.invars, strict=True)
        shown = [
            view._replace(changed="") if stays_zero(eqn, operands, view) else self._changed(eqn, operands, view)
            for value, var in pairs
            if shape_of(var) == shape
            for view in value.views
        ]
        # A straight-through estimator shows a parameter several times in the same places: that is one view.
        return tuple(dict.fromkeys(shown))

    def _changed(self, eqn: Equation, operands: list[Value], view: View) -> View:
        """A view of a parameter whose zeros do not stay."""
        if view.changed:
            return view
        if eqn.primitive.name not in SUMS:
            return view._replace(changed=f"{eqn.primitive.name} of it")
        leaves = {v.leaf for value in operands for v in value.views}
        leaves |= {leaf for value in operands for leaf, _ in value.blurred}
        others = ", ".join(self.paths[leaf] for leaf in sorted(leaves - {view.leaf}))
        return view._replace(changed=f"its sum with {others or 'something else'}")

    def _looked_up(self, eqn: Equation, operands: list[Value]) -> Value:
        """What an index chooses: data of the same origin, or what was looked up in a parameter, which is data too
        unless it turns out to be a weight."""
        if operands[0].data:
            return self._merged(eqn, operands[:1])
        views = []
        for view in operands[0].views:
            self._use(view.leaf, "gather", order=next(self._orders))
            if (shown := gathered(eqn, view)) is not None:
                views.append(shown._replace(chosen=len(self.uses[view.leaf]) - 1))
        return self.data(frozenset([(-1, next(self._steps))]))._replace(views=tuple(views))

    def _meets_data(self, eqn: Equation, operands: list[Value]) -> None:
        name = eqn.primitive.name
        op = "elementwise" if name in ELEMENTWISE else name
        for value in operands:
            if not value.data:
                for view in value.views:
                    self._use(view.leaf, op)
                for leaf, via in sorted(value.blurred):
                    self._use(leaf, "derived", via=via)

    # ------------------------------------------------------------------------------------------------ contractions

    def _contraction(self, eqn: Equation, operands: list[Value], flops: int) -> int:
        """The order of a contraction, after counting what concerns the whole of it."""
        operands = operands[:2]  # those of a ragged product are followed by the sizes of its groups
        if not any(value.data for value in operands):
            for value in operands:
                for view in value.views:
                    self._use(view.leaf, "params")
            return -1
        self.flops += flops * self._count
        for value, var in zip(operands, eqn.invars, strict=False):
            if not value.data and not value.views:
                if not value.lost:
                    self.constants.append(shape_of(var))
                for leaf, via in sorted(value.lost):
                    self._use(leaf, "opaque", flops=flops, via=via)
                    self._contracted.add(leaf)
            elif not value.data:
                for leaf, via in sorted(value.blurred):
                    self._use(leaf, "derived", via=via)
        return next(self._orders)

    def _letters(self, view: View, assigned: Sequence[str]) -> tuple[str, ...]:
        """What each dimension of a parameter is, from what the dimensions of its view are."""
        found: list[set[str]] = [set() for _ in self.shapes[view.leaf]]
        fixed = [("b", dim) for _, dim in view.fixed]
        for letter, dim in [*zip(assigned, view.dims, strict=True), *fixed]:
            for atom in dim:
                # A dimension of size 1 may have come along with another by a reshape.
                if atom.dim is not None:
                    found[atom.dim].add(letter)
        return tuple("".join(sorted(letters)) or "b" for letters in found)

    def _contracts(self, op: str, view: View, letters: tuple[str, ...], flops: float, order: int, groups: int = 1):
        if any(set(letter) & {"i", "k"} for letter in letters):
            more = {"groups": groups, "flops": round(flops), "order": order, "changed": view.changed}
            self._use(view.leaf, op, letters=letters, **more)
            self._contracted.add(view.leaf)
        else:
            self._use(view.leaf, "scale")

    def _dot(self, eqn: Equation, operands: list[Value]) -> list[Tap]:
        (contract, batch) = eqn.params["dimension_numbers"]
        shapes = [shape_of(var) for var in eqn.invars]
        contracted = math.prod(shapes[0][dim] for dim in contract[0])
        flops = 2 * math.prod(shape_of(eqn.outvars[0])) * contracted
        order = self._contraction(eqn, operands, flops)
        taps = []
        for side, value in enumerate(operands):
            other = operands[1 - side]
            if not other.data:
                continue
            kinds = dict.fromkeys(contract[side], "i") | dict.fromkeys(batch[side], "b")
            assigned = [kinds.get(dim, "o") for dim in range(len(shapes[side]))]
            for view, part in _parts(value, shapes[side]):
                letters = self._letters(view, assigned)
                if view.chosen is not None:
                    if not {"i", "o"} <= set("".join(letters)):
                        continue  # an embedding
                    self.uses[view.leaf][view.chosen] = _A_WEIGHT
                self._contracts("dot", view, letters, flops * part, order)
                taps.append(self._dot_tap(view, 1 - side, other.number, contract, batch, shapes[side]))
        return taps

    def _dot_tap(self, view: View, operand: int, number: Hashable, contract, batch, shape: tuple[int, ...]) -> Tap:
        side = 1 - operand
        pairs = sorted(zip(contract[operand], contract[side], strict=True))
        # Where the parameter is only repeated along a batch dimension, that dimension of the data holds rows.
        owned = [
            (mine, theirs)
            for mine, theirs in zip(batch[operand], batch[side], strict=True)
            if any(atom.dim is not None for atom in view.dims[theirs])
        ]
        inside = [theirs for _, theirs in pairs + owned]
        return Tap(
            view=view,
            operand=operand,
            number=number,
            contracted=tuple(view.dims[theirs] for _, theirs in pairs),
            batch=tuple(view.dims[theirs] for _, theirs in owned),
            layout=(tuple(mine for mine, _ in pairs), tuple(mine for mine, _ in owned)),
            windows=None,
            refusal=self._refuse(view, inside, shape),
        )

    def _refuse(self, view: View, inside: Sequence[int], shape: tuple[int, ...]) -> str:
        """Why a contraction gives no Gram matrix; `inside` are the dimensions that are not outputs."""
        if self._refusal:
            return self._refusal
        if view.dynamic:
            return "an index that is known only at run time chooses a part of it"
        if not all(view.fills(dim, shape[dim]) for dim in inside):
            return "it is concatenated with others along a dimension that is contracted"
        if any(atom.dim is None for dim in inside for atom in view.dims[dim]):
            return "it is repeated along a dimension that is contracted"
        return ""

    def _conv(self, eqn: Equation, operands: list[Value]) -> list[Tap]:
        params, (data, weight) = eqn.params, operands
        spec = params["dimension_numbers"].rhs_spec  # output, input and kernel dimensions
        shape = shape_of(eqn.invars[1])
        flops = 2 * math.prod(shape_of(eqn.outvars[0])) * math.prod(shape[dim] for dim in spec[1:])
        order = self._contraction(eqn, operands, flops)
        if not data.data:
            for view in data.views if weight.data else ():
                self._use(view.leaf, "opaque", flops=flops, via="being the image of a convolution")
            return []
        kinds = {spec[0]: "o", spec[1]: "i"}
        groups = params["feature_group_count"]
        windows = Windows(
            kernel=tuple(shape[dim] for dim in spec[2:]),
            strides=tuple(params["window_strides"]),
            padding=tuple(params["padding"]),
            spread=tuple(params["lhs_dilation"]),
            dilation=tuple(params["rhs_dilation"]),
            groups=groups,
        )
        taps = []
        for view, part in () if weight.data else _parts(weight, shape):
            outputs = view.dims[spec[0]]
            split = _groups(outputs, groups, shape[spec[0]])
            group_dim, output_dim = split or ((), outputs)
            apart = view._replace(dims=(*_replaced(view.dims, spec[0], output_dim), group_dim))
            letters = self._letters(apart, [*(kinds.get(dim, "k") for dim in range(len(shape))), "b"])
            # Outputs of which each feature group has a part are outputs.
            own = tuple("o" if letter == "bo" else letter for letter in letters)
            within = math.prod(a.size for a in group_dim if a.dim is not None and letters[a.dim] == "bo")
            self._contracts("conv", view, own, flops * part, order, groups=within)
            refusal = self._refuse(view, spec[1:], shape)
            if params["batch_group_count"] > 1 or split is None:
                refusal = refusal or "its feature or batch groups do not follow its dimensions"
            taps.append(
                Tap(
                    view=view,
                    operand=0,
                    number=data.number,
                    contracted=tuple(view.dims[dim] for dim in (*spec[2:], spec[1])),
                    batch=(group_dim,) if groups > 1 else (),
                    layout=(tuple(params["dimension_numbers"].lhs_spec), ()),
                    windows=windows,
                    refusal=refusal,
                )
            )
        return taps

    def _ragged_dot(self, eqn: Equation, operands: list[Value]) -> list[Tap]:
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        (contract, batch) = numbers.dot_dimension_numbers
        shape = shape_of(eqn.invars[1])
        flops = 2 * math.prod(shape_of(eqn.outvars[0])) * math.prod(shape[dim] for dim in contract[1])
        order = self._contraction(eqn, operands, flops)
        kinds = dict.fromkeys((*batch[1], *numbers.rhs_group_dimensions), "b") | dict.fromkeys(contract[1], "i")
        letters = [kinds.get(dim, "o") for dim in range(len(shape))]
        for view, part in _parts(operands[1], shape) if operands[0].data and not operands[1].data else ():
            self._contracts("ragged_dot", view, self._letters(view, letters), flops * part, order)
        return []

    # ----------------------------------------------------------------------------------------- loops and branches

    def _loop(self, eqn: Equation, operands: list[Value]) -> tuple[list[Value], list[Site]]:
        if not any(value.data for value in operands):
            return [self._merged(eqn, operands)] * len(eqn.outvars), []
        found = loop(eqn)
        operands = operands[found.skipped :]
        body = found.body.jaxpr
        constants, carry = operands[: found.consts], operands[found.consts : found.consts + found.carry]
        kept = [body.outvars[k] is body.invars[found.consts + k] for k in range(found.carry)]
        carry = [value if same else self._carried(value) for value, same in zip(carry, kept, strict=True)]
        number = next(self._loops)
        each = [
            value._replace(views=tuple(view.iterated(number) for view in value.views))
            for value in operands[found.consts + found.carry :]
        ]
        before = self._count, self._refusal
        self._count *= found.length or 1
        if found.length is None:
            self._refusal = "it is used in a loop of unknown length"
        results, site = self.run(found.body, [self._inside(value) for value in constants + carry + each], number)
        self._count, self._refusal = before
        final = [
            value if same else self.data(value.behind | after.behind)
            for value, after, same in zip(carry, results, kept, strict=False)
        ]
        return [*final, *(self._merged(eqn, [value]) for value in results[found.carry :])], [site]

    def _carried(self, value: Value) -> Value:
        """What changes from one iteration to the next is taken for data."""
        if value.data:
            return self.data(value.behind)
        for view in value.views:
            self._use(view.leaf, "carried")
        return self.data(frozenset([(-1, next(self._steps))]))

    def _inside(self, value: Value) -> Value:
        """A value as a loop or a branch sees it: what it gives a Gram matrix for, it does there."""
        return value._replace(number=next(self._numbers)) if value.data else value

    def _cond(self, eqn: Equation, operands: list[Value]) -> tuple[list[Value], list[Site]]:
        """All branches are followed. (Their FLOPs all count.)"""
        ways = [self.run(b, [self._inside(value) for value in operands[1:]]) for b in branches(eqn)]
        results = [
            self._merged(eqn, [operands[0], *choices]) for choices in zip(*(way[0] for way in ways), strict=True)
        ]
        return results, [site for _, site in ways]

    def _shard_map(self, eqn: Equation, operands: list[Value]) -> tuple[list[Value], list[Tap], list[Site]]:
        """The body works on a part of every array: what dimensions are to each other stays."""
        before = self._count, self._refusal
        self._count *= eqn.params["mesh"].size
        self._refusal = "it is used inside shard_map"
        results, _ = self.run(opened(eqn.params["jaxpr"]), [self._inside(value) for value in operands])
        self._count, self._refusal = before
        return [self._merged(eqn, [value]) for value in results], [], []


def _groups(outputs: Dim, groups: int, size: int) -> tuple[Dim, Dim] | None:
    """The output dimension of a convolution as feature groups and the outputs of one group, if it can be cut so."""
    if groups == 1:
        return (), outputs
    cut = reshaped((outputs,), (groups, size // groups)) if extent(outputs) == size else None
    return None if cut is None else (cut[0], cut[1])


def _parts(value: Value, shape: tuple[int, ...]) -> list[tuple[View, float]]:
    """The views of a value, and how much of it each is: a part of a concatenation, and an equal one of a sum."""
    shares = [min(math.prod(extent(dim) for dim in view.dims) / math.prod(shape), 1) for view in value.views]
    return [(view, share / max(sum(shares), 1)) for view, share in zip(value.views, shares, strict=True)]


def _constant(value: Any) -> Value:
    """A value that the program knows."""
    return Value(scalar=float(value)) if np.ndim(value) == 0 and np.isrealobj(value) else Value()


def _replaced(dims: tuple[Dim, ...], index: int, dim: Dim) -> tuple[Dim, ...]:
    return (*dims[:index], dim, *dims[index + 1 :])


_SCALING = frozenset(("mul", "div", "select_n"))
_A_WEIGHT = Use("")  # in place of a look-up whose result is contracted
# Data that one of these made of one value is the same value again.
_RENUMBERED = frozenset(("convert_element_type", "transpose", "reshape", "squeeze", "broadcast_in_dim", "copy"))
