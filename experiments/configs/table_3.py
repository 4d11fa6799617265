"""From a pretrained network with a mask that stays: 4:8-T and 2:4-T against ASP's 2:4 and the dense network.

Hubara et al., Table 3: ResNet-50 on ImageNet, 76.15 % dense, 76.6 % ASP 2:4, 76.6 % 4:8-T; ResNet-18 69.7 % and 70.06 %
4:8-T. The mask is the optimum of the pretrained weights, and training repeats the original regime. Here: ResNet-20 on
CIFAR-10, three epochs (`cpu`), and the dense network is trained on as long as the others.

    NM_JAX_DATA=... python -m experiments configs/table_3
    python -m experiments configs/table_3 --preset paper --data IMAGENET --weights resnet50.pth

Paper: Table 3
Time: 4 hours on one core (cpu); continues where it was left
Data: CIFAR-10 and the weights of ResNet-20 (NM_JAX_DATA)
"""

from experiments.configs import networks
from experiments.configs.study import Preset, Study, Variant
from experiments.train import Recipe

VARIANTS = (
    Variant("dense"),
    Variant("ASP 2:4", "2:4", refresh_every=None),
    Variant("2:4-T", "2:4-T", refresh_every=None),
    Variant("4:8-T", "4:8-T", refresh_every=None),
)
START = {
    **networks.RESNET20_CIFAR10,
    "weights": networks.pretrained("cifar10_resnet20", "cifar10_resnet20_akamaster"),
}
PAPER = {**networks.RESNET50_IMAGENET, "weights": networks.pretrained("resnet50")}

STUDY = Study(
    "table_3",
    VARIANTS,
    {
        "cpu": Preset(Recipe(epochs=3, rate=0.02), **START),
        "gpu": Preset(Recipe(epochs=20, rate=0.05), **START),
        "paper": Preset(Recipe(epochs=90, rate=0.1, drops=(30, 60, 80), weight_decay=1e-4, batch=256), **PAPER),
    },
)
EXPERIMENT = STUDY.experiment()
