"""The networks and images of the vision results that fit here, with their pretrained weights."""

from typing import Any

from experiments.data import packed
from experiments.data.images import cifar
from experiments.networks import NETWORKS, resnet

RESNET8_CIFAR100: dict[str, Any] = {
    "network": "ResNet-8",
    "module": resnet.ResNet(blocks=(1, 1, 1)),
    "data": lambda: cifar("cifar100"),
}
RESNET20_CIFAR10: dict[str, Any] = {
    "network": "ResNet-20",
    "module": NETWORKS["resnet20-cifar10"].module,
    "data": lambda: cifar("cifar10"),
}


def resnet8_weights() -> dict:
    """Those of the CIFAR-100 ResNet-8, which was trained on clean pixels."""
    return resnet.from_torch(packed.weights("cifar100_resnet8_distiller"), side=2)


def resnet20_weights() -> dict:
    """Those of the CIFAR-10 ResNet-20, which was trained on clean pixels."""
    return NETWORKS["resnet20-cifar10"].variables()
