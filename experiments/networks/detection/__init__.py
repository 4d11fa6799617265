"""Mask R-CNN: He et al., "Mask R-CNN" (2017), with feature pyramids (Lin et al., 2017), as torchvision has it.

`model` has the layers and the way through them, `boxes` and `roi_align` what happens to boxes between them, `matching`
and `losses` what is learned from. All shapes are static: what varies in number is padded, and said to be there or not.
"""

from experiments.networks.detection.model import MaskRCNN as MaskRCNN
from experiments.networks.detection.model import Sizes as Sizes
from experiments.networks.detection.weights import variables as variables
