"""A language model from scratch: dense, SR-STE 4:8 every step, 2:4-T and 4:8-T every 40 steps.

Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch" (2021), against Hubara et al.,
Section 4.3, where transposable masks are refreshed every 40 steps. Characters of tinyshakespeare, the last tenth held
out; all projections of all layers are sparse, embeddings and head are dense.

    NM_JAX_DATA=... python -m experiments configs/language_model

Paper: Section 4.3
Time: not measured yet; continues where it was left
Data: tinyshakespeare (NM_JAX_DATA)
"""

from experiments.configs.language import DENSE, FIGURES, PRESETS, experiment
from experiments.configs.study import Study, Variant

VARIANTS = (
    Variant("dense"),
    Variant("SR-STE 4:8", "4:8", refresh_every=1),
    Variant("2:4-T", "2:4-T"),
    Variant("4:8-T", "4:8-T"),
)
STUDY = Study("language_model", VARIANTS, PRESETS, DENSE, figures=FIGURES)
EXPERIMENT = experiment(STUDY)
