"""The `weight` of two dimensions of a PyTorch layer: (out, in) of `nn.Linear`, (in, out) of GPT-2's `Conv1D`."""

import re

from nm_jax.checkpoint.knowledge._contents import Axes, Contents, Doubt, Item, any_word

# Words of names that only linear layers have, which are (out, in), and whole names.
_WORDS = (
    "projs?|projections?|projector|project|linear|lin|dense|fcs?|qkv|kv|qk|wqkv|query|key|value|"
    "receptance|reduction|intermediate|output|expansion|adapter|lora|transform|mapper|mapping|attn|"
    "attention|heads?|classifiers?|score|logits|unembed|router|gate|gating"
)
_BRANCHES = "mlps?|ffn|ff|feedforward|layers?|net"  # what holds linear layers
_NAMES = r"w_?(q|k|v|o|i|qkv|pack|kv|q_a|q_b|up|down|gate)|w\d|wi_\d|to_\w+|up|down|gate|(\w+_)?(in|out)"
_BESIDE_THE_TABLE = r"(^|\.)predictions\.dense$"
_NEAR = 6  # numbers within which the next layer of a sequence is looked for: activations and norms have theirs
MEANINGLESS = r"[abcxy]|l\d+"  # names of modules in no other
_IN_ATTENTION = r"[qkvorg]|query|key|value"
PATCHES = r"(\w+_)?patch(es)?_(embed\w*|projection)|patchifier|patchify|encoder_to_decoder"
# Layers that are `nn.Linear` in one model and `Conv1D` in another. The first ones widen, in either.
_WIDENING, CONV1D = r"c_attn|c_fc|c_enc_kv", r"c_attn|c_fc|c_proj|q_attn|c_enc_kv"


def linear(item: Item) -> Axes | Doubt | None:
    """The axes of a `weight` with two dimensions, by its bias, its name, or the model that it is part of."""
    if item.leaf != "weight" or item.ndim != 2:
        return None
    if item.bias is not None and item.shape[0] != item.shape[1]:
        if item.axes_by_bias is None:
            return Doubt(f"its bias has {item.bias} entries, which is neither of its sizes")
        return Axes(item.axes_by_bias, f"siblings: a bias of {item.bias}")
    if re.fullmatch(CONV1D, item.role):
        return _by_the_others(item)
    if not item.contents.models and any_word(item.words, "g?conv|gcn|gat|sage"):
        if item.bias is None:
            return Doubt("a matrix of a layer that calls itself a convolution")
        return Axes("oi", "a layer of a graph, (out, in) or (in, out)", either=True)
    others = {axes for role, axes in item.contents.axes_by_bias if not re.fullmatch(rf"{CONV1D}|\w*conv\w*", role)}
    if "io" in others and not item.contents.models:
        return Axes("oi", f"{item.role} beside layers whose biases say that they are (in, out)", either=True)
    if item.bias is None and re.search(_BESIDE_THE_TABLE, item.module):
        return Axes("oi", "MobileBERT takes this matrix as it is stored, other models its transpose", either=True)
    if item.bias is None and (doubt := _may_be_a_table(item)):
        return Doubt(doubt)
    if _is_named(item):
        return Axes("oi", f"name: {item.role} is a linear layer")
    if item.bias is None:
        if item.contents.models and (item.in_stack or any_word(item.words, "conv")):
            return Axes("oi", f"config: {item.contents.model_type}, a layer of its blocks")
        return Doubt("without a bias it may be a linear layer or a lookup table")
    if item.contents.models:
        return Axes("oi", f"config: {item.contents.model_type}, a layer with a bias")
    if {axes for _, axes in item.contents.axes_by_bias} == {"oi"}:
        return Axes("oi", "siblings: the biases of this checkpoint's other layers")
    return Axes("oi", "a square matrix, (out, in) or (in, out)", either=True)


def _may_be_a_table(item: Item) -> str:
    """Whether a matrix without a bias that is called like a branch of a model may be its table: why, or nothing.

    A branch is no layer: `mlp.0` is one of its layers, `user_mlp` may be the table of users of that branch. The first
    of a numbered sequence is a table where the next layer takes its columns.
    """
    if item.contents.models:
        return ""
    unclear = "without a bias it may be a linear layer or a lookup table"
    number = item.parts[-2] if len(item.parts) > 1 else ""
    if not number.isdecimal():
        branch = any_word(item.words, _BRANCHES) and not any_word(item.words, _WORDS)
        return unclear if branch and not item.in_stack else ""
    tail = item.name[-len(item.leaf) - 1 :]
    start = item.name.removesuffix(number + tail)
    around = [(k, item.contents.items.get(f"{start}{k}{tail}")) for k in range(int(number) + _NEAR)]
    matrices = [(k, layer) for k, layer in around if layer is not None and layer.ndim == 2]
    later = [layer for k, layer in matrices if k > int(number)]
    if not later or int(number) > matrices[0][0]:
        return ""
    rows, columns = (later[0].shape[1] == size for size in item.shape)
    taken = columns and (not rows or later[0].bias is not None)
    return "what follows takes its columns, so that it may be a lookup table" if taken else ""


def _is_named(item: Item) -> bool:
    """Whether its name says that it is a linear layer."""
    if len(item.parts) == 2 and re.fullmatch(MEANINGLESS, item.role):
        return True
    if re.fullmatch(_IN_ATTENTION, item.role):  # a `query` outside may be a table of queries
        layer = bool(item.contents.models) and (item.in_stack or item.bias is not None)
        return layer or any_word(item.path_words, r"\w*attn|\w*attention|att|ffn?|feed|forward|self")
    return bool(re.fullmatch(f"{_NAMES}|{PATCHES}", item.role.lower())) or any_word(item.words, f"{_WORDS}|{_BRANCHES}")


def conv1d_orientations(contents: Contents, role: str = "") -> set[str]:
    """How the layers that may be GPT-2's `Conv1D` are stored, by their biases, or by what widens where none tells."""
    names = re.escape(role) if role else CONV1D
    found = {axes for other, axes in contents.axes_by_bias if re.fullmatch(names, other)}
    return found or {
        "oi" if item.shape[0] > item.shape[1] else "io"
        for item in contents.items.values()
        if item.leaf == "weight" and item.ndim == 2 and item.shape[0] != item.shape[1]
        if re.fullmatch(_WIDENING, item.role) and re.fullmatch(names, item.role)
    }


def _by_the_others(item: Item) -> Axes:
    """All layers of these names in one model are stored the same way."""
    found = conv1d_orientations(item.contents, item.role) or conv1d_orientations(item.contents)
    if len(found) == 1:
        return Axes(next(iter(found)), f"siblings: the other layers called {item.role} or like it")
    return Axes("oi", f"{item.role} is (out, in) in some models, (in, out) in others", either=True)
