"""What packing costs, in bytes of memory traffic for each entry of a weight of 16 bits, counted.

Counts for a product are those of the program that XLA makes (`pack`); the least that it could be is less.
"""

import dataclasses

VALUES = 2.0  # an entry that is read
KEPT = 1.0  # half of the entries, that are written
WORDS = 0.125  # two bits of position for each kept entry
# One side packed in the call, without a mask: the weight is read for values and for positions, and its bits are turned
# into flags; forward it is transposed as well.
IN_CALL = {"forward": 5.8 + 4.0, "backward": 5.3 + 4.0}
REPACK = VALUES + WORDS + KEPT
"""One side whose positions are known."""


@dataclasses.dataclass(frozen=True)
class Packing:
    """Bytes per entry that the packing of a layer's weight moves in a training step.

    Attributes:
      in_products: with a weight that every product packs.
      once: with `nm.pack_params`.
    """

    in_products: float
    once: float


def packing(batches: int, remat: bool = False) -> Packing:
    """The packing of a transposable weight in a step of so many batches, whose forward pass may be computed again."""
    in_products = batches * (IN_CALL["forward"] * (1 + remat) + IN_CALL["backward"])
    return Packing(in_products, 2 * REPACK)
