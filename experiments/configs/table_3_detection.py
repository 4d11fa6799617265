"""Mask R-CNN from a pretrained network with a mask that stays: 4:8-T and 2:4-T against ASP's 2:4 and the dense network.

Hubara et al., Table 3: ResNet-50 with feature pyramids on COCO, AP 37.7 dense, 37.9 ASP 2:4, 37.84 4:8-T. The mask is
the optimum of the pretrained weights; which layers stay dense is what `nm.plan` says of the network. Here: a small
Mask R-CNN on drawn shapes (`cpu`), trained dense first, and the dense network is trained on as long as the others.

    python -m experiments configs/table_3_detection
    python -m experiments configs/table_3_detection --preset paper --data COCO --weights maskrcnn_resnet50_fpn_coco.pth

Paper: Table 3
Time: 40 minutes on one core (cpu); continues where it was left
Data: none
"""

import dataclasses

from experiments.configs import detection
from experiments.configs.comparison import compared
from experiments.configs.language import AdamW
from experiments.configs.study import Preset, Study
from experiments.configs.table_3 import VARIANTS
from experiments.harness import Table
from experiments.networks.detection import MaskRCNN
from experiments.train import Recipe

PAPER = {"dense": "37.7", "ASP 2:4": "37.9", "4:8-T": "37.84"}

STUDY = Study(
    "table_3_detection",
    VARIANTS,
    {
        "cpu": Preset(
            AdamW(epochs=2, batch=8, rate=1e-3, weight_decay=1e-2),
            detection.SMALL,
            lambda path: detection.drawn(480, 100, 64),
            network="small Mask R-CNN",
            before=AdamW(epochs=20, batch=8, rate=3e-3, weight_decay=1e-2, warmup=1),
        ),
        "gpu": Preset(
            AdamW(epochs=6, batch=16, rate=2e-4, weight_decay=1e-2),
            detection.MIDDLE,
            lambda path: detection.drawn(8000, 500, 256),
            network="Mask R-CNN, ResNet-18",
            before=AdamW(epochs=24, batch=16, rate=1e-3, weight_decay=1e-2, warmup=1),
        ),
        "paper": Preset(
            Recipe(epochs=26, batch=16, rate=0.02, drops=(16, 22), weight_decay=1e-4),
            MaskRCNN(),
            detection.official,
            detection.pretrained,
            network="Mask R-CNN, ResNet-50",
        ),
    },
    learned=detection.task,
    planned=detection.planned,
    figures=detection.FIGURES,
)


def tables(result: dict) -> list[Table]:
    """AP of boxes, beside the paper's, and of masks; and what stays dense."""
    reasons: dict[str, list[str]] = {}
    for dense in result["dense"].values():
        for path, reason in dense.items():
            reasons.setdefault(path, []).append(reason)
    rows = [(path, "; ".join(dict.fromkeys(why))) for path, why in reasons.items()]
    return [compared("ap", result, PAPER), Table("dense", ("layer", "why"), rows, "What stays dense by `nm.plan`")]


EXPERIMENT = dataclasses.replace(STUDY.experiment(), tables=tables)
