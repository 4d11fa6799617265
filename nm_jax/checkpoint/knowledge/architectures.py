"""Architectures whose layers are not stored as their names would have it, and `config.json` names: one table.

To add one: a line of `TABLE`.
"""

import dataclasses
import fnmatch
import re

from nm_jax.checkpoint.knowledge._contents import Axes, Doubt, Item
from nm_jax.checkpoint.knowledge.linear import conv1d_orientations

LOOKUP = "lookup"  # in place of axes: a table


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What the tensors of some models of transformers are.

    Attributes:
      model_types: values of `model_type` in `config.json`; `*` stands for any text.
      names: regex for the end of a tensor's dotted name.
      axes: its axes.
      module: the module that says so.
    """

    model_types: tuple[str, ...]
    names: str
    axes: str
    module: str


_CONV1D = r"(c_attn|c_proj|c_fc|q_attn|c_enc_kv)\.weight"
_CONV, _TRANSPOSED_1D, _TRANSPOSED_2D = "nn.Conv2d", "nn.ConvTranspose1d", "nn.ConvTranspose2d"
TABLE = (
    Architecture(("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "jukebox*"), _CONV1D, "io", "Conv1D"),
    Architecture(("gpt_bigcode", "gpt_neo", "starcoder2", "qwen"), _CONV1D, "oi", "nn.Linear"),
    Architecture(("ctrl",), r"transformer\.w\.weight", LOOKUP, "nn.Embedding"),
    Architecture(("xlnet",), r"rel_attn\.[qkvr]", "ioo", "XLNetRelativeAttention"),
    Architecture(("xlnet",), r"rel_attn\.o", "oii", "XLNetRelativeAttention"),
    Architecture(("mobilebert",), r"predictions\.dense\.weight", "io", "MobileBertLMPredictionHead"),
    Architecture(("sam*", "edgetam*"), r"upscale_conv[12]\.weight", "iobb", _TRANSPOSED_2D),
    Architecture(("beit", "data2vec-vision"), r"(fpn1\.[03]|fpn2\.0)\.weight", "iobb", _TRANSPOSED_2D),
    Architecture(
        ("dpt", "*depth_anything", "zoedepth", "chmv2"), r"layers\.[01]\.resize\.weight", "iobb", _TRANSPOSED_2D
    ),
    Architecture(("dpt", "*depth_anything", "zoedepth", "chmv2"), r"layers\.3\.resize\.weight", "oibb", _CONV),
    Architecture(("canine",), r"chars_to_molecules\.conv\.weight", "oib", "nn.Conv1d"),
    Architecture(("got_ocr2",), r"conv_upsampler[12]\.weight", "oibb", _CONV),
    Architecture(("vits", "speecht5*", "fastspeech2*", "seamless*"), r"upsampler\.\d+\.weight", "iob", _TRANSPOSED_1D),
)


def architecture(item: Item) -> Axes | Doubt | None:
    """What the table says of a tensor of PyTorch code of transformers."""
    if not item.contents.transformers:
        return None
    for known in TABLE:
        this = any(fnmatch.fnmatchcase(item.contents.model_type, name) for name in known.model_types)
        if this and re.search(rf"(^|\.)({known.names})$", ".".join(item.parts)):
            return _checked(item, known.axes, f"config: {item.contents.model_type}, {known.module}")
    return None


def is_lookup(item: Item) -> bool:
    """Whether the table says that it is looked up."""
    return isinstance(found := architecture(item), Axes) and found.axes == LOOKUP


def _checked(item: Item, axes: str, source: str) -> Axes | Doubt | None:
    if axes == LOOKUP:
        return Axes(axes, source)
    if len(axes) != item.ndim:
        return None
    if item.ndim == 2 and conv1d_orientations(item.contents) - {axes}:
        return Doubt(f"{source} has {axes}, but the biases or sizes of this checkpoint say otherwise")
    outputs = {size for size, letter in zip(item.shape, axes, strict=True) if letter == "o"}
    if item.ndim == 2 and item.bias is not None and item.bias not in outputs:
        return Doubt(f"{source} has {axes}, but a bias of {item.bias} says otherwise")
    return Axes(axes, source)
