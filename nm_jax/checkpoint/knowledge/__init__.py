"""What every tensor of a checkpoint is: one file for each source of knowledge, which are asked in this order.

1. `choose`: a rule of the user with axes, and the records of an earlier run.
2. `frameworks`: MLX and Flax, which say that they are.
3. `architectures`: models whose layers are not stored as their names would have it, by `config.json`.
4. `modules`: names that PyTorch's own modules give their parameters.
5. `experts`, `linear`, `convolutions`: names, shapes, and the siblings of a tensor.

The first that knows decides. A tensor that none knows, or that may be two things, stays dense, and its reason says so.
`kept` says what stays dense although its axes may be known. A mask along the wrong axis looks right to every check that
uses the same axis, so that a source here never takes the likelier of two readings.
"""

import dataclasses

from nm_jax.checkpoint.knowledge._contents import Axes as Axes
from nm_jax.checkpoint.knowledge._contents import Contents as Contents
from nm_jax.checkpoint.knowledge.architectures import architecture, is_lookup
from nm_jax.checkpoint.knowledge.convolutions import convolution
from nm_jax.checkpoint.knowledge.experts import experts
from nm_jax.checkpoint.knowledge.frameworks import framework
from nm_jax.checkpoint.knowledge.kept import Kept, kept
from nm_jax.checkpoint.knowledge.linear import linear
from nm_jax.checkpoint.knowledge.modules import torch_module

_SOURCES = (framework, architecture, torch_module, experts, linear, convolution)


@dataclasses.dataclass(frozen=True)
class Finding:
    """What is known of one tensor.

    Attributes:
      axes: its axes and on what they rest; `None` if they are not known.
      kept: why it stays dense unless it is asked for; `None` for a weight that is pruned.
      doubt: why its axes are not known; empty if they are.
    """

    axes: Axes | None
    kept: Kept | None = None
    doubt: str = ""


def identify(contents: Contents, name: str) -> Finding:
    """What a tensor is.

    Args:
      contents: the checkpoint.
      name: its name there.

    Returns:
      Its axes, or why they are not known, and why it stays dense if it does.
    """
    item = contents.items[name]
    if item.ndim < 2:
        return Finding(None, Kept(f"{item.ndim}-D: no contraction and output axes"))
    if is_lookup(item):
        return Finding(None, Kept("an embedding is looked up, not contracted"))
    why = kept(item)
    if why is not None and not why.layer:
        return Finding(None, why, "nothing is known to contract it")
    found = next((said for ask in _SOURCES if (said := ask(item)) is not None), None)
    if isinstance(found, Axes):
        return Finding(found, why)
    return Finding(None, why, "its name does not tell what it is" if found is None else found.reason)
