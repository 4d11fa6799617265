"""BERT on SQuAD: 4:8-T and 2:4-T, fixed and refreshed every 40 steps, against ASP's 2:4 and dense fine-tuning.

Hubara et al., Tables 3 and A.4, BERT-large: F1 91.1 dense, 91.5 ASP 2:4, 91.67 4:8-T fixed; with masks of Algorithm 1
90.65 4:8-T and 90.18 2:4-T. Table 4, BERT-base: 88.52 dense, 88.38 4:8-T by Algorithm 1. SU as in Table 3.

Paper: Tables 3, 4 and A.4
Time: none; from the results of configs/squad
Data: none
"""

from experiments.configs.comparison import against_paper

EXPERIMENT = against_paper(
    "squad",
    {
        "dense": "91.1",
        "ASP 2:4": "91.5",
        "4:8-T": "91.67",
        "4:8-T, every 40, Algorithm 1": "90.65",
        "2:4-T, every 40, Algorithm 1": "90.18",
    },
)
