"""MLX and Flax, which store layers in other orders than PyTorch: `format` says so, or a weight called `kernel`."""

import re

from nm_jax.checkpoint.knowledge._contents import Axes, Doubt, Item, any_word
from nm_jax.checkpoint.knowledge.linear import CONV1D

_MLX_CONV = {3: "obi", 4: "obbi", 5: "obbbi"}
_WINDOWS = {3: 1, 4: 2, 5: 3}  # dimensions of a convolution's window, by those of its kernel


def framework(item: Item) -> Axes | Doubt | None:
    """The axes of a tensor of MLX or Flax."""
    if item.leaf == "kernel":
        return _flax(item)
    if item.contents.format == "mlx":
        return _mlx(item)
    if item.leaf == "w" and item.ndim == 2 and (b := item.sibling("b")) is not None and len(b) == 1:
        return _by_bias(item, b[0])
    if item.contents.format == "flax" and item.ndim > 1:
        return Doubt("its name says no layer of Flax that is known")
    return None


def _mlx(item: Item) -> Axes | Doubt | None:
    """Linear layers are (out, in), convolutions of all kinds (out, window, in), experts (expert, out, in)."""
    if item.leaf in ("lora_a", "lora_b") and item.ndim == 2:
        return Axes("io", f"format: mlx, {item.leaf} is (in, out)")
    if item.leaf != "weight":
        return None
    if item.ndim == 2:
        if item.bias not in (None, item.shape[0]):
            return Doubt("its bias does not have as many entries as a linear layer of MLX has outputs")
        known = item.bias is not None or re.fullmatch(CONV1D, item.role)
        return Axes("oi", "format: mlx, a linear layer is (out, in)") if known else None
    convolution = any(word.startswith(("conv", "patch", "downsample")) for word in item.path_words)
    if item.ndim == 3 and {"experts", "switch"} & item.path_words:
        return Axes("boi", "format: mlx, experts are (expert, out, in)")
    if item.ndim in _MLX_CONV and (convolution or item.ndim > 3):
        if item.bias is not None and item.bias != item.shape[0]:
            return Doubt("its bias does not have as many entries as a convolution of MLX has outputs")
        return Axes(_MLX_CONV[item.ndim], "format: mlx, a convolution is (out, window, in)")
    return Doubt("it may be a convolution or a stack of matrices")


def _flax(item: Item) -> Axes | Doubt | None:
    """A kernel ends in (in, out); its bias tells convolutions from attention heads and from layers stacked by scan."""
    bias, shape = item.sibling("bias"), item.shape
    if item.ndim == 2:
        return _flax_matrix(item)
    if item.ndim == 3 and bias is not None and shape[1] != shape[0]:
        if bias == shape[1:]:
            return Axes("ioo", f"siblings: a bias of {bias}, a projection to heads")
        if bias == (shape[0], shape[2]):
            return Axes("bio", f"siblings: a bias of {bias}, layers stacked by scan")
    if item.ndim == 3 and item.role in ("query", "key", "value", "out") and bias is None:
        return _flax_attention(item)
    if re.match("out|o_proj", item.role) and item.ndim == 3 and item.bias == shape[2]:
        return Axes("iio", f"siblings: a bias of {item.bias}, a projection from heads")
    convolution = any(word.startswith(("conv", "downsample", "stem", "patch")) for word in item.words)
    if item.ndim in _WINDOWS and (bias is None or item.bias == shape[-1]):
        window = shape[: _WINDOWS[item.ndim]]
        odd = len(window) == 2 and window[0] % 2 == 1 and window[0] <= 11
        if len(set(window)) == 1 and (odd or (convolution and window[0] <= 32)):
            # Keras stores those as (window, out, in).
            turned = any_word(item.words, "transpose|transposed|deconv") or any(
                w.startswith("convtrans") for w in item.words
            )
            source = f"name: kernel of {item.role} with a window of {window}"
            return Axes("b" * len(window) + "io", source, either=turned)
    return Doubt("its kernel may be a convolution, attention heads or stacked layers")


def _flax_attention(item: Item) -> Axes | Doubt:
    """(in, heads, dim) and (heads, dim, out), or (layer, in, out) for all: what leaves the query enters `out`."""
    start = item.name.removesuffix(f"{item.role}.kernel").removesuffix(f"{item.role}/kernel")
    rest = item.name[len(start) + len(item.role) :]
    query, out = (item.contents.shapes.get(start + name + rest, ()) for name in ("query", "out"))
    if len(query) == len(out) == 3:
        heads = query[1:] == out[:2] and query[0] == out[2]
        stacked = query[0] == out[0] and query[2] == out[1]
        if heads and not stacked:
            return Axes("iio" if item.role == "out" else "ioo", f"siblings: heads of {query} and {out}")
        if stacked and not heads:
            return Axes("bio", f"siblings: stacked layers of {query} and {out}")
    return Doubt("its kernel may be attention heads or stacked layers")


def _by_bias(item: Item, bias: int) -> Axes | Doubt:
    """A matrix that has as many outputs as its bias has entries."""
    if bias not in item.shape:
        return Doubt(f"its bias has {bias} entries, which is neither of its sizes")
    axes = "oi" if bias == item.shape[0] else "io"
    return Axes(axes, f"siblings: a bias of {bias}", either=item.shape[0] == item.shape[1])


def _flax_matrix(item: Item) -> Axes | Doubt:
    if item.bias is not None and item.shape[0] != item.shape[1]:
        return _by_bias(item, item.bias)
    if re.fullmatch(CONV1D, item.role):  # FlaxConv1D of transformers stores (out, in)
        return Axes("io", f"{item.role} is (out, in) in some models of Flax, (in, out) in others", either=True)
    return Axes("io", "name: a kernel of two dimensions is (in, out)")
