"""Torchvision's state dict of Mask R-CNN as Flax variables."""

import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from experiments.networks import torch_weights

# The published file has names of before torchvision 0.13; the others are those of a network of today.
NAMES = (
    (r"^(backbone\.fpn\.(?:inner|layer)_blocks)\.(\d)\.(?:0\.)?", r"\1_\2."),
    (r"^rpn\.head\.conv\.(?:0\.0\.)?", "rpn.head.conv."),
    (r"^roi_heads\.mask_head\.mask_fcn(\d)\.", lambda found: f"roi_heads.mask_head_{int(found[1]) - 1}."),
    (r"^roi_heads\.mask_head\.(\d)\.0\.", r"roi_heads.mask_head_\1."),
    (r"^(rpn|roi_heads)\.(?:head|box_head|box_predictor|mask_predictor)\.", r"\1."),
    (r"^backbone\.(?:body|fpn)\.", "backbone."),
)
FROZEN = re.compile(r"\b(bn\d|downsample_bn)$")  # batch norms
UPSAMPLE = "roi_heads/conv5_mask"


def variables(weights: Mapping[str, np.ndarray]) -> dict:
    """Variables of a `MaskRCNN` from torchvision's arrays by name; `torch_weights.check` holds them against it."""
    renamed = {}
    for key, value in weights.items():
        for pattern, replacement in NAMES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    found = torch_weights.variables(renamed, {"roi_heads/fc6": 49})
    params, frozen = found["params"], found.get("batch_stats", {})
    _move_norms(params, frozen)
    if (upsample := params.get("roi_heads", {}).get("conv5_mask")) is not None:
        # A transposed convolution has inputs before outputs there, and its kernel the other way round.
        upsample["kernel"] = jnp.flip(upsample["kernel"], (0, 1)).swapaxes(2, 3)
    return {"params": params, "frozen": frozen}


def _move_norms(params: dict, frozen: dict) -> None:
    for name, node in list(params.items()):
        if FROZEN.search(name):
            frozen.setdefault(name, {}).update(params.pop(name))
        elif isinstance(node, dict):
            _move_norms(node, frozen.setdefault(name, {}))
            if not frozen[name]:
                del frozen[name]
