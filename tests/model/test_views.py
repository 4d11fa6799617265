"""Where the entries of a parameter are, after they have been moved about."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nm_jax._model.tracing._jaxpr import opened
from nm_jax._model.tracing.views import Atom, View, moved, reshaped, sliced


def test_views_follow_entries_wherever_they_move():
    """Random transposes, reshapes, slices and reversals: the entries that a view names are those that are there."""
    followed = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        original = np.arange(2 * 6 * 4).reshape(2, 6, 4)
        value, view = jnp.asarray(original), View.of(0, original.shape)
        for _ in range(4):
            move = _random_move(rng, value.shape)
            for eqn in jaxpr_of(move, value).eqns:  # none, if it moves nothing
                view = view and moved(eqn, view, 0)
            value = move(value)
        if view is not None:  # otherwise a reshape that no product of runs describes
            followed += 1
            index = _entries(view, original.shape)
            np.testing.assert_array_equal(original.reshape(-1)[index], np.asarray(value).reshape(-1))
    assert followed >= 20


def _random_move(rng, sizes):
    kind = rng.integers(4)
    if kind == 0:
        order = tuple(int(k) for k in rng.permutation(len(sizes)))
        return lambda x: lax.transpose(x, order)
    if kind == 1:
        total, out = int(np.prod(sizes)), []
        while total > 1:
            divisors = [d for d in range(2, total + 1) if total % d == 0]
            out.append(int(rng.choice(divisors)))
            total //= out[-1]
        return lambda x: lax.reshape(x, tuple(out) or (1,))
    if kind == 2:
        dims = tuple(k for k in range(len(sizes)) if rng.random() < 0.5)
        return lambda x: lax.rev(x, dims)
    starts = [int(rng.integers(size)) for size in sizes]
    return lambda x: lax.slice(x, starts, sizes)


def _entries(view, sizes):
    """Flat indices of the entries of a view, and of what its dimensions were fixed to."""
    index = np.zeros(1, int)
    strides = {2: 1, 1: sizes[2], 0: sizes[1] * sizes[2]}
    for atom in (atom for dim in view.dims for atom in dim):
        steps = (atom.offset + atom.stride * np.arange(atom.size)) * strides[atom.dim]
        index = (index[:, None] + steps).reshape(-1)
    return index


def test_reshapes_that_cut_a_run_unevenly_have_no_view():
    dims = ((Atom(0, 6),), (Atom(1, 4),))
    assert reshaped(dims, (24,)) == ((Atom(0, 6), Atom(1, 4)),)
    assert reshaped(dims, (3, 8)) == ((Atom(0, 3, 2),), (Atom(0, 2), Atom(1, 4)))
    assert reshaped(dims, (4, 6)) is None
    assert reshaped(((Atom(0, 1), Atom(1, 4)),), (4,)) == ((Atom(0, 1), Atom(1, 4)),)


def test_slices_of_merged_dimensions_need_whole_runs():
    merged = (Atom(0, 6), Atom(1, 4))
    assert sliced(merged, 4, 12) == (Atom(0, 2, 1, 1), Atom(1, 4))
    assert sliced(merged, 2, 12) is None
    assert sliced((Atom(0, 6),), 1, 6, 2) == (Atom(0, 3, 2, 1),)
    assert sliced((Atom(0, 6),), 3, 3) is None


def jaxpr_of(function, *args):
    return opened(jax.make_jaxpr(function)(*args)).jaxpr
