"""Accuracy of nine kinds of masks, retrained from a pretrained network: Fig. 3a, by the protocol of A.7.

Hubara et al., Fig. 3a and A.2: one-shot pruning at 50 % from the dense network, mask fixed, then training by the
regime of the original; ResNet-18 on CIFAR-100, between 65.5 % (4:8-S) and 70.3 % (unstructured). Here: ResNet-8 on
CIFAR-100, whose masks are found once, and two epochs of training (`cpu`).

    NM_JAX_DATA=... python -m experiments configs/figure_3a_retrain
    python -m experiments configs/figure_3a_retrain --preset paper --data IMAGENET --weights resnet50.pth  # Fig. A.2

Paper: Figures 3a and A.2
Time: 3 hours on one core (cpu); continues where it was left
Data: CIFAR-100 and the weights of ResNet-8 (NM_JAX_DATA)
"""

from experiments.configs import networks
from experiments.configs.study import Preset, Study, Variant
from experiments.train import Recipe

PATTERNS = ("4:8", "2:4", "1:2", "4:8-T", "2:4-T", "4:8-S", "2:4-S")
VARIANTS = (
    Variant("dense"),
    Variant("US", "US-0.5", refresh_every=None),
    *(Variant(pattern, pattern, refresh_every=None) for pattern in PATTERNS),
)
START = {
    **networks.RESNET8_CIFAR100,
    "weights": networks.pretrained("cifar100_resnet8", "cifar100_resnet8_distiller"),
}
PAPER = {**networks.RESNET50_IMAGENET, "weights": networks.pretrained("resnet50")}

STUDY = Study(
    "figure_3a_retrain",
    VARIANTS,
    {
        "cpu": Preset(Recipe(epochs=2, rate=0.02), **START),
        "gpu": Preset(Recipe(epochs=20, rate=0.05), seeds=1, **START),
        "paper": Preset(Recipe(epochs=90, rate=0.1, drops=(30, 60, 80), weight_decay=1e-4, batch=256), **PAPER),
    },
)
EXPERIMENT = STUDY.experiment()
