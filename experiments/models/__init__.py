"""Real pretrained networks in Flax Linen, with their weights, their data and a figure of merit each.

`NETWORKS` has one entry per network; `python -m experiments.models` evaluates all of them, dense. The modules work at
any size with random weights and need no data; weights and data are read from the folder that the environment variable
`NM_JAX_DATA` names.
"""

from experiments.models.minilm import MiniLM as MiniLM
from experiments.models.minilm import Tokenizer as Tokenizer
from experiments.models.networks import NETWORKS as NETWORKS
from experiments.models.networks import Network as Network
from experiments.models.networks import row_mask as row_mask
from experiments.models.resnet import ResNet as ResNet
from experiments.models.squeezenet import SqueezeNet as SqueezeNet
