"""Sparse training as one optax transformation: change one line, and the network that trains is N:M sparse."""

import optax

from nm_jax._core.rules import Rules, parse_rules
from nm_jax._masks.compute import Scores
from nm_jax._training.decay import Decay, StepDecay, as_decay
from nm_jax._training.density import StepScale
from nm_jax._training.due import Due, Interval
from nm_jax._training.fixed_mask import fixed_mask
from nm_jax._training.phases import Earlier, Phases
from nm_jax._training.refresh import Refresh
from nm_jax._training.refreshed_mask import refreshed_mask
from nm_jax.solvers import Solver


def sparse_training(
    inner: optax.GradientTransformation,
    rules: Rules,
    *,
    refresh_every: Interval | None = 40,
    decay: float | Decay = StepDecay(3.0),  # noqa: B008
    scale_steps: float | None = None,
    solver: Solver | None = None,
    scores: Scores | None = None,
    begin_step: int = 0,
    end_step: int | None = None,
    end_when_settled: float | None = None,
    earlier: Earlier = (),
    partial: str = "skip",
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Trains N:M sparse parameters with any optimiser: straight-through, with masks refreshed from the dense weights.

    ```python
    tx = nm.sparse_training(optax.adamw(3e-4), "2:4-T")  # was: tx = optax.adamw(3e-4)
    ```

    The state keeps a dense copy of every sparse parameter, as the paper does. The parameters that the model sees are
    `mask * dense` after every applied update, so the gradient that the loop takes at them *is* the straight-through
    gradient. An update

    1. takes it to `inner`, which makes a step of the dense weights, in at least float32, larger the sparser they are,
    2. pulls the pruned ones toward zero, as `decay` says, on the gradient or beside the step,
    3. refreshes the masks from them when due,
    4. returns `mask * dense - params` in the params' dtype.

    Once it is applied, zeros are exact. A kept entry is the dense weight rounded to the params' dtype where the update
    changed it by less than a factor of two; after a larger step it is off by one more rounding, of the step. Errors do
    not accumulate. Evaluation, checkpoints and sparse kernels always see sparse weights. Start the loop from
    `nm.sparse_params(opt_state, params)` to have that for the very first gradient too.

    A sparse leaf whose gradient is `None` is frozen: its weight and its mask stay.

    Args:
      inner: any optax optimiser that does not evaluate the loss itself.
      rules: a pattern such as `"2:4-T"`, or `(path regex, pattern or None, optional axes)`; a `Plan`
        (`nm.plan`) is safest. Axes letters: i contraction, o output, b batch.
      refresh_every: updates between two refreshes; 40 in the paper. Or a schedule, a function of the number of updates
        done such as `optax.linear_schedule(10, 200, steps)`. `None`: the mask is found once and stays (the
        paper's retraining of a pretrained network). No dense copy is kept then, and gradients are masked before
        `inner`.
      decay: of pruned weights: `nm.StepDecay(3.0)`, as large as the optimiser's steps, or a number, the strength of
        SR-STE's (`nm.GradientDecay`; `nm.recipes.paper` has the paper's).
      scale_steps: power of 1 / density that the optimiser's steps of sparse leaves are multiplied by, 0 to 1. A unit
        that sees half of its inputs moves half as far for the same steps: at 1 it moves as far as a dense one
        (`nm.recipes.maximal_update`), at 0 steps stay as they are. `None`: 2/3, which makes them 1.59 times as large at
        2:4, so that the learning rate of a dense network suits; and 0 around an optimiser that moves the parameters
        itself (`schedule_free`), whose steps cannot be scaled.
      solver: solver for every sparse leaf; `None` takes the default for each pattern.
      scores: function of a dense weight that says what its mask keeps the most of; `None`: `abs`.
      begin_step: number of dense updates before the first mask.
      end_step: no refresh after this many updates; the last masks stay.
      end_when_settled: no refresh after one that changed at most this share (0.1, say) of the mask entries that the one
        that changed the most of them did; the last masks stay. Not for learning rates that rise again.
      earlier: patterns that masks have before that of the rules: `[(200, "2:4")]` until update 200, when masks of the
        rules are found in any case; or, in place of a pattern, a function that makes one of a leaf's. Every pattern
        is compiled, once. `nm.refresh_stats(opt_state).phase` says which one masks have.
      partial: leaves whose sizes m does not divide: `"skip"` (they stay dense), `"pad"` or `"error"`.
      packed: keep the positions of what 2:4 masks keep, as sparse tensor cores read them, found anew when masks are:
        1/8 byte per weight and product (1/4 with a transposable mask). `nm.pack_params` packs the weights with them,
        once per step and not in every product.

    Returns:
      A transformation whose `update` needs `params`. State: the inner state, 4 bytes (dense copy, float32) and 1 byte
      (mask) per sparse weight. Masks are found inside the compiled step, when due; other steps add elementwise work
      only. Under `jax.vmap` a refresh is run for all members when it is due for one: with steps in common, as in an
      ensemble, that is when it is due.

    Composition:
      - Make it the *last* link of `optax.chain`: what follows would scale or clip `mask * dense - params`. Clipping,
        weight decay, schedules and `optax.inject_hyperparams` go inside; gradients are unscaled before.
      - `optax.MultiSteps`, `apply_if_finite`, `masked` and `multi_transform` go outside.
      - What moves the parameters itself, past what is inside it, goes inside: `optax.contrib.sam`, `mechanize`,
        `schedule_free`. Around it they leave the pattern, and so does `optax.lookahead`, which is fine around a fixed
        mask where it starts from `nm.sparse_params`. `update` refuses those that do arithmetic on its state; of the
        others the functions that read the state warn, and of whatever else has moved the parameters far, which
        `nm.refresh_stats(opt_state).drift` shows.
        `optax.contrib.schedule_free_eval_params(opt_state, params)` is sparse when a schedule-free optimiser is
        directly inside.
      - What evaluates the loss inside (line searches, `sam` in opaque mode, Sophia) would do so at dense weights: it is
        refused. `update` passes extra arguments on, with functions that raise when they are called.

    Raises:
      ValueError: with `scale_steps` above 0, from `init`, for an optimiser that moves the parameters itself
        (`schedule_free`); from this function for wrong arguments; from `init` for rules that do not fit the parameters
        (and for NaN among concrete ones) and for line searches; from `update` without params, for the state of another
        optimiser or of another tree, and for an inner transformation that evaluates the loss.

    Source: Hubara et al., NeurIPS 2021, Sections 3 and 4; SR-STE: Zhou et al., ICLR 2021.
    The default decay: `nm.StepDecay`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, nm_jax as nm
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 8))}
      >>> x = jax.random.normal(jax.random.key(1), (16, 8))
      >>> loss = lambda params: jnp.mean((x @ params["kernel"] - x) ** 2)
      >>> tx = nm.sparse_training(optax.adam(0.02), "2:4", refresh_every=5)
      >>> opt_state = tx.init(params)
      >>> params = nm.sparse_params(opt_state, params)
      >>> start = loss(params)
      >>> @jax.jit
      ... def step(params, opt_state):
      ...     updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
      ...     return optax.apply_updates(params, updates), opt_state
      >>> for _ in range(20):
      ...     params, opt_state = step(params, opt_state)
      >>> nm.verify(params, "2:4").ok, bool(loss(params) < start)
      (True, True)
    """
    parse_rules(rules)
    phases = Phases.of(earlier, begin_step)
    due = Due(refresh_every, begin_step, end_step, end_when_settled, phases.ends)
    if packed and begin_step:
        raise ValueError(f"packed weights need masks from the start, got begin_step={begin_step}; use packed=False")
    if packed and earlier:
        raise ValueError("packed weights need one pattern from the start, got earlier patterns; use packed=False")
    decay = as_decay(decay)
    inner = optax.with_extra_args_support(inner)
    scale = StepScale(scale_steps, begin_step, phases)
    refresh = Refresh(due, phases, solver, scores, packed)
    if refresh_every is None:
        return fixed_mask(inner, rules, partial, refresh, scale)
    return refreshed_mask(inner, rules, partial, refresh, scale, decay)
