"""What the name of a leaf, its shape and its siblings say of its axes, where nothing else is known.

Names are those of Flax (`kernel`: inputs first) and PyTorch (`weight`: outputs first). They say little: a `kernel` of
four dimensions is a convolution, a fused projection, or a stack of layers. A bias has the outputs of its layer, and the
layers of a stack: what remains of the kernel is contracted. What still has two readings is a `Doubt`.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from typing import TypeAlias

from nm_jax._core.paths import words
from nm_jax._core.verdicts import Doubt, Known, Stays, Verdict

Shape: TypeAlias = tuple[int, ...]

_LOOKUP = re.compile(
    r"(?i)embed(?!.*proj)|(^|_)(emb|wte|wpe|wtt|lut|vocab|token|tokens|tok|position|positions|pos|codebook|lookup)(_|$)"
    r"|^shared$|relative_attention_bias|rel_pos"
)
_NORM = re.compile(r"(?i)norm|(^|_)(ln|bn|gn)(_|\d|$)")
_CONV = re.compile(r"[cC]onv(s?(?![a-z])|(?i:olution|transpose|layer|block))")
_TRANSPOSED = re.compile(r"(?i)transpose|deconv|upconv|upsampl|(^|_)up(_|\d|$)")
_FLAX_CONV = re.compile(r"^Conv_\d+$")  # Linen's own name for a module that the user did not name
_EINSUM = re.compile(r"(?i)einsum")
_LINEAR = re.compile(
    r"(?i)proj|lin(ear)?(_|\d|$)|fc|dense|head|gate|(^|_)(up|down|ff)(_|\d|$)|ffn|out(put)?(_|$)|logit|classif|^w_?[a-z\d]?$"
    r"|query|key|value|^[qkvo]$|qkv|attn|attention|layer|expert|lora|^l\d|patch|adapter|transform|intermediate|reduction"
)
_QUERY = ("query", "key", "value")
_GPT2 = re.compile(r"^c_(attn|proj|fc|q)$")  # in transformers `weight` is [in, out] and `kernel` is [out, in]
_EVIDENCE = re.compile(r"^(weight_[ih]h(_l\d+(_reverse)?)?|(in|q|k|v)_proj_weight|running_mean|num_batches_tracked)$")
_DOWN = re.compile(r"(?i)down|patch|stem|pool|enc|embed|(^|_)in(it)?(_|\d|$)")
_NEAR = 6  # numbers within which the next layer of a sequence is looked for: activations and norms have theirs
_OUTPUTS_FIRST = r"weight|weight_[ih]h(_l\d+(_reverse)?)?|(in|q|k|v)_proj_weight"


class Siblings:
    """The shapes of the leaves beside each leaf of a tree, and of the modules beside its own."""

    def __init__(self, shapes: Mapping[str, Shape]):
        self._paths = tuple(shapes)
        self._modules: dict[tuple[str, ...], dict[str, Shape]] = {}
        for path, shape in shapes.items():
            *module, name = words(path)
            self._modules.setdefault(tuple(module), {})[name] = shape

    def of(self, path: str) -> Mapping[str, Shape]:
        """The leaves of the module that a leaf belongs to, by their names."""
        return self._modules[tuple(words(path)[:-1])]

    @functools.cached_property
    def orders(self) -> frozenset[str]:
        """How the matrices called `weight` lie: `oi` as in PyTorch, `io` as in JAX, by their biases, by what else only
        PyTorch calls so, and by its dotted names."""
        found = {"oi" for path in self._paths if "." in path or _EVIDENCE.search(words(path)[-1])}
        for module, leaves in self._modules.items():
            shape, bias = leaves.get("weight", ()), leaves.get("bias", ())
            if len(bias) != 1 or len(shape) < 2 or shape[0] == shape[1] or (module and _GPT2.search(module[-1])):
                continue
            if len(shape) > 2:
                found |= {"oi"} if bias == shape[:1] else set()
            else:
                found |= {axes for axes, size in zip(("oi", "io"), shape, strict=True) if bias == (size,)}
        return frozenset(found)

    def takes_columns(self, path: str, shape: Shape) -> bool:
        """Whether a matrix begins a numbered sequence whose next layer takes its columns, as one takes an embedding's,
        and not its rows."""
        *start, number, name = words(path)
        near = [self._modules.get((*start, str(k)), {}) for k in range(int(number) + _NEAR)] if number.isdigit() else []
        matrices = [k for k, leaves in enumerate(near) if len(leaves.get(name, ())) == 2]
        if len(shape) != 2 or len(matrices) < 2 or matrices[0] != int(number):
            return False
        following = near[matrices[1]]
        rows, columns = (following[name][1] == size for size in shape)
        return columns and (not rows or "bias" in following)

    def attention(self, path: str) -> dict[str, Mapping[str, Shape]]:
        """The leaves of `query`, `key`, `value` and `out` in the module that holds the leaf's own."""
        parent = tuple(words(path)[:-2])
        return {name: self._modules.get((*parent, name), {}) for name in (*_QUERY, "out")}


