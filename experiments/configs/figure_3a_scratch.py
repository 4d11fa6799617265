"""Accuracy of nine kinds of masks, trained from scratch with masks refreshed every 40 steps: Fig. 3a.

Hubara et al., Fig. 3a: ResNet-18 on CIFAR-100, between 65.5 % (4:8-S) and 70.3 % (unstructured). Here: ResNet-8 on
CIFAR-100, eight epochs (`cpu`).

    NM_JAX_DATA=... python -m experiments configs/figure_3a_scratch
    python -m experiments configs/figure_3a_scratch --preset paper --data CIFAR-100  # ResNet-18, the official files

Paper: Figure 3a
Time: 10 hours on one core (cpu); continues where it was left
Data: CIFAR-100 (NM_JAX_DATA)
"""

from experiments.configs import networks
from experiments.configs.figure_3a_retrain import PATTERNS
from experiments.configs.study import Preset, Study, Variant
from experiments.train import Recipe

VARIANTS = (Variant("dense"), Variant("US", "US-0.5"), *(Variant(pattern, pattern) for pattern in PATTERNS))

STUDY = Study(
    "figure_3a_scratch",
    VARIANTS,
    {
        "cpu": Preset(Recipe(epochs=8, warmup=1), **networks.RESNET8_CIFAR100),
        "gpu": Preset(Recipe(epochs=30, warmup=2), seeds=1, **networks.RESNET8_CIFAR100),
        "paper": Preset(Recipe(epochs=90, drops=(30, 60, 80), weight_decay=1e-4), **networks.RESNET18_CIFAR100),
    },
)
EXPERIMENT = STUDY.experiment()
