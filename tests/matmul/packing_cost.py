"""What packing costs, in bytes of memory traffic for each entry of a weight of 16 bits.

Counted in the programs that XLA makes for an H100 (`traffic`); `test_compile.py` holds these figures against them.
"""

import dataclasses
import re

IN_PRODUCT = {"forward": 5.6, "backward": 5.1}
"""One side, packed by the product that reads it, which takes what is zero for pruned."""
AT_ONCE = 15.3
"""Both sides of `nm.pack_params`, whose positions are known."""
PACK = {("forward", True): 13.3, ("backward", True): 9.3, ("forward", False): 12.3, ("backward", False): 8.3}
"""One side of `nm.pack`, with a mask and without."""

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_NOTHING_MOVES = ("parameter", "bitcast", "get-tuple-element", "tuple", "constant")


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
    return Packing(batches * (IN_PRODUCT["forward"] * (1 + remat) + IN_PRODUCT["backward"]), AT_ONCE)


def traffic(program: str) -> int:
    """Bytes that the kernels of a compiled program read and write, each operand and each result once."""
    sizes: dict[str, int] = {}
    aliases: dict[str, str] = {}
    total = 0
    for line in program[program.index("ENTRY") :].splitlines()[1:]:
        found = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(?:,|$)", line)
        if not found:
            continue
        name, shape, operation, operands = found.groups()
        sizes[name] = sum(_BYTES[dtype] * _entries(dims) for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape))
        read = {operand.strip().lstrip("%") for operand in operands.split(",")}
        if operation == "bitcast":
            (source,) = read
            aliases[name] = aliases.get(source, source)
        if operation not in _NOTHING_MOVES:
            total += sizes[name] + sum(sizes.get(operand, 0) for operand in {aliases.get(r, r) for r in read})
    return total


def _entries(dims: str) -> int:
    product = 1
    for size in filter(None, dims.split(",")):
        product *= int(size)
    return product
