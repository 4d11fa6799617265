"""Tensors that are stored twice: output heads that share the token table, for instance."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from nm_jax._core.rules import DenseLeaf, Leaf, SparseLeaf
from nm_jax.checkpoint._tensor import Tensor

_LOOKED_AT = 1 << 12  # bytes that are compared before all are


def together(tensors: Mapping[str, Tensor], leaves: dict[str, Leaf]) -> dict[str, Leaf]:
    """The leaves, where copies of one tensor that would be treated differently stay dense: readers tie them again, and
    would take either."""
    kinds: dict[tuple, list[str]] = {}
    for name, tensor in tensors.items():
        if len(tensor.shape) > 1 and tensor.copyable:
            kinds.setdefault((tensor.dtype, tensor.shape), []).append(name)
    found = dict(leaves)
    for names in kinds.values():
        if len({_fate(leaves[name]) for name in names}) < 2:
            continue
        starts: dict[bytes, list[str]] = {}
        for name in names:
            starts.setdefault(tensors[name].start(_LOOKED_AT), []).append(name)
        for alike in starts.values():
            for one, *others in _copies(tensors, alike):
                if len({_fate(leaves[name]) for name in (one, *others)}) > 1:
                    for name in (one, *others):
                        found[name] = _left(leaves, name, [other for other in (one, *others) if other != name])
    return found


def _fate(leaf: Leaf) -> tuple:
    return (leaf.pattern, leaf.axes) if isinstance(leaf, SparseLeaf) else ()


def _copies(tensors: Mapping[str, Tensor], names: list[str]) -> list[list[str]]:
    """Names of tensors with the same bytes, if these are not all zero."""
    groups: list[list[str]] = []
    for name in names:
        for group in groups:
            if _same(tensors[group[0]], tensors[name]):
                group.append(name)
                break
        else:
            groups.append([name])
    return [group for group in groups if len(group) > 1 and not _zero(tensors[group[0]])]


def _same(one: Tensor, other: Tensor) -> bool:
    pieces = zip(one.file.pieces(one.name), other.file.pieces(other.name), strict=True)
    return all(a == b for a, b in pieces)


def _zero(tensor: Tensor) -> bool:
    return not any(np.frombuffer(piece, np.uint8).any() for piece in tensor.file.pieces(tensor.name))


def _left(leaves: Mapping[str, Leaf], name: str, others: list[str]) -> Leaf:
    leaf = leaves[name]
    if isinstance(leaf, DenseLeaf):
        return dataclasses.replace(leaf, reason=f"{leaf.reason}; stored twice, as {others[0]!r} too")
    return DenseLeaf(
        name,
        leaf.shape,
        f"stored twice: {others[0]!r} is the same and would be treated otherwise (one rule for both prunes both)",
    )
