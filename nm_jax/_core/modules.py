"""What the module that holds a leaf says of its axes: its class knows, where the tree still has it.

Equinox's modules are pytrees, and so are Flax NNX's (their `State` is not: it has names alone). Neither library is
imported here: a class is known by its name and the package that it comes from.
"""

import re
from typing import Any

from nm_jax._core.verdicts import Doubt, Known, Stays, Verdict


def by_class(owner: Any, name: str, shape: tuple[int, ...]) -> Verdict | None:
    """What the container of a leaf says of it; `None` where it is no module of Equinox or Flax, or does not know."""
    for base in type(owner).__mro__:
        library = {"equinox.nn": _EQUINOX, "flax.nnx": _NNX}.get(".".join(base.__module__.split(".")[:2]))
        if library is not None and base.__name__ in library:
            return _stacked(library[base.__name__](owner, name), shape, f"the class {base.__name__}")
    return _own(owner, name, shape)


def _own(owner: Any, name: str, shape: tuple[int, ...]) -> Verdict | None:
    """A module of Equinox whose class is the user's: what it calls a weight need not lie like those of the library."""
    kind = type(owner)
    if name != "weight" or not any(b.__module__.split(".")[0] == "equinox" for b in kind.__mro__):
        return None
    if re.search(r"(?i)linear|dense|proj", kind.__name__) and len(shape) == 2:
        return Doubt(("oi", "io"), f"the class {kind.__name__} is not Equinox's own")
    return Stays(f"the class {kind.__name__} does not tell its axes (use nm_jax.plan, or write a rule)")


def _stacked(verdict: Verdict | tuple[tuple[int, ...], str] | None, shape: tuple[int, ...], kind: str):
    """A verdict; or, of the shape and the axes that one module has, those of a stack of them along the first axis."""
    if not isinstance(verdict, tuple):
        return verdict
    core, axes = verdict
    stack = len(shape) - len(core)
    if stack >= 0 and shape[stack:] == core:
        return Known("b" * stack + axes, kind)
    return Doubt(("b" * max(stack, 0) + axes,), f"{kind} has a weight of shape {core}")


# ---------------------------------------------------------------------------------------- class -> (shape, axes)


def _looked_up(owner, name):
    del owner, name
    return Stays("an embedding is looked up, not contracted (give axes to prune it)")


def _norm(owner, name):
    del owner
    return Stays(f"the {name} of a normalisation is not contracted")


def _linear(owner, name):
    sizes = (1 if size == "scalar" else size for size in (owner.out_features, owner.in_features))
    return (tuple(sizes), "oi") if name == "weight" else None


def _conv(owner, name):
    if name != "weight":
        return None
    window = tuple(owner.kernel_size)
    return (owner.out_channels, owner.in_channels // owner.groups, *window), "oi" + "b" * len(window)


def _cell(gates):
    def cell(owner, name):
        sizes = {"weight_ih": owner.input_size, "weight_hh": owner.hidden_size}
        return ((gates * owner.hidden_size, sizes[name]), "oi") if name in sizes else None

    return cell


_EQUINOX = {
    "Linear": _linear,
    "Conv": _conv,
    "ConvTranspose": _conv,
    "GRUCell": _cell(3),
    "LSTMCell": _cell(4),
    "Embedding": _looked_up,
    "LayerNorm": _norm,
    "RMSNorm": _norm,
    "GroupNorm": _norm,
    "BatchNorm": _norm,
}


def _nnx_linear(owner, name):
    return ((owner.in_features, owner.out_features), "io") if name == "kernel" else None


def _nnx_general(owner, name):
    if name != "kernel":
        return None
    if owner.batch_axis:
        return Doubt(("bio",), "it has batch axes")
    inputs, outputs = tuple(owner.in_features), tuple(owner.out_features)
    return (*inputs, *outputs), "i" * len(inputs) + "o" * len(outputs)


def _nnx_conv(owner, name):
    if name != "kernel":
        return None
    window = (owner.kernel_size,) if isinstance(owner.kernel_size, int) else tuple(owner.kernel_size)
    inputs, outputs = owner.in_features // getattr(owner, "feature_group_count", 1), owner.out_features
    if getattr(owner, "transpose_kernel", False):
        return (*window, outputs, inputs), "b" * len(window) + "oi"
    return (*window, inputs, outputs), "b" * len(window) + "io"


def _nnx_einsum(owner, name):
    """`"btd,sdnh->sbtnh"`: what is in both operands and not in the result is contracted."""
    found = re.fullmatch(r"([a-zA-Z.]+),([a-zA-Z]+)->([a-zA-Z.]+)", owner.einsum_str.replace(" ", ""))
    if name != "kernel" or found is None:
        return None
    data, kernel, result = found.groups()
    axes = "".join("i" if k not in result else "b" if k in data else "o" for k in kernel)
    return tuple(owner.kernel_shape), axes


_NNX = {
    "Linear": _nnx_linear,
    "LinearGeneral": _nnx_general,
    "Conv": _nnx_conv,
    "ConvTranspose": _nnx_conv,
    "Einsum": _nnx_einsum,
    "Embed": _looked_up,
    "LayerNorm": _norm,
    "RMSNorm": _norm,
    "GroupNorm": _norm,
    "BatchNorm": _norm,
}
