"""Experts stacked in one tensor: (expert, in, out) or (expert, out, in), which their sizes tell together."""

import re

from nm_jax.checkpoint.knowledge._contents import Axes, Doubt, Item

# What enters an expert and what leaves it, and how many matrices the first has side by side (gate and up).
_PAIRS = (
    ("gate_up_proj", "down_proj", 2),
    ("gate_and_up_proj", "down_proj", 2),
    ("input_linear", "output_linear", 2),
    ("w13", "w2", 2),
    ("fc1", "fc2", 2),
)
_SINGLE = r"(gate_proj|up_proj|down_proj|w1|w2|w3|v1|wi(_\d)?|wo|fc1|fc2|up|down|gate)(\.weight)?"
_ROUTERS = ("router.weight", "router.layer.weight", "gate.weight", "router.proj.weight")


def experts(item: Item) -> Axes | Doubt | None:
    """The axes of a stack of experts with three dimensions, by its bias or by the sizes of its partner."""
    tail = item.leaf if item.leaf != "weight" else f"{item.parts[-2]}.weight" if len(item.parts) > 1 else ""
    if item.ndim != 3 or not tail or not item.name.endswith(tail):
        return None
    start, suffix = item.name[: len(item.name) - len(tail)], ".weight" if item.leaf == "weight" else ""
    name = tail.removesuffix(suffix)
    for entering, leaving, fused in _PAIRS:
        first, second = (item.contents.shapes.get(start + part + suffix) for part in (entering, leaving))
        if name in (entering, leaving) and first and second and len(first) == len(second) == 3:
            return _by_bias(item, start + name) or _by_pair(first, second, fused)
    if re.fullmatch(_SINGLE, tail) and {"experts", "expert", "moe", "switch"} & item.path_words:
        return _by_bias(item, start + name) or _by_router(item, start, name)
    return None


def _by_bias(item: Item, stem: str) -> Axes | None:
    """A bias per expert."""
    for bias in (f"{stem}_bias", f"{stem}.bias"):
        shape = item.contents.shapes.get(bias, ())
        fitting = [axes for axes, k in (("boi", 1), ("bio", 2)) if shape == (item.shape[0], item.shape[k])]
        if len(fitting) == 1:
            return Axes(fitting[0], f"siblings: a bias of {shape[-1]} for each expert")
    return None


def _by_pair(entering: tuple[int, ...], leaving: tuple[int, ...], fused: int) -> Axes | Doubt:
    """The model's width enters and leaves, and each fused part of what enters is as wide as what is contracted next."""
    stacked_io = entering[1] == leaving[2] and entering[2] == fused * leaving[1]
    stacked_oi = entering[2] == leaving[1] and entering[1] == fused * leaving[2]
    if stacked_io == stacked_oi:
        return Doubt("a stack of experts, (expert, in, out) or (expert, out, in)")
    return Axes("bio" if stacked_io else "boi", f"siblings: experts of {entering} and {leaving}")


def _by_router(item: Item, start: str, name: str) -> Axes | Doubt:
    """The router of the same block tells the width of the model."""
    block = re.sub(r"(^|\.)(experts|mlp|switch_mlp|switch_glu)\.$", ".", start)
    shapes = [
        item.contents.shapes.get((prefix + router).lstrip(".")) for prefix in (block, start) for router in _ROUTERS
    ]
    width = next((s[1] for s in shapes if s and len(s) == 2 and s[0] == item.shape[0]), None)
    outputs = name in ("down_proj", "w2", "wo", "fc2", "down")
    if width is None or item.shape[1] == item.shape[2] or width not in item.shape[1:]:
        return Doubt("a stack of experts, (expert, in, out) or (expert, out, in)")
    axes = "boi" if (item.shape[1] == width) == outputs else "bio"
    return Axes(axes, f"siblings: experts of {item.shape} and a router of width {width}")
