"""From a pretrained network: 4:8-T and 2:4-T against ASP's 2:4 and the dense network, with the spread of differences.

Hubara et al., Table 3: ResNet-50 on ImageNet, 76.15 % dense, 76.6 % ASP, 76.6 % 4:8-T. SU is the share of the three
products of a layer's training that sparse tensor cores can take: forward with 2:4, forward and backward with -T.

Paper: Table 3
Time: none; from the results of configs/table_3
Data: none
"""

from experiments.configs.comparison import against_paper

EXPERIMENT = against_paper("table_3", {"dense": "76.15", "ASP 2:4": "76.6", "4:8-T": "76.6"})
