"""The strength of a decay from flip rates: the weakest under which masks change less than those of dense training."""

import itertools
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nm_jax._core.rules import Rules
from nm_jax._training.decay import Decay, GradientDecay
from nm_jax._training.due import Due
from nm_jax._training.find_states import states
from nm_jax._training.phases import Phases
from nm_jax._training.refresh import Refresh
from nm_jax._training.transformation import sparse_training
from nm_jax._training.watched import watched


def choose_decay(
    probe: Callable[[optax.GradientTransformationExtraArgs], Any],
    inner: optax.GradientTransformation,
    rules: Rules,
    *,
    decay: Callable[[float], Decay] = GradientDecay,
    strengths: Sequence[float] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2),
    between: tuple[float, float] = (0.6, 0.95),
    found: MutableMapping[str, float] | None = None,
    **settings: Any,
) -> Decay:
    """The weakest decay under which masks change somewhat less than those of the same network when it trains densely.

    lower <= flip rate(strength) / flip rate(dense) <= upper

    Flip rates are those of the last refresh of a short training; of the dense one they are of the masks that its
    weights would have. Too weak a decay lets masks change more than that, and too strong a one freezes them before
    they are good.

    Args:
      probe: trains a fresh copy of the network with the optimiser that it is given, the same way each time, and returns
        the state of the optimiser. It should last as long as the warm-up of the learning rate does, and must last until
        a refresh.
      inner: the optimiser of the training to come.
      rules: as in `nm.sparse_training`.
      decay: makes a decay of a strength: `nm.GradientDecay`, `nm.StepDecay`, or one of your own.
      strengths: what is tried, the weakest first, until one will do.
      between: lower and upper.
      found: flip rates by strength, `repr(strength)`, and that of `"dense"`: what it holds is not measured again, and
        what is measured is put there at once. Keep it, in a file say, and a call that was cut off goes on.
      settings: other arguments of `nm.sparse_training`.

    Returns:
      The decay, for `nm.sparse_training`. Costs one probe for dense training, and one for each strength up to it.

    Raises:
      ValueError: if none will do, with all flip rates; if masks of dense training do not change; for strengths that do
        not rise.

    Source: Hu et al. (FST), ICML 2024, Section 4.3: 0.6 to 0.95, for transformers under Adam.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, nm_jax as nm
      >>> x = jax.random.normal(jax.random.key(0), (64, 8))
      >>> y = jnp.sin(2 * x)
      >>> loss = lambda params: jnp.mean((jnp.tanh(x @ params["kernel"]) - y) ** 2)
      >>> first = {"kernel": jax.random.normal(jax.random.key(1), (8, 8))}
      >>> def probe(tx):
      ...     def step(k, carry):
      ...         updates, state = tx.update(jax.grad(loss)(carry[0]), carry[1], carry[0])
      ...         return optax.apply_updates(carry[0], updates), state
      ...     return jax.lax.fori_loop(0, 40, step, (first, tx.init(first)))[1]
      >>> rates = {}
      >>> settings = {"decay": nm.StepDecay, "strengths": (1.0, 3.0, 10.0), "between": (0.0, 0.95)}
      >>> decay = nm.choose_decay(probe, optax.adam(0.02), "2:4", refresh_every=20, found=rates, **settings)
      >>> isinstance(decay, nm.StepDecay), rates[repr(decay.strength)] < rates["dense"]
      (True, True)
    """
    lower, upper = between
    if not 0 <= lower < upper:
        raise ValueError(f"between needs 0 <= lower < upper, got {between}")
    if not strengths or any(after <= before for before, after in itertools.pairwise(strengths)):
        raise ValueError(f"strengths must rise, the weakest first, got {tuple(strengths)}")
    found = {} if found is None else found

    def rate(name: str, tx: optax.GradientTransformationExtraArgs) -> float:
        if name not in found:
            found[name] = _flip_rate(probe(tx))
        return found[name]

    due = Due(settings.get("refresh_every", 40), 0, None, None)
    refresh = Refresh(due, Phases((), ()), settings.get("solver"), settings.get("scores"), packed=False)
    inner = optax.with_extra_args_support(inner)
    dense = rate("dense", watched(inner, rules, settings.get("partial", "skip"), refresh))
    if dense == 0:
        raise ValueError("the masks of dense training did not change in the last refresh of the probe; train longer")
    ratios = {}
    for strength in strengths:
        chosen = decay(strength)
        ratio = rate(repr(strength), sparse_training(inner, rules, decay=chosen, **settings)) / dense
        if lower <= ratio <= upper:
            return chosen
        ratios[strength] = round(ratio, 3)
        if ratio < lower:
            break
    raise ValueError(
        f"no decay has a flip rate of {lower} to {upper} times that of dense training; by strength it is {ratios}: "
        "try strengths between the last two, or stronger ones where all are above"
    )


def _flip_rate(opt_state: Any) -> float:
    """Of all entries of all masks, in the last refresh."""
    flips, entries = 0.0, 0
    for state in states(opt_state):
        if not (state.stats.step > 0).all():
            raise ValueError(
                "the probe ended before a refresh: train for more updates than refresh_every, or refresh more often"
            )
        sizes = [mask.size for mask in jax.tree.leaves(state.masks)]
        flips += float(jnp.sum(state.stats.flip_rate * jnp.array(sizes, jnp.float32)))
        entries += sum(sizes)
    return flips / entries
