"""Tensors that stay dense unless they are asked for: nothing contracts them, or a model suffers most from pruning them.

Each function says why one kind stays dense, or nothing. `kept` asks them in turn.
"""

import re
from typing import NamedTuple

from nm_jax.checkpoint.knowledge._contents import Item, any_word
from nm_jax.checkpoint.knowledge.linear import PATCHES

# Words of modules that are looked up, not contracted. A bias, or a word of a layer beside it, says otherwise.
_TABLE_WORDS = (
    "embs?|embds?|embeds?|embedded|embeddings?|embedder|codebooks?|codes|codewords?|centroids?|vocab|"
    "lookup|tables?|tokens?|queries|positional|positions?|pos|pe|ape|rpe|rel|relative|relpos"
)
_TABLE_NAMES = r"shared|w[tp]e|query_(embed|feat)\w*|(\w+_)?(tokens?|queries)"
_ALWAYS_TABLES = (  # whatever is beside them
    r"(word|position|token_type|tok|segment|token)_embeddings?|embed_tokens|embed_positions|w[tp]e|embedding_table"
)
_LAYER_WORDS = (
    "proj|projs|projections?|projector|project|linear|lin|dense|fc|mlp|ffn|convs?|convd|convolution|map|mapper|mapping|"
    "transform"
)
_BRANCHES = {"mlp", "ffn"}  # an embedding of a branch is one
_ROUTERS = r"(\w+_)?routers?|gate|gating|wg|switch|shared_expert_gate|moe_gate"
_TOKENS = (  # tables whose rows are tokens
    r"(\w*_)?(embed_tokens|(tok|token|word)s?_(embeddings?|embed|emb)|wte|emb_layers)|shared|embeddings?|embed|emb"
)
_HEADS = (
    r"(aux|(?![qkvor]_head)(\w*_)?)(lm_?head|heads?|predictions|classifiers?|score|logits?|unembed|embed_out|"
    r"seq_relationship|qa_outputs?|(class|bbox)_(embed|predictor)|class_labels_classifier|output_layer|cls_score|"
    r"bbox_pred|classification_layer)"
)
_IN_A_HEAD = (  # the last layer of a module that is called a head
    r"(\w+_)?(fc|out_?proj|proj(ection)?|proj_out|linear|out|decoder|classifier|logits|predictor|pred|output|layers)"
)
_AT_THE_ROOT = r"fc|output|decoder|to_out|out|proj_out|last_linear|linear_out|final|final_layer"
_SCALES = ("weight_scale", "weight_scale_inv", "scales", "absmax", "SCB", "weight_zero_point", "qweight", "qzeros")
_REPARAMETRISED = {
    "weight_g": "weight norm",
    "weight_v": "weight or spectral norm",
    "weight_u": "spectral norm",
    "weight_orig": "spectral norm or a mask",
    "original": "a parametrization",
    "original0": "a parametrization",
    "original1": "a parametrization",
}
_LOOKED_UP = "is looked up, not contracted"


class Kept(NamedTuple):
    """Why a tensor stays dense.

    Attributes:
      reason: why.
      layer: whether it is a layer like the others, so that a rule which matches it is enough to prune it.
    """

    reason: str
    layer: bool = False


def kept(item: Item) -> Kept | None:
    """Why a tensor of two and more dimensions stays dense unless it is asked for; `None` if nothing speaks for that."""
    for ask in (_reparametrised, _quantised, _fixed, _norm, looked_up):
        if reason := ask(item):
            return Kept(reason)
    for ask in (_router, _head, _unembedding):
        if reason := ask(item):
            return Kept(reason, layer=True)
    return None


def looked_up(item: Item) -> str:
    """Whether it is a table whose rows are looked up: what it is then, or nothing."""
    if item.leaf in ("embedding", "embeddings", "codebook", "embedding_table"):
        return f"an embedding {_LOOKED_UP}"
    if item.leaf != "weight" or item.ndim != 2 or re.fullmatch(_HEADS, item.role.lower()):
        return ""
    role = item.role.lower()
    if re.fullmatch(_ALWAYS_TABLES, role):
        return f"an embedding {_LOOKED_UP}"
    if item.bias is not None:
        return ""
    if re.fullmatch(PATCHES, role):
        return ""
    if any_word(item.words, _TABLE_WORDS) and not any_word(set(item.words) - _BRANCHES, _LAYER_WORDS):
        return f"{'an embedding' if 'emb' in role else 'a lookup table'} {_LOOKED_UP}"
    return f"a lookup table {_LOOKED_UP}" if re.fullmatch(_TABLE_NAMES, role) else ""


