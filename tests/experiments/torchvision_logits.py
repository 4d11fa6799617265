"""Logits of torchvision's networks with weights made by a formula; `torchvision_logits.json` keeps them.

python -m tests.experiments.torchvision_logits    # writes them anew; needs torchvision
"""

import json
import math
import pathlib
import re
import zlib

import jax
import numpy as np

FILE = pathlib.Path(__file__).with_suffix(".json")
SIDE = 64
# Small ones have all kinds of layers; the others are the real ones.
SMALL = {
    "basic": ("ResNet", {"block": "BasicBlock", "layers": [1, 2, 1, 1]}),
    "grouped": ("ResNet", {"block": "Bottleneck", "layers": [1, 2, 1, 1], "groups": 32, "width_per_group": 4}),
    "vgg": ("VGG", {"layers": [16, "M", 32, 32, "M", 64, "M"], "batch_norm": False}),
    "vgg_bn": ("VGG", {"layers": [16, "M", 32, 32, "M", 64, "M"], "batch_norm": True}),
}
FULL = ("resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "vgg11", "vgg11_bn")


def images():
    """Two images, channels last."""
    return np.random.RandomState(0).uniform(-2, 2, (2, SIDE, SIDE, 3)).astype(np.float32)


def weight(name, shape):
    """An array of a state dict, the same at any time."""
    draw = np.random.RandomState(zlib.crc32(name.encode())).uniform(-1, 1, shape)
    if len(shape) > 1:
        return (draw * math.sqrt(6 / math.prod(shape[1:]))).astype(np.float32)
    offset = 1.0 if name.endswith("running_var") or not name.endswith(("bias", "running_mean")) else 0.0
    return (offset + 0.2 * draw).astype(np.float32)


def state_dict(module, side=SIDE):
    """State dict of the torchvision network that a Flax module is like."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, side, side, 3), np.float32))
    kinds = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        *layers, kind = (key.key for key in path[1:])
        name = re.sub(r"_(\d+)\b", r".\1", ".".join(layers)).replace("_conv", ".0").replace("_bn", ".1")
        shape = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[leaf.ndim]
        name = f"{name}.{kinds[kind]}"
        arrays[name] = weight(name, tuple(leaf.shape[k] for k in shape))
    return arrays


def build(name):
    """Torchvision's network, with the weights of the formula."""
    import torch
    from torchvision.models import resnet, vgg

    if name in FULL:
        model = getattr(vgg if name.startswith("vgg") else resnet, name)()
    elif SMALL[name][0] == "ResNet":
        options = SMALL[name][1]
        model = resnet.ResNet(**options | {"block": getattr(resnet, options["block"]), "num_classes": 10})
    else:
        model = vgg.VGG(vgg.make_layers(SMALL[name][1]["layers"], SMALL[name][1]["batch_norm"]), init_weights=False)
        linear, rest = torch.nn.Linear, list(model.classifier)
        rest[0], rest[3], rest[6] = linear(64 * 49, 32), linear(32, 32), linear(32, 10)
        model.classifier = torch.nn.Sequential(*rest)
    arrays = {key: value for key, value in model.state_dict().items() if "num_batches" not in key}
    model.load_state_dict({key: torch.tensor(weight(key, tuple(v.shape))) for key, v in arrays.items()}, strict=False)
    return model


def record(name):
    """The first ten logits of both images; in training too, with the statistics of the last batch norm of a stage."""
    import torch

    model, x = build(name), torch.tensor(images()).permute(0, 3, 1, 2)
    with torch.no_grad():
        found = {"logits": model.eval()(x)[:, :10].tolist()}
        if name in SMALL and SMALL[name][0] == "ResNet":
            found["train"] = model.train()(x).tolist()
            found["mean"] = model.layer1[0].bn2.running_mean.tolist()[:8]
            found["var"] = model.layer1[0].bn2.running_var.tolist()[:8]
    return found


if __name__ == "__main__":
    lines = [f'"{name}": {json.dumps(record(name))}' for name in (*SMALL, *FULL)]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
