"""Patterns that masks have before they have that of the rules: with fewer zeros, or along one axis only."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from nm_jax._core.patterns import NM, Pattern, SequentialNM, TransposableNM, parse_pattern
from nm_jax._core.rules import SparseLeaf

Earlier: TypeAlias = Sequence[tuple[int, str | Pattern | Callable[[Pattern], Pattern]]]


@dataclasses.dataclass(frozen=True)
class Phases:
    """Which pattern masks have when.

    Attributes:
      ends: numbers of updates after which each of the earlier patterns has ended, rising.
      patterns: of each, what makes the pattern of a leaf out of that of the rules.
    """

    ends: tuple[int, ...]
    patterns: tuple[Callable[[Pattern], Pattern], ...]

    @classmethod
    def of(cls, earlier: Earlier, begin_step: int) -> "Phases":
        """Those of (number of updates, pattern), the first first.

        Raises:
          ValueError: for ends that do not rise from `begin_step` on.
        """
        ends = tuple(end for end, _ in earlier)
        if any(after <= before for before, after in zip((begin_step, *ends), ends, strict=False)):
            raise ValueError(f"earlier patterns must end one after another, after begin_step={begin_step}, got {ends}")
        return cls(ends, tuple(_rule(pattern) for _, pattern in earlier))

    def ended(self, step: Int[Array, ""]) -> Int[Array, ""]:
        """How many of the earlier patterns have ended after so many updates."""
        return jnp.sum(step >= jnp.array(self.ends, jnp.int32), dtype=jnp.int32)

    def changes(self, step: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether one ends with update number `step`."""
        return jnp.any(step == jnp.array(self.ends, jnp.int32))

    def leaves(self, leaves: Sequence[SparseLeaf]) -> list[tuple[SparseLeaf, ...]]:
        """The leaves with the pattern that they have in each phase; as the rules have them in the last.

        Raises:
          ValueError: for sizes that an earlier pattern does not fit though that of the rules does.
        """
        phases = [tuple(_with(leaf, rule(leaf.pattern)) for leaf in leaves) for rule in self.patterns]
        return [*phases, tuple(leaves)]


def along_one_axis(pattern: Pattern) -> Pattern:
    """n:m for n:m-T; others stay."""
    return NM(pattern.n, pattern.m) if isinstance(pattern, TransposableNM) else pattern


def denser(share: float | Fraction) -> Callable[[Pattern], Pattern]:
    """Makes patterns of n:m keep more: m - 1 of m for a share of 1, n for 0, rounded up between; others stay."""

    def of(pattern: Pattern) -> Pattern:
        if not isinstance(pattern, NM | TransposableNM | SequentialNM):
            return pattern
        return dataclasses.replace(pattern, n=pattern.n + math.ceil((pattern.m - 1 - pattern.n) * share))

    return of


def _rule(pattern: str | Pattern | Callable[[Pattern], Pattern]) -> Callable[[Pattern], Pattern]:
    if callable(pattern):
        return pattern
    parsed = parse_pattern(pattern)
    return lambda _: parsed


def _with(leaf: SparseLeaf, pattern: Pattern) -> SparseLeaf:
    changed = dataclasses.replace(leaf, pattern=pattern)
    if not leaf.tiling.ragged:
        for axis, size, tile in changed.tiling.ragged:
            raise ValueError(
                f"{leaf.path}: the {axis} axis has size {size}, which {tile} does not divide: the earlier pattern "
                f"{pattern} does not fit where {leaf.pattern} does; choose another for `earlier`"
            )
    return changed
