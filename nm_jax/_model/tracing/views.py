"""Where the entries of a parameter are inside a value that was made from it by moving entries about.

A *view* tells, for every dimension of a value, which indices of which dimensions of the parameter it runs through.
"""

import math
from typing import NamedTuple

from nm_jax._model.tracing._jaxpr import Equation, Literal, shape_of


class Atom(NamedTuple):
    """A run of indices along one dimension of a parameter: offset, offset + stride, ... (`dim` None: repetition)."""

    dim: int | None
    size: int
    stride: int = 1
    offset: int = 0


Dim = tuple[Atom, ...]  # one dimension of a value: the product of its atoms, the last runs fastest


class View(NamedTuple):
    """A value that is made of the entries of one parameter, as they are or changed in their places (scaled, masked).

    Attributes:
      leaf: which parameter.
      dims: for every dimension of the value, what it runs through.
      fixed: what a dimension of the parameter was fixed to, as (loop, dim): by a loop that goes through it (the number
        of the loop), or by an index (`None`).
      dynamic: whether an index that is only known at run time chose a part.
      changed: what the entries are, where they are not zero wherever the parameter is, or `""`.
      chosen: for a part that an index looked up, which of the uses of the parameter this look-up is.
    """

    leaf: int
    dims: tuple[Dim, ...]
    fixed: tuple[tuple[int | None, Dim], ...] = ()
    dynamic: bool = False
    changed: str = ""
    chosen: int | None = None

    @classmethod
    def of(cls, leaf: int, shape: tuple[int, ...]) -> "View":
        """The whole parameter."""
        return cls(leaf, tuple((Atom(dim, size),) for dim, size in enumerate(shape)))

    def iterated(self, loop: int) -> "View":
        """One step of a loop that goes through the first dimension."""
        return self._replace(dims=self.dims[1:], fixed=(*self.fixed, (loop, self.dims[0])))

    def fills(self, dim: int, size: int) -> bool:
        """Whether the view is all of a dimension of the value (a concatenation has other entries as well)."""
        return extent(self.dims[dim]) == size


def extent(dim: Dim) -> int:
    """Number of indices that a dimension runs through."""
    return math.prod(atom.size for atom in dim)


def reshaped(dims: tuple[Dim, ...], shape: tuple[int, ...]) -> tuple[Dim, ...] | None:
    """What the dimensions run through after a reshape; `None` where an atom would be cut unevenly.

    Atoms of size 1 fit anywhere; they go where a dimension of size 1 is, and otherwise with their neighbours.
    """
    atoms = [atom for dim in dims for atom in dim][::-1]
    out: list[Dim] = []
    for size in shape:
        taken: list[Atom] = []
        missing = size
        while atoms and (missing > 1 or (size == 1 and not taken and atoms[-1].size == 1)):
            atom = atoms.pop()
            if missing % atom.size == 0:
                taken.append(atom)
                missing //= atom.size
            elif atom.size % missing == 0:
                inner = atom.size // missing
                taken.append(Atom(atom.dim, missing, atom.stride * inner, atom.offset))
                atoms.append(Atom(atom.dim, inner, atom.stride, 0))
                missing = 1
            else:
                return None
        if missing > 1:
            return None
        out.append(tuple(taken))
    if any(atom.size > 1 for atom in atoms):
        return None
    if atoms and out:
        out[-1] = (*out[-1], *reversed(atoms))
    return tuple(out)


