"""Convolutions of PyTorch, of one to three dimensions: (out, in, window), or (in, out, window) when transposed."""

import re

from nm_jax.checkpoint.knowledge._contents import Axes, Doubt, Item, any_word
from nm_jax.checkpoint.knowledge.linear import MEANINGLESS

_ONE_DIMENSIONAL = (
    "convs?|convd|convolution|pointwise|depthwise|deconv|tconv|convtranspose|downsamplers?|upsamplers?|downsampling|"
    "downsample|upsample|patch|patches|stem"
)
# Words that only transposed convolutions have, that they may have, and that they never have.
_TRANSPOSED = "deconv\\w*|transpose|transposed|convtranspose\\w*|convtr?|tconvs?|transconvs?|transpconvs?"
_TRANSPOSED_IN_SAM = r"(^|\.)mask_decoder\.upscale_conv[12]$"
_UPWARDS = (
    "ups?|upsamplers?|upsampling|upsample|upscale|upscaling|upconv|unpool|unpooling|resize|trans|decoder|generator|gen|"
    "netg|dec"
)
_DOWNWARDS = (
    "down|downsamplers?|downsampling|downsample|subsampling|patch|patches|stem|sr|merging|reduction|encoder|extractor|"
    "features|backbone|downsamp|transition|stages?|levels?|trunk|fuse|classifier"
)
# Words that only ordinary convolutions have, where nothing around them goes upwards.
_CONVOLUTIONS = "\\w*convs?\\w*|cv|projs?|projection|shortcut|squeeze|expand|reduce|fpn|neck|inc|pointwise|lateral|sr"
# Ordinary convolutions in what goes upwards: residual blocks, and what follows an interpolation.
# A word of its own: `features` and `resize` are no residual blocks, a `pyramid` is no middle one.
_BLOCK = r"\w*block\w*|(\w*_)?mid(dle)?\d*(_\w+)?|(\w*_)?res(id\w*|nets?\w*|units?\w*|layers?\w*|convs?\w*|_\w+|\d*)"
_ORDINARY = (
    rf"({_BLOCK})\.(\w+\.)*?(\w*_)?(conv|projection)\w*(\.\d+|\.conv\w*)*|mask_fcn\d*|"
    r"upsample\w*\.(\d+\.)?\w*conv(\.conv)?|resample\.\d+|"
    r"(in|out)_layers\.\d+|(conv|nin)_shortcut\w*(\.conv)?|(\w+_)?conv_(in|out)(\.\w+)*|(post_)?quant_conv|\w*temp_conv\w*(\.\w+)*"
)


def convolution(item: Item) -> Axes | Doubt | None:
    """The axes of a `weight` of three to five dimensions, by its bias, its name and its window."""
    if item.leaf != "weight" or not 3 <= item.ndim <= 5:
        return None
    if item.ndim == 3 and not _is_one_dimensional(item):
        return Doubt("it may be a convolution, a bilinear layer or a stack of matrices")
    if not item.contents.format and not item.contents.model_type and _may_be_mlx(item.shape):
        return Doubt("it may be a convolution of PyTorch (out, in, window) or of MLX (out, window, in)")
    if item.shape[1] == 1:
        return Doubt("each output of a depthwise convolution has one input of its own")
    return _by_bias(item) or _by_name(item)


def _is_one_dimensional(item: Item) -> bool:
    window = item.shape[2]
    if any_word(item.words, "bilinear|biaffine"):
        return False
    stack = window > item.shape[0] and window == item.shape[1]  # one matrix for each relation of a graph
    if not item.contents.models and (stack or (item.bias == window and window % 2 == 0)):
        return False
    if any_word(item.words, _ONE_DIMENSIONAL) or any_word(item.path_words, "convs?|convd|convolution"):
        return True
    small = window == 1 or (window < 32 and 2 * window <= item.shape[1])
    return (item.bias in item.shape[:2] and small) or (window == 1 and any_word(item.words, "projs?|projection|linear"))


def _may_be_mlx(shape: tuple[int, ...]) -> bool:
    """Whether the sizes in the middle look like a window, and those at the end do not look more like one."""
    return len(shape) == 4 and shape[1] == shape[2] <= 16 and (shape[2] != shape[3] or shape[1] > 3)


def _by_bias(item: Item) -> Axes | Doubt | None:
    """A bias tells the number of outputs, and so what is not possible."""
    first, second, bias = *item.shape[:2], item.bias
    if bias is None or (bias == first == second):
        return None
    if bias != first and bias % second:
        return Doubt(f"its bias has {bias} entries, which is neither of its first two sizes")
    if bias != first:
        groups = bias // second
        return Axes(_axes(item, "io"), f"siblings: a bias of {bias}, a transposed convolution of {groups} groups")
    if first % second or _ordinary(item) or not any_word(item.words, _UPWARDS):  # else transposed, in groups?
        return Axes(_axes(item, "oi"), f"siblings: a bias of {bias}")
    return None


def _by_name(item: Item) -> Axes | Doubt:
    if any_word(item.words, _TRANSPOSED) or re.search(_TRANSPOSED_IN_SAM, item.module):
        return Axes(_axes(item, "io"), f"name: {item.role} is a transposed convolution")
    window = item.shape[2:]
    what = "x".join(map(str, window))
    if _ordinary(item) or set(window) == {1} or _says_so(item):
        return Axes(_axes(item, "oi"), f"name: {item.role} with a window of {what}")
    doubt = "a convolution (out, in, window) or a transposed one (in, out, window)"
    return Axes(_axes(item, "io" if _even(item) else "oi"), doubt, either=True)


def _even(item: Item) -> bool:
    """Whether all sizes of its window are even, as those of transposed convolutions often are."""
    return all(size % 2 == 0 for size in item.shape[2:])


def _says_so(item: Item) -> bool:
    """Whether its name is that of an ordinary convolution: transformers' transposed ones are in a table, or go up."""
    downwards, known = any_word(item.path_words, _DOWNWARDS), item.contents.transformers
    if _even(item):
        return downwards and not any_word(item.path_words, _UPWARDS)
    if any_word(item.words if known else item.path_words, _UPWARDS):
        return False
    meaningless = len(item.parts) == 2 and re.fullmatch(MEANINGLESS, item.role)
    return known or downwards or any_word(item.words, _CONVOLUTIONS) or bool(meaningless)


def _ordinary(item: Item) -> bool:
    """Whether its name is one of those that ordinary convolutions have in what goes upwards."""
    return not _even(item) and bool(re.search(rf"(^|\.)({_ORDINARY})$", item.module))


def _axes(item: Item, first: str) -> str:
    return first + "b" * (item.ndim - 2)