def by_name(path: str, shape: Shape, siblings: Siblings) -> Verdict | None:
    """What the name says; `None` where it is no name of a weight of Flax or PyTorch."""
    *modules, name = words(path)
    label = next((word for word in reversed(modules) if not word.isdigit()), "")
    if name == "embedding" or (name not in ("kernel", "bias") and _LOOKUP.search(name)):
        return Stays(_LOOKED_UP)
    if name in ("scale", "bias"):
        return Stays(f"a {name} is not contracted")
    if name == "kernel":
        return _kernel(label, shape, siblings.of(path).get("bias"), path, siblings)
    if re.fullmatch(_OUTPUTS_FIRST, name):
        bias = siblings.of(path).get(name.replace("weight", "bias"))
        if name != "weight":
            return _weight("", shape, bias, frozenset(("oi",)), numbered=True)
        numbered = words(path)[-2:-1] != [label]
        if numbered and bias is None and siblings.takes_columns(path, shape):
            return Stays("what follows takes its columns: a lookup table? (use nm_jax.plan, or write a rule)")
        return _weight(label, shape, bias, siblings.orders, numbered)
    return None


_LOOKED_UP = "an embedding is looked up, not contracted (give axes to prune it)"


# ------------------------------------------------------------------------------------------ Flax: inputs come first


def _kernel(label: str, shape: Shape, bias: Shape | None, path: str, siblings: Siblings) -> Verdict:
    if len(shape) == 2 and _GPT2.search(label):
        return _gpt2(shape, bias)
    if len(shape) == 2 and _EINSUM.search(label) and (bias is None or shape[0] == shape[1]):
        return Doubt(("io", "oi"), "the equation of an einsum decides")
    if bias is not None and len(shape) > 1:
        return _read(label, shape, bias, path, siblings)
    if len(shape) == 2:
        return Known("io", "the name 'kernel' of Flax")
    conv, windows = "b" * (len(shape) - 2) + "io", shape[:-2]
    if _is_conv(label, windows):
        if shape[-2] > 4 and not _FLAX_CONV.search(label) and _may_be_turned(label, windows):
            return Doubt((conv, conv[:-2] + "oi"), _TURNED)
        return _oriented(label, conv, f"the name {label!r} of a convolution")
    if len(shape) == 3 and (axes := _attention(path, siblings)):
        return Known(axes, "query, key, value and out beside each other")
    projection = label in _QUERY or _OUT.search(label)
    if len(windows) == 2 and not projection and _window(windows, images=shape[-2] <= 4):
        return _oriented(label, conv, f"the window {windows[0]} x {windows[1]} of a convolution")
    return Doubt((_likely(label, shape), conv), "no bias beside it says which dimensions are outputs")


def _gpt2(shape: Shape, bias: Shape | None) -> Verdict:
    """The matrices of GPT-2, which its implementations store in both orders, under both names."""
    fits = [axes for axes, outputs in (("oi", shape[0]), ("io", shape[1])) if bias == (outputs,)]
    if len(fits) == 1:
        return Known(fits[0], f"its bias {bias}")
    return Doubt(("oi", "io"), "GPT-2 and its copies store this matrix in both orders")


