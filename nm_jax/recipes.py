"""Sparse training as published, and as it was found to do well: settings of `sparse_training` with a name.

To add a recipe, write a function here that takes `inner`, `rules` and further arguments of `nm.sparse_training`. Say
where it is from and what to expect.
"""

from fractions import Fraction
from typing import Any

import optax

from nm_jax._core.rules import Rules
from nm_jax._training.decay import GradientDecay
from nm_jax._training.phases import along_one_axis, denser
from nm_jax._training.transformation import sparse_training


def paper(inner: optax.GradientTransformation, rules: Rules, **settings: Any) -> optax.GradientTransformationExtraArgs:
    """The paper's: SR-STE with a decay of 2e-4 on the gradient, masks refreshed every 40 updates until the end.

    Expect: as good as the default on classification with momentum SGD, which it was chosen for; worse than a mask that
    stays wherever gradients are small beside the weights, as with a mean squared error under Adam.

    Args:
      inner: any optax optimiser that does not evaluate the loss itself.
      rules: as in `nm.sparse_training`.
      settings: other arguments of `nm.sparse_training`.

    Returns:
      What `nm.sparse_training` returns.

    Source: Hubara et al., NeurIPS 2021, Section 4; Zhou et al., ICLR 2021.

    Examples:
      >>> import jax.numpy as jnp, optax, nm_jax as nm
      >>> tx = nm.recipes.paper(optax.sgd(0.1, momentum=0.9), "2:4-T")
      >>> nm.masks(tx.init({"kernel": jnp.eye(8)}))["kernel"].sum().item()
      32
    """
    return sparse_training(
        inner, rules, **{"refresh_every": 40, "decay": GradientDecay(2e-4), "scale_steps": 0.0, **settings}
    )


def fixed_mask(
    inner: optax.GradientTransformation, rules: Rules, **settings: Any
) -> optax.GradientTransformationExtraArgs:
    """The mask of the first weights stays, and no dense copy is kept: the paper's retraining of a pretrained network.

    Expect: the least memory; from scratch at best what the default reaches.

    Args:
      inner: any optax optimiser that does not evaluate the loss itself.
      rules: as in `nm.sparse_training`.
      settings: other arguments of `nm.sparse_training`.

    Returns:
      What `nm.sparse_training` returns.

    Source: Hubara et al., NeurIPS 2021, Section 4.

    Examples:
      >>> import jax.numpy as jnp, optax, nm_jax as nm
      >>> state = nm.recipes.fixed_mask(optax.adam(0.1), "2:4").init({"kernel": jnp.eye(8)})
      >>> state.dense is None
      True
    """
    return sparse_training(inner, rules, **{"refresh_every": None, "scale_steps": 0.0, **settings})


def maximal_update(
    inner: optax.GradientTransformation, rules: Rules, **settings: Any
) -> optax.GradientTransformationExtraArgs:
    """The default, with steps of sparse weights 1 / density times as large: the learning rate of a dense run fits.

    Each unit of a sparse layer sees a share of its inputs, and the same step of each weight moves it by that share: at
    the learning rate of a dense run, a sparse one trains more slowly. Weight decay inside `inner` grows alike.

    Expect: most of what a sparse network loses to a dense one in the same number of steps. Near the largest learning
    rate that the dense network can bear it may diverge (SGD did): there, or where the learning rate has been tuned for
    the sparse one, the default.

    Args:
      inner: any optax optimiser that does not evaluate the loss itself.
      rules: as in `nm.sparse_training`.
      settings: other arguments of `nm.sparse_training`.

    Returns:
      What `nm.sparse_training` returns.

    Source: the learning rate of SuPar, Dey et al., NeurIPS 2024. Its larger initialisation is left out: masks of the
    largest weights keep most of the variance.

    Examples:
      >>> import jax.numpy as jnp, optax, nm_jax as nm
      >>> params, tx = {"kernel": jnp.eye(4)}, nm.recipes.maximal_update(optax.sgd(1.0), "2:4", decay=0.0)
      >>> updates, _ = tx.update({"kernel": jnp.full((4, 4), 0.125)}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["kernel"][0, 0].item()  # a step of 0.125, at half of the weights
      0.75
    """
    return sparse_training(inner, rules, **{"scale_steps": 1.0, **settings})


def gradual_transposable(
    inner: optax.GradientTransformation, rules: Rules, *, until: int, **settings: Any
) -> optax.GradientTransformationExtraArgs:
    """Masks are n:m along the contraction axis first, and n:m-T from update `until` on.

    Transposable masks are few, and those of untrained weights keep what they must rather than what matters; plain n:m
    masks are freer while that is being found out. Expect: a jump of the loss at `until`, so leave time to train after.

    Args:
      inner: any optax optimiser that does not evaluate the loss itself.
      rules: as in `nm.sparse_training`; leaves whose pattern is not transposable have it from the start.
      until: number of updates with n:m.
      settings: other arguments of `nm.sparse_training`.

    Returns:
      What `nm.sparse_training` returns.

    Source: this project; masks go from one pattern to a stricter one as in `decaying`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, nm_jax as nm
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 8))}
      >>> tx = nm.recipes.gradual_transposable(optax.sgd(0.1), "2:4-T", until=2)
      >>> state, transposable = tx.init(params), []
      >>> for _ in range(2):
      ...     transposable.append(nm.verify(nm.masks(state), "2:4-T").ok)
      ...     updates, state = tx.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> transposable, nm.verify(nm.masks(state), "2:4-T").ok
      ([False, False], True)
    """
    return sparse_training(inner, rules, earlier=[(until, along_one_axis)], **settings)


def decaying(
    inner: optax.GradientTransformation, rules: Rules, *, until: int, stages: int = 3, **settings: Any
) -> optax.GradientTransformationExtraArgs:
    """Masks keep m - 1 of m first, then fewer and fewer, and n of m from update `until` on.

    n + ceil((m - 1 - n) (stages - k) / stages) of m    in stage k = 0, 1, ..., stages - 1, each as long

    Expect: a network that hardly loses anything while its learning rate is large; leave time to train after `until`.

    Args:
      inner: any optax optimiser that does not evaluate the loss itself.
      rules: as in `nm.sparse_training`; leaves whose pattern is not of n:m have it from the start.
      until: number of updates before masks keep n of m.
      stages: how many patterns there are before, at most; 2:4 has one, 3:4.
      settings: other arguments of `nm.sparse_training`.

    Returns:
      What `nm.sparse_training` returns.

    Raises:
      ValueError: if `until` is not at least `stages`.

    Source: Kao et al., Training Recipe for N:M Structured Sparsity with Decaying Pruning Mask, 2022.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, nm_jax as nm
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 8))}
      >>> tx = nm.recipes.decaying(optax.sgd(0.1), "4:8", until=3)
      >>> state, kept = tx.init(params), []
      >>> for _ in range(4):
      ...     kept.append(nm.masks(state)["kernel"].sum().item() // 8)
      ...     updates, state = tx.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> kept
      [7, 6, 5, 4]
    """
    if not 1 <= stages <= until:
        raise ValueError(f"each stage needs an update: 1 <= stages <= until, got stages={stages} and until={until}")
    earlier = [(until * (k + 1) // stages, denser(Fraction(stages - k, stages))) for k in range(stages)]
    return sparse_training(inner, rules, earlier=earlier, **settings)
