"""An interpreter of jaxprs that finds which dimensions are the same, and which stay in order. It evaluates nothing.

An operation is followed if permuting the indices of a dimension of its operands, and of the dimension of its results
that is made of it, changes nothing else. What no rule here follows fixes the dimensions that it meets.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import PyTree

from nm_jax._model.channels.parts import Part, cut, fix, joined, product, reshaped, unify
from nm_jax._model.tracing._jaxpr import Equation, Literal, Opened, branches, called, loop, shape_of
from nm_jax._model.tracing.model import program_of
from nm_jax._model.tracing.zeros import ELEMENTWISE

Dims = tuple[Part, ...]
_TWO_WAYS = "{} joins it with what is merged or concatenated in another way"


class Wiring(NamedTuple):
    """What the dimensions of the parameters of a model are made of.

    Attributes:
      paths: of the parameters, in the order of `jax.tree.leaves`.
      dims: of each, its dimensions; of a leaf that is no array, none.
    """

    paths: tuple[str, ...]
    dims: tuple[Dims, ...]


def wiring(apply: Callable, params: PyTree, inputs: tuple) -> Wiring:
    """Which dimensions of the parameters of a model are the same, and which cannot be permuted, read off its jaxpr."""
    program, paths, _, arrays = program_of(apply, params, inputs)
    values = [_fresh(var) for var in program.jaxpr.invars]
    for value in values[len(arrays) :]:
        _fix(value, "it is a dimension of an input of the model")
    for value in _run(program, values):
        _fix(value, "it is a dimension of an output of the model")
    known = dict(zip(arrays, values, strict=False))
    return Wiring(tuple(paths), tuple(known.get(k, ()) for k in range(len(paths))))


def _run(program: Opened, values: Sequence[Dims]) -> list[Dims]:
    jaxpr = program.jaxpr
    known: dict[Any, Dims] = dict(zip(jaxpr.invars, values, strict=True))
    known |= {var: _constant(var, value) for var, value in zip(jaxpr.constvars, program.consts, strict=False)}

    def read(var: Any) -> Dims:
        if isinstance(var, Literal):
            return _constant(var, var.val)
        if var not in known:  # a constant whose value is not given
            known[var] = _fresh(var)
            _fix(known[var], "it meets a constant of the model")
        return known[var]

    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, _equation(eqn, [read(var) for var in eqn.invars]), strict=True))
    return [read(var) for var in jaxpr.outvars]


def _fresh(var: Any) -> Dims:
    return tuple(Part(size) for size in shape_of(var))


def _constant(var: Any, value: Any) -> Dims:
    dims = _fresh(var)
    if dims and not _uniform(value):
        _fix(dims, "it meets a constant of the model")
    return dims


def _uniform(value: Any) -> bool:
    try:
        entries = np.asarray(value).reshape(-1)
        return bool(np.all(entries == entries[:1]))
    except TypeError:  # random keys
        return False


def _fix(dims: Dims, reason: str) -> None:
    for dim in dims:
        fix(dim, reason)


def _same(one: Dims, other: Dims, name: str) -> None:
    for a, b in zip(one, other, strict=True):
        unify(a, b, _TWO_WAYS.format(name))


def _equation(eqn: Equation, operands: list[Dims]) -> list[Dims]:
    name = eqn.primitive.name
    if (inner := called(eqn)) is not None:
        return _run(inner, operands)
    if name in _RULES:
        return _RULES[name](eqn, operands)
    if name in ELEMENTWISE or name in _UNARY:
        return _elementwise(eqn, operands)
    return _unknown(eqn, operands)


def _unknown(eqn: Equation, operands: Sequence[Dims]) -> list[Dims]:
    results = [_fresh(var) for var in eqn.outvars]
    for dims in (*operands, *results):
        _fix(dims, f"it cannot be followed through {eqn.primitive.name}")
    return results


def _elementwise(eqn: Equation, operands: Sequence[Dims]) -> list[Dims]:
    """Operands have the shape of the result, or no dimensions, or 1 where they are repeated."""
    shape = shape_of(eqn.outvars[0])
    out: list[Part | None] = [None] * len(shape)
    for dims in operands:
        if dims and len(dims) != len(shape):
            return _unknown(eqn, operands)
        for k, part in enumerate(dims):
            known = out[k]
            if part.size != shape[k]:
                if part.size != 1:
                    return _unknown(eqn, operands)
            elif known is None:
                out[k] = part
            else:
                unify(known, part, _TWO_WAYS.format(eqn.primitive.name))
    found = tuple(Part(size) if part is None else part for part, size in zip(out, shape, strict=True))
    return [found] * len(eqn.outvars)


def _each(eqn: Equation, operands: Sequence[Dims]) -> list[Dims]:
    del eqn
    return list(operands)


def _reduction(eqn: Equation, operands: Sequence[Dims]) -> list[Dims]:
    axes = eqn.params["axes"]
    if eqn.primitive.name.startswith("arg"):
        _fix(tuple(operands[0][dim] for dim in axes), "its largest entry is asked for by its index")
    return [tuple(dim for k, dim in enumerate(operands[0]) if k not in axes)]


def _along(eqn: Equation, operands: Sequence[Dims]) -> list[Dims]:
    """Operations that go through one dimension in its order."""
    dim = eqn.params["axis"] if "axis" in eqn.params else eqn.params["dimension"]
    for dims in operands:
        fix(dims[dim], f"{eqn.primitive.name} goes through it in order")
        _same(operands[0], dims, eqn.primitive.name)
    return [operands[0]] * len(eqn.outvars)


def _top_k(eqn: Equation, operands: Sequence[Dims]) -> list[Dims]:
    out = list(operands[0])
    axis = eqn.params.get("axis", -1)
    fix(out[axis], "top_k asks for its indices")
    out[axis] = Part(shape_of(eqn.outvars[0])[axis], "top_k sorts it")
    return [tuple(out)] * len(eqn.outvars)


def _transpose(eqn: Equation, operands: Sequence[Dims]) -> list[Dims]:
    return [tuple(operands[0][dim] for dim in eqn.params["permutation"])]


def _squeeze(eqn: Equation, operands: Sequence[Dims]) -> list[Dims]:
    dropped = {dim % len(operands[0]) for dim in eqn.params["dimensions"]}
    return [tuple(dim for k, dim in enumerate(operands[0]) if k not in dropped)]


def _reshape(eqn: Equation, operands: Sequence[Dims]) -> list[Dims]:
    found = reshaped(operands[0], shape_of(eqn.outvars[0])) if eqn.params["dimensions"] is None else None
    return _unknown(eqn, operands) if found is None else [tuple(found)]


def _broadcast(eqn: Equation, operands: Sequence[Dims]) -> list[Dims]:
    out = list(_fresh(eqn.outvars[0]))
    for dim, part in zip(eqn.params["broadcast_dimensions"], operands[0], strict=False):
        if out[dim].size == part.size:
            out[dim] = part
    return [tuple(out)]


def _section(part: Part, start: int, stop: int, reason: str) -> Part:
    """Some consecutive indices of a part."""
    two = cut(part, stop)
    three = two and cut(two[0], start)
    if three is None:
        fix(part, reason)
        return Part(stop - start, reason)
    return three[1]


def _slice(eqn: Equation, operands: Sequence[Dims]) -> list[Dims]:
    params, out = eqn.params, []
    strides = params["strides"] or (1,) * len(operands[0])
    for part, start, stop, stride in zip(
        operands[0], params["start_indices"], params["limit_indices"], strides, strict=True
    ):
        if stride == 1:
            out.append(_section(part, start, stop, "a slice cuts through what is merged in it"))
        else:
            fix(part, "a slice takes every so many of it")
            out.append(Part(-(-(stop - start) // stride), "a slice takes every so many of it"))
    return [tuple(out)]


def _split(eqn: Equation, operands: Sequence[Dims]) -> list[Dims]:
    axis, sizes = eqn.params["axis"], [int(size) for size in eqn.params["sizes"]]
    ends = np.cumsum([0, *sizes])
    results = []
    for start, stop in itertools.pairwise(ends):
        piece = _section(operands[0][axis], int(start), int(stop), "split cuts through what is merged in it")
        results.append((*operands[0][:axis], piece, *operands[0][axis + 1 :]))
    return results


def _concatenate(eqn: Equation, operands: Sequence[Dims]) -> list[Dims]:
    axis = eqn.params["dimension"]
    for dims in operands[1:]:
        for k, (a, b) in enumerate(zip(operands[0], dims, strict=True)):
            if k != axis:
                unify(a, b, _TWO_WAYS.format("concatenate"))
    whole = joined(dims[axis] for dims in operands)
    return [(*operands[0][:axis], whole, *operands[0][axis + 1 :])]


def _pad(eqn: Equation, operands: Sequence[Dims]) -> list[Dims]:
    out = []
    sizes = shape_of(eqn.outvars[0])
    for part, size, (low, high, inside) in zip(operands[0], sizes, eqn.params["padding_config"], strict=True):
        if inside or min(low, high) < 0:
            fix(part, "pad spreads or crops it")
            out.append(Part(size, "pad spreads or crops it"))
        else:
            out.append(joined([Part(int(low)), part, Part(int(high))]))  # of NumPy for some
    return [tuple(out)]


def _reverse(eqn: Equation, operands: Sequence[Dims]) -> list[Dims]:
    for dim in eqn.params["dimensions"]:
        fix(operands[0][dim], "rev reverses it")
    return [operands[0]]


def _iota(eqn: Equation, operands: Sequence[Dims]) -> list[Dims]:
    del operands
    dims = _fresh(eqn.outvars[0])
    fix(dims[eqn.params["dimension"]], "it meets its own indices")
    return [dims]


def _dynamic_slice(eqn: Equation, operands: Sequence[Dims]) -> list[Dims]:
    out = []
    for part, size in zip(operands[0], eqn.params["slice_sizes"], strict=True):
        if size != part.size:
            fix(part, "an index chooses a part of it")
            part = Part(size, "an index chooses it")
        out.append(part)
    return [tuple(out)]


def _dynamic_update_slice(eqn: Equation, operands: Sequence[Dims]) -> list[Dims]:
    del eqn
    for whole, part in zip(operands[0], operands[1], strict=True):
        if whole.size == part.size:
            unify(whole, part, _TWO_WAYS.format("an update"))
        else:
            fix(whole, "an index chooses a part of it")
            fix(part, "an index chooses where it goes")
    return [operands[0]]


def _gather(eqn: Equation, operands: Sequence[Dims]) -> list[Dims]:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    values, indices = operands
    batching = numbers.operand_batching_dims
    kept = [dim for dim in range(len(values)) if dim not in (*numbers.collapsed_slice_dims, *batching)]
    fix(indices[-1], "it chooses what is looked up")
    out = list(_fresh(eqn.outvars[0]))
    for dim, part in enumerate(values):
        if dim not in batching and sizes[dim] != part.size:
            fix(part, "it is looked up by its indices")
    for dim, source in zip(numbers.offset_dims, kept, strict=True):
        if sizes[source] == values[source].size:
            out[dim] = values[source]
        else:
            fix(out[dim], "it is looked up")
    outer = iter(k for k in range(len(out)) if k not in numbers.offset_dims)
    for dim, part in enumerate(indices[:-1]):
        out[next(outer)] = part
        if dim in numbers.start_indices_batching_dims:
            source = batching[numbers.start_indices_batching_dims.index(dim)]
            unify(part, values[source], _TWO_WAYS.format("gather"))
    return [tuple(out)]


def _dot(eqn: Equation, operands: Sequence[Dims]) -> list[Dims]:
    contract, batch = eqn.params["dimension_numbers"]
    left, right = operands
    for a, b in (*zip(*contract, strict=True), *zip(*batch, strict=True)):
        unify(left[a], right[b], _TWO_WAYS.format("a product"))
    free = [
        [part for k, part in enumerate(dims) if k not in (*contract[side], *batch[side])]
        for side, dims in enumerate(operands)
    ]
    return [(*(left[dim] for dim in batch[0]), *free[0], *free[1])]


def _conv(eqn: Equation, operands: Sequence[Dims]) -> list[Dims]:
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    if eqn.params["batch_group_count"] > 1:
        return _unknown(eqn, operands)
    images, kernel = operands
    batch, features, *space = numbers.lhs_spec
    outputs, inputs, *window = numbers.rhs_spec
    for part in (*(images[dim] for dim in space), *(kernel[dim] for dim in window)):
        fix(part, "it is a position of a convolution")
    out = [Part(size, "it is a position of a convolution") for size in shape_of(eqn.outvars[0])]
    why = _TWO_WAYS.format("a convolution")
    apart = Part(groups)
    unify(images[features], product([apart, kernel[inputs]]), why)
    unify(kernel[outputs], product([apart, Part(kernel[outputs].size // groups)]), why)
    out[numbers.out_spec[0]], out[numbers.out_spec[1]] = images[batch], kernel[outputs]
    return [tuple(out)]


def _windows(eqn: Equation, operands: Sequence[Dims]) -> list[Dims]:
    params = eqn.params
    count = len(operands[0])
    ones = (1,) * count
    out = list(_fresh(eqn.outvars[0]))
    for dim in range(count):
        each = [params.get(key) or ones for key in ("window_strides", "base_dilation", "window_dilation")]
        alone = params["window_dimensions"][dim] == 1 and tuple(params["padding"][dim]) == (0, 0)
        if alone and all(one[dim] == 1 for one in each):
            out[dim] = operands[0][dim]
        else:
            fix(operands[0][dim], "it is a position of a window")
            fix(out[dim], "it is a position of a window")
    return [tuple(out)]


def _scan(eqn: Equation, operands: list[Dims]) -> list[Dims]:
    found = loop(eqn)
    carried = operands[found.consts : found.consts + found.carry]
    through = operands[found.consts + found.carry :]
    for dims in through:
        fix(dims[0], "a loop goes through it in order")
    results = _run(found.body, [*operands[: found.consts], *carried, *(dims[1:] for dims in through)])
    for before, after in zip(carried, results, strict=False):
        _same(before, after, "a loop")
    stacked = [Part(found.length or 0, "a loop goes through it in order") for _ in results[found.carry :]]
    return [*carried, *((first, *dims) for first, dims in zip(stacked, results[found.carry :], strict=True))]


def _cond(eqn: Equation, operands: list[Dims]) -> list[Dims]:
    ways = [_run(branch, operands[1:]) for branch in branches(eqn)]
    _fix(operands[0], "it chooses a branch")
    for way in ways[1:]:
        for one, other in zip(ways[0], way, strict=True):
            _same(one, other, "cond")
    return ways[0]


_UNARY = frozenset().union(
    ("convert_element_type", "reduce_precision", "copy", "copy_p", "device_put", "name", "stop_gradient"),
    (
        "sharding_constraint",
        "layout_constraint",
        "pvary",
        "mesh_cast",
        "reshard",
        "exp2",
        "erfc",
        "conj",
        "population_count",
    ),
)
_RULES: dict[str, Callable[[Equation, list[Dims]], list[Dims]]] = (
    dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"), _reduction)
    | dict.fromkeys(("argmax", "argmin"), _reduction)
    | dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort"), _along)
    | dict.fromkeys(("reduce_window_max", "reduce_window_min", "reduce_window_sum"), _windows)
    | {
        "optimization_barrier": _each,
        "top_k": _top_k,
        "transpose": _transpose,
        "squeeze": _squeeze,
        "reshape": _reshape,
        "broadcast_in_dim": _broadcast,
        "slice": _slice,
        "split": _split,
        "concatenate": _concatenate,
        "pad": _pad,
        "rev": _reverse,
        "iota": _iota,
        "dynamic_slice": _dynamic_slice,
        "dynamic_update_slice": _dynamic_update_slice,
        "scatter": _unknown,
        "gather": _gather,
        "dot_general": _dot,
        "conv_general_dilated": _conv,
        "scan": _scan,
        "cond": _cond,
    }
)