def _reparametrised(item: Item) -> str:
    kind = _REPARAMETRISED.get(item.leaf)
    if kind is None or (item.leaf.startswith("original") and "parametrizations" not in item.parts):
        return ""
    return f"the weight is computed from it ({kind}), so that its zeros would not be the weight's"


def _quantised(item: Item) -> str:
    if item.leaf in (*_SCALES, "biases"):
        return "it belongs to a quantised weight"
    if item.leaf == "weight" and any(item.sibling(leaf) is not None for leaf in _SCALES):
        return "it is quantised: it has scales beside it"
    return ""


def _fixed(item: Item) -> str:
    """The expectation over bins that YOLO writes as a convolution with the weights 0, 1, 2, ..."""
    return "its weights are numbers of bins, and not learned" if "dfl" in item.parts else ""


def _norm(item: Item) -> str:
    named = re.fullmatch(r"(\w*_)?(layer|group|batch|rms)?_?norm\w*|ln(_\w+|\d*)", item.role.lower())
    parent = item.role in ("scale", "shift", "gamma", "beta") and any_word(item.path_words, ".*norm")
    like_its_bias = item.leaf == "weight" and item.sibling("bias") == item.shape
    statistics = item.sibling("running_mean") is not None
    projection = any_word(item.words, _LAYER_WORDS)
    if like_its_bias or statistics or parent or (named and not projection and item.bias is None):
        return "the scale of a norm is multiplied elementwise"
    return ""


def _router(item: Item) -> str:
    if item.ndim != 2 or item.leaf not in ("weight", "kernel"):
        return ""
    last = [part.lower() for part in item.parts[-4:-1]]
    if not any(re.fullmatch(_ROUTERS, part) for part in last):
        return ""
    if not any(re.search("router", part) for part in last):  # a gate that has no experts multiplies
        block = item.name.removesuffix(f"{item.role}.{item.leaf}")
        beside = [name for name in item.contents.shapes if name.startswith(block)]
        stacked = any(len(s) == 3 and s[0] == item.shape[0] for s in map(item.contents.shapes.__getitem__, beside))
        if not any_word(item.path_words, "moe") and not stacked and not any("expert" in name for name in beside):
            return ""
    return "a router chooses experts"


def _head(item: Item) -> str:
    if item.leaf not in ("weight", "kernel") or not item.role:
        return ""
    path = [part.lower() for part in item.parts[:-1]]
    if len(path) == 1 and re.fullmatch(_AT_THE_ROOT, path[0]) and item.ndim == 2 and len(_matrices(item)) > 1:
        return "an output layer"
    head = next((k for k, part in enumerate(path) if re.fullmatch(_HEADS, part) and not part.startswith("conv")), None)
    if head is None or not _last(item):
        return ""
    inside = [part for part in path[head + 1 :] if not part.isdecimal()]
    if any(any_word([part], ".*(attn|attention).*") for part in inside):
        return ""
    if inside and inside[-1] == "layers" and any("out" in part for part in _others(item, head)):
        return ""
    if inside == ["dense"] and path[head] == "predictions" and item.bias is None:
        return "an output head"  # part of MobileBERT's
    last = not inside or re.fullmatch(_IN_A_HEAD, inside[-1]) or re.fullmatch(_HEADS, path[-1])
    return "an output head" if last else ""


def _unembedding(item: Item) -> str:
    """Whether it gives a score to every row of a table of tokens."""
    if item.leaf != "weight" or item.ndim != 2 or item.in_stack or item.shape[0] <= item.shape[1]:
        return ""
    alike = (other for other in item.contents.items.values() if other.shape == item.shape and not other.in_stack)
    tables = (other for other in alike if re.fullmatch(_TOKENS, other.role.lower()) and looked_up(other))
    return "an output head, as long as the table of tokens" if any(other is not item for other in tables) else ""


def _others(item: Item, head: int) -> set[str]:
    """What the module with this number in the path of a tensor is made of."""
    start = ".".join(item.parts[: head + 1]) + "."
    names = (".".join(other.parts) for other in item.contents.items.values())
    return {name.removeprefix(start).partition(".")[0] for name in names if name.startswith(start)}


def _last(item: Item) -> bool:
    """Whether no later layer of the same numbered sequence has a matrix."""
    if len(item.parts) < 2 or not item.parts[-2].isdecimal():
        return True
    sequence = re.escape(item.name.removesuffix(f"{item.parts[-2]}.{item.leaf}"))
    later = (re.fullmatch(rf"{sequence}(\d+)\.{item.leaf}", name) for name in _matrices(item))
    return not any(found and int(found[1]) > int(item.parts[-2]) for found in later)


def _matrices(item: Item) -> list[str]:
    return [name for name, shape in item.contents.shapes.items() if len(shape) >= 2]
