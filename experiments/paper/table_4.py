"""From scratch: 4:8-T and 2:4-T refreshed every 40 steps against SR-STE's 4:8 at every step, and other intervals.

Hubara et al., Tables 4 and A.4: ResNet-50 on ImageNet, 77.3 % dense, 77.4 % 4:8 by SR-STE, 77.1 % 4:8-T by their
2-approximation (Algorithm 1) every 40 steps. SU as in Table 3.

Paper: Tables 4 and A.4
Time: none; from the results of configs/table_4
Data: none
"""

from experiments.configs.comparison import against_paper

EXPERIMENT = against_paper("table_4", {"dense": "77.3", "4:8 SR-STE": "77.4", "4:8-T Algorithm 1": "77.1"})
