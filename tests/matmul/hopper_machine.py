"""Runs the PTX of the Hopper kernel without a GPU: one cluster of blocks after another, warp by warp in random order.

A GPU may run warps in any order and land copies at any time; here a seed picks one. What would be a race is an error:

- asynchronous copies (TMA, with swizzle and multicast) land at a random time, and never onto operands of products that
  have not retired, nor into a block that has ended;
- products (`wgmma`) read shared memory only when their group retires; until then their sums are off limits;
- what threads wrote shows to asynchronous copies only after a proxy fence; what such a copy still reads is not written;
- a barrier that gets too many arrivals, a warp that ends with work in flight, and a deadlock are errors too.

Shared memory starts as NaN.
"""

import dataclasses
import random
import re
from typing import Any

import numpy as np

from tests.matmul import ptx

SHARED_BYTES = 232448
BYTES = {"bf16": 2, "f16": 2, "i32": 4}
PARAMETER = 0x7000_0000_0000  # where the kernel's parameter lies: its descriptors, 128 bytes each
DESCRIPTOR_BYTES = 128
SWIZZLE_BITS = {128: 7, 64: 3, 32: 1, 16: 0}  # of the address bits 7, 8, 9, by the width of the swizzle


class Race(Exception):
    """What a GPU might do wrong, or might not."""


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """What a TMA descriptor says: how a box of an array in global memory lies in shared memory.

    Attributes:
      dtype: of the array, as MLIR names it.
      shape: of the array, cut into the pieces that a swizzle asks for.
      strides: of the array, in entries.
      swizzle: bytes; 16 is none.
      box: what one copy moves.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    swizzle: int
    box: tuple[int, ...]

    def entries(self, coordinates):
        """(index in the array of every entry of a box, whether it is inside of the array)."""
        index, inside = np.zeros(self.box, np.int64), np.ones(self.box, bool)
        for dim, (start, size, stride) in enumerate(zip(coordinates, self.box, self.strides, strict=True)):
            along = (start + np.arange(size)).reshape([-1 if d == dim else 1 for d in range(len(self.box))])
            index = index + along * stride
            inside = inside & (along >= 0) & (along < self.shape[dim])
        return index.reshape(-1), inside.reshape(-1)

    def shared(self, start):
        """Where the bytes of a box lie in shared memory."""
        if self.swizzle > 16 and start % (8 * self.swizzle):
            raise Race(f"a tile at {start} is not aligned to its swizzle of {self.swizzle} bytes")
        return swizzled(start + np.arange(int(np.prod(self.box)) * BYTES[self.dtype], dtype=np.int64), self.swizzle)


def swizzled(address, width):
    """Address bits 4, 5, 6 (as many as the width has) are exclusive-ored with bits 7, 8, 9."""
    return address ^ ((address >> 7 & SWIZZLE_BITS[width]) << 4)


@dataclasses.dataclass
class Load:
    """A TMA load on its way: a box for the shared memory of some blocks, and the barrier that it reports to in each."""

    descriptor: int
    coordinates: list[int]
    blocks: list[Any]
    start: int
    barrier: int


class Barrier:
    """An mbarrier: its phase flips when all arrivals and all announced bytes are in."""

    def __init__(self, count):
        self.count = self.pending = count
        self.bytes = self.phase = 0

    def arrive(self, arrivals=0, expected=0):
        """Counts arrivals; expects more bytes, or, if negative, has received them."""
        self.pending -= arrivals
        self.bytes += expected
        if self.pending < 0:
            raise Race("too many arrivals at a barrier")
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count


class Meeting:
    """A barrier of warps: `bar.sync` of a block, or that of a cluster."""

    def __init__(self):
        self.phase, self.here = 0, set()

    def arrive(self, warp, count):
        """The phase that has to pass before the warp goes on."""
        if warp in self.here:
            raise Race("a warp arrives twice at a barrier")
        self.here.add(warp)
        goal = self.phase
        if len(self.here) == count:
            self.here, self.phase = set(), self.phase + 1
        return goal


class Cta:
    """One block: its shared memory, barriers and warps."""

    def __init__(self, machine, index, rank, make_warp):
        self.machine, self.index, self.rank = machine, index, rank
        size = machine.base_address + SHARED_BYTES
        self.shared = np.full(size, 0xFF, np.uint8)
        self.unfenced = np.full(size, -1, np.int16)  # the warp that wrote a byte, until its proxy fence
        self.stored = np.zeros(size, np.int16)  # TMA stores that still read a byte
        self.barriers, self.meetings = {}, {}
        self.warps = [make_warp(self, warp) for warp in range(machine.program.threads // 32)]

    @property
    def ended(self):
        return all(warp.done for warp in self.warps)


class Machine:
    """Runs a program over a grid of clusters.

    Args:
      text: PTX of a module with one kernel.
      descriptors: of the kernel's arrays, in the order of its parameter.
      arrays: numpy arrays in the same order; what the kernel writes is written into the last one.
      seed: of the order of warps and copies.
      base_address: where shared memory starts.
    """

    def __init__(self, text, descriptors, arrays, seed, base_address=1024):
        self.program = ptx.Program(simplified(text))
        cluster = re.search(r"\.reqnctapercluster (\d+)", text)
        self.cluster = int(cluster[1]) if cluster else 1
        self.descriptors, self.arrays, self.base_address = descriptors, arrays, base_address
        self.random = random.Random(seed)
        self.counts = {}
        self.written = np.zeros(arrays[-1].size, np.int32)

    def run(self, clusters, make_warp):
        for cluster in range(clusters):
            self.loads, self.meeting = [], Meeting()
            ranks = range(self.cluster)
            self.ctas = [Cta(self, cluster * self.cluster + rank, rank, make_warp) for rank in ranks]
            warps = [warp for cta in self.ctas for warp in cta.warps]
            while alive := [warp for warp in warps if not warp.done]:
                self.step(alive)
            if self.loads or any(warp.busy for warp in warps):
                raise Race("a block ended with work in flight")

    def step(self, alive):
        """Lands a copy, or runs some instructions of a warp."""
        ready = [warp for warp in alive if warp.blocked is None or warp.blocked()]
        if self.loads and (not ready or self.random.random() < 0.15):
            self.land(self.loads.pop(self.random.randrange(len(self.loads))))
        elif ready:
            self.random.choice(ready).step(self.random.choice((1, 3, 10, 60, 400)))
        else:
            raise Race(f"deadlock: warps wait at {sorted({self.program.instructions[warp.at][2] for warp in alive})}")

    def land(self, load):
        descriptor = self.descriptors[load.descriptor]
        index, inside = descriptor.entries(load.coordinates)
        entries = self.arrays[load.descriptor].reshape(-1).view(np.uint8).reshape(-1, BYTES[descriptor.dtype])
        data = np.where(inside[:, None], entries[np.where(inside, index, 0)], 0).astype(np.uint8).reshape(-1)
        where = descriptor.shared(load.start)
        for cta in load.blocks:
            for warp in cta.warps:
                warp.check_operands_stay(where)
            cta.shared[where], cta.unfenced[where] = data, -1
            cta.barriers[load.barrier].arrive(expected=-data.size)

    def store(self, cta, which, coordinates, start):
        """A TMA store reads shared memory."""
        descriptor = self.descriptors[which]
        index, inside = descriptor.entries(coordinates)
        where = descriptor.shared(start)
        width = BYTES[descriptor.dtype]
        target = self.arrays[which].reshape(-1).view(np.uint8).reshape(-1, width)
        target[index[inside]] = cta.shared[where].reshape(-1, width)[inside]
        self.written[index[inside]] += 1
        cta.stored[where] -= 1


def simplified(text):
    """The program with blocks of inline assembly made plain instructions."""
    text = text[text.index(".visible .entry") :]
    text = re.sub(r"//[^\n]*", "", text)
    text = text[: text.rindex(".section")] if ".section" in text else text
    wait = (
        r"\{\s*\.reg \.pred\s+P1;\s*LAB_WAIT:\s*"
        r"mbarrier\.try_wait\.parity\.shared\.b64 P1, (\[%r\d+\]), (%r\d+), %r\d+;"
        r"\s*@P1 bra\.uni DONE;\s*bra\.uni\s+LAB_WAIT;\s*DONE:\s*\}"
    )
    text = re.sub(wait, r"wait_for_phase \1, \2;", text)
    text = re.sub(r"\{ \.reg \.pred add; setp\.ne\.b32 add, 1, 0; (wgmma[^;]*); \}", r"\1;", text)
    mapped = r"\{\s*\.reg \.b32 mapped_addr;(.*?)\}"
    return re.sub(mapped, lambda found: found[1].replace("mapped_addr", "%mapped"), text, flags=re.DOTALL)
