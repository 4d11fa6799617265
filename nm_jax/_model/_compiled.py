"""What is compiled for a model, kept as long as the function that evaluates it."""

import dataclasses
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
from jaxtyping import Array, PyTree

Arrays: TypeAlias = dict[int, Array | np.ndarray]  # by their position among the leaves
Made = TypeVar("Made")
_Jitted = type(jax.jit(lambda: None))


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A tree of parameters without its arrays.

    Attributes:
      treedef: its structure.
      fixed: (position, type, leaf) of the leaves that are no arrays; 1, 1.0 and True are equal, but of three types.
    """

    treedef: Any
    fixed: tuple[tuple[int, type, Any], ...]

    @classmethod
    def of(cls, params: PyTree) -> "tuple[Skeleton, Arrays]":
        """(the skeleton of a tree, its arrays by their position)."""
        leaves, treedef = jax.tree.flatten(params)
        arrays = {k: leaf for k, leaf in enumerate(leaves) if isinstance(leaf, Array | np.ndarray)}
        return cls(treedef, tuple((k, type(leaf), leaf) for k, leaf in enumerate(leaves) if k not in arrays)), arrays

    def filled(self, arrays: Arrays) -> PyTree:
        """The tree with these arrays."""
        leaves = {**arrays, **{k: leaf for k, _, leaf in self.fixed}}
        return self.treedef.unflatten([leaves[k] for k in range(len(leaves))])


def kept_with_function(make: Callable[..., Made]) -> Callable[..., Made]:
    """`make(function, *more)`, made once for each of these arguments and kept as long as the function lives.

    `make` gets a stand-in that does not keep the function alive. A function is pure, as `jax.jit` asks for too. Nothing
    is kept for the methods of an object whose attributes may change (its class says nothing of equality), and for
    arguments that cannot be hashed.
    """
    kept: dict[int, tuple[weakref.ref, dict]] = {}

    @functools.wraps(make)
    def get(function: Callable, *more: Any) -> Made:
        owner: Any = function
        method = None
        if isinstance(function, types.MethodType):
            owner, method = function.__self__, function.__func__
        compiles = not jax.config.jax_disable_jit  # type: ignore[attr-defined]
        if not compiles or not _is_constant(owner) or not _is_hashable(more):
            return make(function, *more)
        number = id(owner)
        if number not in kept:
            kept[number] = weakref.ref(owner, lambda _: kept.pop(number, None)), {}
        reference, made = kept[number]
        if (method, more) not in made:
            made[method, more] = make(_stand_in(reference, method), *more)
        return made[method, more]

    return get


def _is_constant(owner: Any) -> bool:
    if isinstance(owner, types.FunctionType | functools.partial | _Jitted):
        return True
    kind = type(owner)
    return kind.__hash__ not in (object.__hash__, None) and getattr(kind, "__weakrefoffset__", 0) != 0


def _is_hashable(arguments: tuple) -> bool:
    try:
        hash(arguments)
    except TypeError:
        return False
    return True


def _stand_in(reference: weakref.ref, method: Callable | None) -> Callable:
    def call(*args: Any) -> Any:
        return reference()(*args) if method is None else method(reference(), *args)

    return call


@kept_with_function
def evaluation(apply: Callable, skeleton: Skeleton) -> Callable:
    """`apply(params, *inputs)`, compiled, as a function of the arrays among the parameters and of the inputs."""
    return jax.jit(lambda arrays, *inputs: apply(skeleton.filled(arrays), *inputs))
