"""MLX and Flax, which store layers in other orders than PyTorch: `format` says so, or a weight called `kernel`."""

import re

from nm_jax.checkpoint.knowledge._contents import Axes, Doubt, Item

_MLX_CONV = {3: "obi", 4: "obbi", 5: "obbbi"}
_WINDOWS = {3: 1, 4: 2, 5: 3}  # dimensions of a convolution's window, by those of its kernel


def framework(item: Item) -> Axes | Doubt | None:
    """The axes of a tensor of MLX or Flax."""
    if item.leaf == "kernel":
        return _flax(item)
    if item.contents.format == "mlx":
        return _mlx(item)
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
        if item.bias is None or item.bias == item.shape[0]:
            return Axes("oi", "format: mlx, a linear layer is (out, in)")
        return Doubt("its bias does not have as many entries as a linear layer of MLX has outputs")
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
    if re.match("out|o_proj", item.role) and item.ndim == 3 and item.bias == shape[2]:
        return Axes("iio", f"siblings: a bias of {item.bias}, a projection from heads")
    convolution = any(word.startswith(("conv", "downsample", "stem", "patch")) for word in item.words)
    if item.ndim in _WINDOWS and (bias is None or item.bias == shape[-1]):
        window = shape[: _WINDOWS[item.ndim]]
        odd = len(window) == 2 and window[0] % 2 == 1 and window[0] <= 11
        if len(set(window)) == 1 and (odd or (convolution and window[0] <= 32)):
            return Axes("b" * len(window) + "io", f"name: kernel of {item.role} with a window of {window}")
    return Doubt("its kernel may be a convolution, attention heads or stacked layers")


def _flax_matrix(item: Item) -> Axes | Doubt:
    square = item.shape[0] == item.shape[1]
    if item.bias is not None and not square:
        if item.axes_by_bias is None:
            return Doubt(f"its bias has {item.bias} entries, which is neither of its sizes")
        return Axes(item.axes_by_bias, f"siblings: a bias of {item.bias}")
    if re.fullmatch(r"c_attn|c_fc|c_proj|q_attn", item.role):  # FlaxConv1D of transformers stores (out, in)
        return Axes("io", f"{item.role} is (out, in) in some models of Flax, (in, out) in others", either=True)
    return Axes("io", "name: a kernel of two dimensions is (in, out)")
