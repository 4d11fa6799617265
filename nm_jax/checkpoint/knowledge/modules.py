"""Parameters that PyTorch's own modules name themselves: attention and recurrent cells."""

import re

from nm_jax.checkpoint.knowledge._contents import Axes, Item

_NAMES = (
    (r"in_proj_weight|[qkv]_proj_weight", "nn.MultiheadAttention"),
    (r"weight_(ih|hh|hr)(_l\d+)?(_reverse)?", "nn.LSTM, nn.GRU or nn.RNN"),
)


def torch_module(item: Item) -> Axes | None:
    """The matrices of `nn.MultiheadAttention` and of recurrent cells are (out, in), all gates one under the other."""
    if item.ndim == 2:
        for regex, module in _NAMES:
            if re.fullmatch(regex, item.leaf):
                return Axes("oi", f"name: {item.leaf} of {module}")
    return None
