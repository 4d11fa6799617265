"""The networks and images of the vision results, with their pretrained weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.data import packed
from experiments.data.errors import DataError, reading
from experiments.data.folders import ImageNet, imagenet
from experiments.data.images import cifar
from experiments.networks.architectures import ARCHITECTURES

RESNET8_CIFAR100: dict[str, Any] = {
    "network": "ResNet-8",
    "module": ARCHITECTURES["cifar100_resnet8"].module,
    "data": lambda path: cifar("cifar100", path),
}
RESNET18_CIFAR100: dict[str, Any] = {
    "network": "ResNet-18",
    "module": ARCHITECTURES["resnet18"].module.clone(classes=100),
    "data": lambda path: cifar("cifar100", path),
}
RESNET20_CIFAR10: dict[str, Any] = {
    "network": "ResNet-20",
    "module": ARCHITECTURES["cifar10_resnet20"].module,
    "data": lambda path: cifar("cifar10", path),
}
RESNET50_IMAGENET: dict[str, Any] = {
    "network": "ResNet-50",
    "module": ARCHITECTURES["resnet50"].module,
    "data": lambda path: images_of(path),
}


def images_of(path: Path | None) -> ImageNet:
    """The ImageNet folder.

    Raises:
      DataError: none was named, or it is none.
    """
    if path is None:
        raise DataError("this preset trains on ImageNet: name its folder, --data FOLDER, which has train and val")
    return imagenet(path)


def pretrained(name: str, stored: str | None = None) -> Callable[[Path | None], dict]:
    """A reader of the weights of an architecture: of the file that is named, or else of one of the data folder."""

    def read(path):
        if path is not None:
            with reading():
                return ARCHITECTURES[name].variables(path)
        if stored is None:
            raise DataError(f"this preset starts from a trained {name}: name the file of its weights, --weights FILE")
        return ARCHITECTURES[name].variables(packed.weights(stored))

    return read
