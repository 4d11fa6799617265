"""How often masks should be refreshed: every 1, 10, 40 or 100 steps, against loss, flip rate and time.

Hubara et al., Section 4.3, refresh every 40 steps. The language model of `configs/language_model`, 2:4-T.

    NM_JAX_DATA=... python -m experiments configs/refresh_interval

Paper: Section 4.3
Time: not measured yet; continues where it was left
Data: tinyshakespeare (NM_JAX_DATA)
"""

from experiments.configs.language import DENSE, FIGURES, PRESETS, experiment
from experiments.configs.study import Study, Variant

INTERVALS = (40, 1, 10, 100)  # the paper's first: the others are compared with it
VARIANTS = tuple(Variant(f"every {k}", "2:4-T", refresh_every=k) for k in INTERVALS)
STUDY = Study("refresh_interval", VARIANTS, PRESETS, DENSE, figures=FIGURES)
EXPERIMENT = experiment(STUDY)