def sliced(dim: Dim, start: int, stop: int, step: int = 1) -> Dim | None:
    """What `dim[start:stop:step]` runs through; `None` where that is not a product of runs."""
    size = -(-(stop - start) // step)
    if (start, size, step) == (0, extent(dim), 1):
        return dim
    if size < 1:
        return None
    if len(dim) == 1:
        (atom,) = dim
        return (Atom(atom.dim, size, atom.stride * step, atom.offset + atom.stride * start),)
    inner = extent(dim[1:])
    if dim and step == 1 and start % inner == 0 and stop % inner == 0:
        outer = sliced(dim[:1], start // inner, stop // inner)
        return None if outer is None else outer + dim[1:]
    return None


def moved(eqn: Equation, view: View, result: int) -> View | None:
    """The view that a result of an equation is of the parameter that its first operand is a view of; `None` if it is
    none, or not one that can be told."""
    name, params, dims = eqn.primitive.name, eqn.params, view.dims
    if name in _SAME:
        return view
    if name == "transpose":
        return view._replace(dims=tuple(dims[dim] for dim in params["permutation"]))
    if not all(view.fills(dim, size) for dim, size in enumerate(shape_of(eqn.invars[0]))):
        return None  # of a concatenation only the order of the dimensions can be followed further
    if name == "squeeze":
        dropped = {dim % len(dims) for dim in params["dimensions"]}
        fixed = tuple((None, dims[dim]) for dim in sorted(dropped) if dims[dim])
        return view._replace(dims=tuple(d for k, d in enumerate(dims) if k not in dropped), fixed=view.fixed + fixed)
    out = _RULES[name](eqn, params, dims, result) if name in _RULES else None
    if out is None or None in out:
        return None
    return view._replace(dims=tuple(out), dynamic=view.dynamic or _dynamic(eqn))


def gathered(eqn: Equation, view: View) -> View | None:
    """The view of what a gather looks up, where it takes single entries of some dimensions and all of the others:
    `w[index]`."""
    numbers, sizes, whole = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], shape_of(eqn.invars[0])
    batching = numbers.operand_batching_dims
    kept = [dim for dim in range(len(whole)) if dim not in (*numbers.collapsed_slice_dims, *batching)]
    single = [dim for dim in range(len(whole)) if dim not in batching and sizes[dim] != whole[dim]]
    if any(sizes[dim] != 1 for dim in single) or not all(view.fills(k, size) for k, size in enumerate(whole)):
        return None
    sources = dict(zip(numbers.offset_dims, kept, strict=True))
    results = shape_of(eqn.outvars[0])
    indices = [dim for dim in range(len(results)) if dim not in sources]
    sources |= {indices[k]: dim for k, dim in zip(numbers.start_indices_batching_dims, batching, strict=True)}
    found = {k: dim for k, dim in sources.items() if dim not in single}
    dims = tuple(view.dims[found[k]] if k in found else (Atom(None, size),) for k, size in enumerate(results))
    return view._replace(dims=dims, fixed=view.fixed + tuple((None, view.dims[dim]) for dim in single), dynamic=True)


def _reshape(eqn, params, dims, result):
    del result
    order = params["dimensions"] or range(len(dims))
    return reshaped(tuple(dims[dim] for dim in order), shape_of(eqn.outvars[0]))


def _broadcast(eqn, params, dims, result):
    del result
    sources = dict(zip(params["broadcast_dimensions"], range(len(dims)), strict=True))
    out = []
    for dim, size in enumerate(shape_of(eqn.outvars[0])):
        known = dims[sources[dim]] if dim in sources else ()
        out.append(known if extent(known) == size else (*known, Atom(None, size)))
    return out


def _slice(eqn, params, dims, result):
    del result
    strides = params["strides"] or (1,) * len(dims)
    starts, stops = params["start_indices"], params["limit_indices"]
    return [sliced(*dim) for dim in zip(dims, starts, stops, strides, strict=True)]


def _split(eqn, params, dims, result):
    del eqn
    start = int(sum(params["sizes"][:result]))
    cut = sliced(dims[params["axis"]], start, start + int(params["sizes"][result]))
    return [cut if dim == params["axis"] else d for dim, d in enumerate(dims)]


def _dynamic_slice(eqn, params, dims, result):
    del result
    sizes = zip(shape_of(eqn.invars[0]), params["slice_sizes"], strict=True)
    out = []
    for dim, index, (whole, size) in zip(dims, eqn.invars[1:], sizes, strict=True):
        start = min(max(int(index.val), 0), whole - size) if isinstance(index, Literal) else 0
        out.append(sliced(dim, start, start + size))
    return out


def _dynamic(eqn: Equation) -> bool:
    """Whether a slice starts where only run time knows."""
    if eqn.primitive.name != "dynamic_slice":
        return False
    sizes = zip(shape_of(eqn.invars[0]), eqn.params["slice_sizes"], strict=True)
    chosen = [index for index, (whole, size) in zip(eqn.invars[1:], sizes, strict=True) if whole != size]
    return not all(isinstance(index, Literal) for index in chosen)


def _reverse(eqn, params, dims, result):
    del eqn, result

    def reverse(dim: Dim) -> Dim:
        return tuple(Atom(a.dim, a.size, -a.stride, a.offset + a.stride * (a.size - 1)) for a in dim)

    return [reverse(d) if dim in params["dimensions"] else d for dim, d in enumerate(dims)]


_RULES = {
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "split": _split,
    "dynamic_slice": _dynamic_slice,
    "rev": _reverse,
}
# Operations whose result has the entries of their first operand where they were.
_SAME = frozenset().union(
    ("convert_element_type", "reduce_precision", "copy", "copy_p", "device_put", "name", "stop_gradient"),
    ("sharding_constraint", "layout_constraint", "pvary", "mesh_cast", "reshard"),
)