def _read(label: str, shape: Shape, bias: Shape, path: str, siblings: Siblings) -> Verdict:
    """A kernel beside its bias."""
    found: list[str] = []
    for stacked, outputs in _stacks(shape, bias):
        inputs = len(shape) - len(stacked) - outputs
        for letters in _inputs(label, [s for k, s in enumerate(shape) if k not in stacked], inputs, outputs):
            found.append(_spread(letters + "o" * outputs, stacked))
    # ConvTranspose(transpose_kernel=True) has its outputs before its inputs.
    even = not _FLAX_CONV.search(label) and _may_be_turned(label, shape[:-2])
    turned = bias == shape[-2:-1] and (bias[0] != shape[-1] or even or bool(_TRANSPOSED.search(label)))
    if turned and (_is_conv(label, shape[:-2]) or (len(shape) > 3 and _window(shape[:-2], named=True))):
        found.append("b" * (len(shape) - 2) + "oi")
    if len(shape) == 2 and not found:  # a recurrent layer may have several biases: (2, out)
        found = ["io"] if bias[-1:] == shape[1:] else ["io", "oi"]
    found = list(dict.fromkeys(found))
    if len(found) > 1 and len(shape) == 3 and (axes := _attention(path, siblings)):
        found = [axes]
    if len(found) == 1:
        return Known(found[0], f"the name 'kernel' of Flax and its bias {bias}")
    if not found:
        return Doubt((_likely(label, shape),), f"its bias {bias} does not fit it")
    return Doubt(tuple(found), f"its bias {bias} fits several ways")


def _stacks(shape: Shape, bias: Shape) -> Iterator[tuple[tuple[int, ...], int]]:
    """(Stacked dimensions, number of outputs) that a kernel and its bias allow: layers are stacked at the front, or
    at the second dimension of every leaf, as MaxText and T5X do."""
    places = [tuple(range(k)) for k in range(len(bias))]
    if len(shape) > 2 and len(bias) > 1:
        places.append((1,))
    for stacked in places:
        if all(k < len(shape) and shape[k] == bias[k] for k in stacked):
            core = [s for k, s in enumerate(shape) if k not in stacked]
            outputs = [s for k, s in enumerate(bias) if k not in stacked]
            if outputs and len(outputs) < len(core) and core[len(core) - len(outputs) :] == outputs:
                yield stacked, len(outputs)


def _inputs(label: str, core: list[int], inputs: int, outputs: int) -> list[str]:
    """What the dimensions before the outputs may be: all contracted, or the window of a convolution and its inputs."""
    dense, conv = "i" * inputs, "b" * (inputs - 1) + "i"
    windows = tuple(core[: inputs - 1])
    if inputs == 1 or outputs > 1 or _OUT.search(label):
        return [dense]
    if _is_conv(label, windows) or (len(windows) > 1 and _window(windows, named=True)):
        return [conv]
    return [dense, conv]


_OUT = re.compile(r"(?i)^(out|o|o_proj|out_proj|output|attention_output|attn_out|proj_out|wo)$")


def _attention(path: str, siblings: Siblings) -> str | None:
    """Axes of a kernel of Flax's attention, where its four projections agree in their heads and nothing else does."""
    name = words(path)[-2] if len(words(path)) > 1 else ""
    found = siblings.attention(path)
    if name not in found or any(len(leaves.get("kernel", ())) != 3 for leaves in found.values()):
        return None
    query, out = found["query"]["kernel"], found["out"]["kernel"]
    if any(found[k]["kernel"][1:] != query[1:] for k in _QUERY) or out[:2] != query[1:]:
        return None
    if len(set(query + out)) == 1:
        return None  # layers as many as features, stacked, would look the same
    return "iio" if name == "out" else "ioo"


def _window(sizes: Shape, named: bool = False, images: bool = False) -> bool:
    """Whether these are the sizes of the window of a convolution. A name or a bias allows more than the sizes alone,
    and an image (few input features) has windows of even sizes."""
    if not sizes:
        return False
    equal, odd, largest = len(set(sizes)) == 1, all(s % 2 for s in sizes), max(sizes)
    if named:
        return largest <= (32 if len(sizes) == 1 else 64) and (equal or odd or min(sizes) == 1)
    return equal and ((odd and largest <= 11) or (images and largest <= 32))


def _is_conv(label: str, windows: Shape) -> bool:
    return bool(_FLAX_CONV.search(label) or (_CONV.search(label) and _window(windows, named=True)))


def _oriented(label: str, axes: str, source: str) -> Verdict:
    """A convolution, unless it is transposed: then its kernel may have inputs and outputs in the other order."""
    if _TRANSPOSED.search(label):
        swapped = axes.translate(str.maketrans("io", "oi"))
        return Doubt((axes, swapped), "a transposed convolution has its inputs and outputs in either order")
    return Known(axes, source)


def _likely(label: str, shape: Shape) -> str:
    """Axes to show in an example."""
    heads = len(shape) - 3
    if heads >= 0 and label in _QUERY:
        return "b" * heads + "ioo"
    return "b" * heads + "iio" if heads >= 0 and _OUT.search(label) else "b" * (len(shape) - 2) + "io"


