"""The inner transformation, which may not evaluate the loss itself: it would do so at dense weights."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax


def refuse_line_searches(inner_state: Any) -> None:
    """Raises a ValueError for the state of a line search, before it has asked for anything."""
    searches = (optax.ScaleByBacktrackingLinesearchState, optax.ScaleByZoomLinesearchState)

    def is_search(node):
        return isinstance(node, searches)

    if any(is_search(node) for node in jax.tree.leaves(inner_state, is_leaf=is_search)):
        raise ValueError(
            "sparse_training cannot wrap a line search, which would evaluate the loss at dense weights; "
            "use an optimiser with a learning rate (optax.lbfgs: pass linesearch=None)"
        )


def not_to_be_called(extra_args: dict[str, Any]) -> dict[str, Any]:
    """The extra arguments of an update, with functions that raise a ValueError when they are called.

    A function is there to evaluate the loss or its gradient (line searches, SAM in opaque mode, Sophia), whatever the
    transformation that does it is called.
    """
    return {name: _refused(name, value) if callable(value) else value for name, value in extra_args.items()}


def _refused(name: str, function: Callable) -> Callable:
    @functools.wraps(function, updated=())
    def refuse(*args, **kwargs):
        del args, kwargs
        raise ValueError(
            f"the optimiser inside sparse_training calls {name!r}, as a line search does; that would evaluate the loss "
            "at dense weights, which no model has; use an optimiser that needs gradients alone"
        )

    return refuse
