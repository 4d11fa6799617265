"""What can be known of a leaf without tracing the model."""

import dataclasses
from typing import TypeAlias


@dataclasses.dataclass(frozen=True)
class Known:
    """Its axes, and on what they rest."""

    axes: str
    source: str


@dataclasses.dataclass(frozen=True)
class Stays:
    """It is not contracted, or nothing says that it is: it stays dense."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Doubt:
    """A weight of a layer whose axes have several readings.

    Attributes:
      readings: the axes that it may have, the likeliest first; not all of them are known where `swap` is not all.
      why: what leaves them open.
    """

    readings: tuple[str, ...]
    why: str


Verdict: TypeAlias = Known | Stays | Doubt


def settled(verdict: Verdict, tile: tuple[int, int] | None) -> Verdict:
    """A doubt that makes no difference to a pattern is none: with square tiles (transposable) a mask of W is one of
    W^T, and a pattern without tiles has no axes at all."""
    if not isinstance(verdict, Doubt):
        return verdict
    first = verdict.readings[0]
    swapped = first.translate(str.maketrans("io", "oi"))
    if tile is not None and tile[0] == tile[1] and set(verdict.readings) == {first, swapped}:
        return Known(first, f"the same in both orientations, which are open: {verdict.why}")
    return Known(first, "no axes needed") if tile is None else verdict
