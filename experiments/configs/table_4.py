"""From scratch: 4:8-T refreshed every 40 steps against SR-STE's 4:8 at every step; and other refresh intervals.

Hubara et al., Tables 4 and A.4: ResNet-50 on ImageNet, 77.3 % dense, 77.4 % 4:8 of SR-STE, 77.1 % 4:8-T; ResNet-18
70.54, 71.2 and 70.75 %. Their 4:8-T is by Algorithm 1, which keeps fewer weights than the optimum. Here: ResNet-8 on
CIFAR-100, eight epochs (`cpu`).

    NM_JAX_DATA=... python -m experiments configs/table_4
    python -m experiments configs/table_4 --preset paper --data IMAGENET

Paper: Tables 4 and A.4
Time: 11 hours on one core (cpu); continues where it was left
Data: CIFAR-100 (NM_JAX_DATA)
"""

import nm_jax as nm
from experiments.configs import networks
from experiments.configs.study import Preset, Study, Variant
from experiments.train import Recipe

VARIANTS = (
    Variant("dense"),
    Variant("4:8 SR-STE", "4:8", refresh_every=1),
    Variant("4:8-T", "4:8-T"),
    Variant("4:8-T Algorithm 1", "4:8-T", solver=nm.solvers.Greedy(complete=False)),
    Variant("2:4-T", "2:4-T"),
    Variant("4:8-T every 1", "4:8-T", refresh_every=1),
    Variant("4:8-T every 10", "4:8-T", refresh_every=10),
    Variant("4:8-T every 100", "4:8-T", refresh_every=100),
)

STUDY = Study(
    "table_4",
    VARIANTS,
    {
        "cpu": Preset(Recipe(epochs=8, warmup=1), **networks.RESNET8_CIFAR100),
        "gpu": Preset(Recipe(epochs=30, warmup=2), seeds=1, **networks.RESNET8_CIFAR100),
        "paper": Preset(
            Recipe(epochs=120, batch=256, warmup=5, smoothing=0.1, weight_decay=5e-5), **networks.RESNET50_IMAGENET
        ),
    },
)
EXPERIMENT = STUDY.experiment()
