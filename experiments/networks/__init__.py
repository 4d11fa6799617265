"""Real pretrained networks in Flax Linen, with their weights, their data and a figure of merit each.

`NETWORKS` has one entry per network; `python -m experiments pretrained` evaluates all of them, dense. The modules work
at any size with random weights and need no data; weights and data are read from the folder that the environment
variable `NM_JAX_DATA` names.

`ARCHITECTURES` has the networks that are trained: those of the paper's tables and small ones, with random weights or
with public ones of PyTorch, which are loaded by name.
"""

from experiments.networks.architectures import ARCHITECTURES as ARCHITECTURES
from experiments.networks.architectures import Architecture as Architecture
from experiments.networks.bert import SentenceEmbedding as SentenceEmbedding
from experiments.networks.digits import DigitsNet as DigitsNet
from experiments.networks.language_model import LanguageModel as LanguageModel
from experiments.networks.pretrained import NETWORKS as NETWORKS
from experiments.networks.pretrained import Classifier as Classifier
from experiments.networks.pretrained import Network as Network
from experiments.networks.pretrained import row_mask as row_mask
from experiments.networks.resnet import ResNet as ResNet
from experiments.networks.resnet_imagenet import ImageNetResNet as ImageNetResNet
from experiments.networks.squeezenet import SqueezeNet as SqueezeNet
from experiments.networks.vgg import VGG as VGG