def _spread(letters: str, stacked: tuple[int, ...]) -> str:
    """The letters of one layer, with `b` where layers are stacked."""
    rest = iter(letters)
    return "".join("b" if k in stacked else next(rest) for k in range(len(letters) + len(stacked)))


# -------------------------------------------------------------------------------------- PyTorch: outputs come first


def _weight(label: str, shape: Shape, bias: Shape | None, orders: frozenset[str], numbered: bool) -> Verdict:
    if (bias is not None and bias == shape) or _NORM.search(label):
        return Stays("the scale of a normalisation is not contracted")
    if len(shape) == 2 and _GPT2.search(label):
        return _gpt2(shape, bias)
    if bias is not None and len(shape) > 1:
        return _read_weight(label, shape, bias, orders)
    if _LOOKUP.search(label):
        return Stays(_LOOKED_UP)
    if len(shape) == 2:
        if shape[0] >= 4096 and shape[0] >= 8 * shape[1] and not _LINEAR.search(label):
            return Stays("it has the sizes of a lookup table, and no bias (use nm_jax.plan, or write a rule)")
        if label and not numbered and not _LINEAR.search(label):
            return Stays("without a bias it may be a linear layer or a lookup table (use nm_jax.plan, or write a rule)")
        return _matrix(orders)
    windows = shape[2:]
    axes = "oi" + "b" * len(windows)
    named = _CONV.search(label) and _window(windows, named=True) and (len(windows) > 1 or 1 < windows[0] < 32)
    images = shape[1] <= 3 or windows[0] == 2
    if named or (len(windows) == 2 and _window(windows, images=images) and shape[1] != windows[0]):
        if shape[1] > 4 and _may_be_turned(label, windows):
            return Doubt((axes, "io" + axes[2:]), _TURNED)
        what = f"name {label!r}" if named else f"window {windows[0]} x {windows[1]}"
        return _oriented(label, axes, f"the {what} of a convolution")
    return Doubt(("b" * (len(shape) - 2) + "oi", axes), "no bias beside it says which dimensions are outputs")


_TURNED = "a window of even sizes may be one of a transposed convolution, whose inputs come first"


def _may_be_turned(label: str, windows: Shape) -> bool:
    """Whether it may be a transposed convolution although its name does not say so: most windows of those are even."""
    return not any(size % 2 for size in windows) and not _DOWN.search(label)


def _matrix(orders: frozenset[str]) -> Verdict:
    """A `weight` that is as PyTorch has it, or as JAX, where its own sizes do not tell: all of a tree are the same."""
    if len(orders) == 1:
        (axes,) = orders
        framework = "PyTorch" if axes == "oi" else "JAX"
        return Known(axes, f"the name 'weight', which lies as in {framework} in the layers beside it")
    why = "layers beside it have both" if orders else "no layer beside it says which"
    return Doubt(("oi", "io"), f"a 'weight' is [out, in] in PyTorch and [in, out] in JAX: {why}")


def _read_weight(label: str, shape: Shape, bias: Shape, orders: frozenset[str]) -> Verdict:
    while len(bias) > 1 and bias[-1] == 1:  # Equinox's convolutions: (out, 1, 1)
        bias = bias[:-1]
    if len(shape) == 2 and shape[0] == shape[1] and bias == shape[:1]:
        return _matrix(orders)
    found = []
    layers = len(bias) - 1  # stacked at the front
    core = shape[layers:]
    if bias and shape[: layers + 1] == bias and len(core) > 1:
        inputs, windows = len(core) - 1, core[2:]
        dense, conv = "i" * inputs, "i" + "b" * (inputs - 1)
        named = _CONV.search(label) or len(windows) > 1
        ways = [dense] if inputs == 1 else [conv] if named and _window(windows, named=True) else [dense, conv]
        found += ["b" * layers + "o" + way for way in ways]
    window = len(shape) > 2 and _window(shape[2:], named=True)
    unsure = not found or (window and (bool(_TRANSPOSED.search(label)) or _may_be_turned(label, shape[2:])))
    if unsure and bias == shape[1:2] and (window or len(shape) == 2):
        found.append("io" + "b" * (len(shape) - 2))
    found = list(dict.fromkeys(found))
    if len(found) == 1:
        return Known(found[0], f"the name 'weight' of PyTorch and its bias {bias}")
    if not found:
        return Doubt(("b" * (len(shape) - 2) + "oi",), f"its bias {bias} does not fit it")
    return Doubt(tuple(found), f"its bias {bias} fits several ways")
