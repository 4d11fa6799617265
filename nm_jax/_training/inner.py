"""What an inner transformation may not do: evaluate the loss itself, at dense weights."""

from typing import Any

import jax
import optax


def refuse_line_searches(inner_state: Any) -> None:
    """Raises a ValueError for the state of a line search."""
    searches = (optax.ScaleByBacktrackingLinesearchState, optax.ScaleByZoomLinesearchState)

    def is_search(node):
        return isinstance(node, searches)

    if any(is_search(node) for node in jax.tree.leaves(inner_state, is_leaf=is_search)):
        raise ValueError(
            "sparse_training cannot wrap a line search, which would evaluate the loss at dense weights; "
            "use an optimiser with a learning rate (optax.lbfgs: pass linesearch=None)"
        )
