"""Runs the PTX of the Ampere kernel without a GPU: an interpreter of the instructions that it uses, and of no other.

The threads of a block go in step, as rows of numpy arrays. Memory is stricter than that of a GPU: shared memory starts
as garbage, an asynchronous copy lands when it is waited for and shows after the barrier that follows, and a copy onto
bytes read since the last barrier is an error.
"""

import operator
import re

import ml_dtypes
import numpy as np

UNSIGNED = {16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {16: np.int16, 32: np.int32, 64: np.int64}
HALVES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}
ARITHMETIC = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "shl": operator.lshift,
    "shr": operator.rshift,
    "min": np.minimum,
}
COMPARISONS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
LOGIC = {"and": operator.and_, "or": operator.or_, "xor": operator.xor, "not": operator.invert}
SHARED_BYTES = 164 * 1024
LANE = np.arange(32)
G, T = LANE >> 2, LANE & 3


def run(ptx, buffers, blocks):
    """Runs a kernel over a one-dimensional grid.

    Args:
      ptx: text of a module with one kernel.
      buffers: one numpy array for each parameter, in order; what the kernel writes is written into them.
      blocks: how many blocks.

    Returns:
      How often each operation ran, by its name up to the first dot.
    """
    program = Program(ptx)
    memory = Memory(buffers)
    counts = {}
    for block in range(blocks):
        Block(program, memory, block, counts).run()
    return counts


class Program:
    """Instructions as (predicate, wanted value, opcode, operands), and where the labels are."""

    def __init__(self, ptx):
        entry = ptx[ptx.index(".entry") :]
        head, body = entry.split("{", 1)
        self.params = re.findall(r"(\w+_param_\d+)", head)
        self.threads = int(re.search(r"\.(?:reqntid|maxntid) (\d+)", head)[1])
        self.instructions, self.labels = [], {}
        body = re.sub(r"//[^\n]*", "", body[: body.rindex("}")])
        for line in body.split("\n"):
            line = line.strip()
            if label := re.match(r"(\$\w+):", line):
                self.labels[label[1]] = len(self.instructions)
                line = line[label.end() :].strip()
            if not line.startswith("."):
                self.instructions += [parse(text) for text in map(str.strip, line.split(";")) if text]


def parse(text):
    found = re.match(r"(?:@(!?)(%\w+)\s+)?(\S+)\s*(.*)$", text, re.DOTALL)
    negated, predicate, opcode, rest = found.groups()
    operands = [operand.strip() for operand in re.findall(r"\s*(\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*)", rest)]
    return predicate, not negated, opcode, operands


class Memory:
    """Global memory: every buffer at an address of its own, far from the others."""

    def __init__(self, buffers):
        self.bytes = [buffer.reshape(-1).view(np.uint8) for buffer in buffers]
        self.starts = [(k + 1) << 32 for k in range(len(buffers))]

    def at(self, address, width):
        """(buffer, index of each byte) of accesses of `width` bytes, one for each thread."""
        which = int(address[0] >> 32) - 1
        index = (address - np.uint64(self.starts[which])).astype(np.int64)[:, None] + np.arange(width)
        if index.min() < 0 or index.max() >= self.bytes[which].size:
            raise IndexError(f"access to {index.min()}..{index.max()} of the {self.bytes[which].size} bytes of {which}")
        return self.bytes[which], index


class Block:
    """One block of threads: its registers, shared memory and copies on their way."""

    def __init__(self, program, memory, block, counts):
        self.program, self.memory, self.counts = program, memory, counts
        self.threads = program.threads
        self.registers = {"%tid.x": np.arange(self.threads, dtype=np.uint32), "%ctaid.x": self.splat(block, 32)}
        self.shared = np.full(SHARED_BYTES, 0xAB, np.uint8)
        self.read = np.zeros(SHARED_BYTES, bool)  # since the last barrier
        self.issued, self.groups, self.landed = [], [], []

    def run(self):
        at = 0
        while at < len(self.program.instructions):
            predicate, wanted, opcode, operands = self.program.instructions[at]
            name = opcode.split(".")[0]
            self.counts[name] = self.counts.get(name, 0) + 1
            at += 1
            if name == "ret":
                return
            if name == "bra":
                if predicate is None or self.uniform(predicate) == wanted:
                    at = self.program.labels[operands[0]]
                continue
            if predicate is not None:
                raise NotImplementedError(f"predicated {opcode}")
            self.execute(opcode, operands)

    def uniform(self, predicate):
        values = self.registers[predicate]
        assert (values == values[0]).all(), f"threads diverge at {predicate}"
        return bool(values[0])

    def splat(self, value, bits):
        return np.full(self.threads, int(value) & ((1 << bits) - 1), UNSIGNED[bits])

    def value(self, operand, bits):
        """A register or a number, as unsigned integers of `bits` bits."""
        if operand.startswith("0f"):
            return self.splat(int(operand[2:], 16), bits)
        if operand.startswith("__dynamic_shmem"):
            return self.splat(0, bits)
        if not operand.startswith("%"):
            return self.splat(int(operand, 0), bits)
        return self.registers[operand].astype(UNSIGNED[bits])

    def signed(self, operand, bits):
        return self.value(operand, bits).view(SIGNED[bits])

    def address(self, operand):
        register, offset = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand).groups()
        return self.value(register, 64) + self.splat(int(offset or 0), 64)

    def execute(self, opcode, operands):
        name, *parts = opcode.split(".")
        if name == "bar":
            self.barrier()
        elif name == "cp":
            self.copy(parts, operands)
        elif name == "ldmatrix":
            self.load_matrices(operands)
        elif name == "mma":
            self.multiply(opcode, operands)
        elif name == "st":
            self.store(opcode, operands)
        else:
            self.registers[operands[0]] = self.compute(opcode, name, parts, operands[1:])

    def compute(self, opcode, name, parts, operands):
        """The result of an instruction that writes one register."""
        kind = parts[-1]
        bits = int(re.sub(r"\D", "", kind) or 0)
        if name == "ld" and parts[0] == "param::entry":
            return self.splat(self.memory.starts[self.program.params.index(operands[0].strip("[]"))], 64)
        if opcode == "ld.shared.b32":
            return self.from_shared(self.address(operands[0]), 4).view(np.uint32)[:, 0]
        if name in ("mov", "cvta"):
            return self.value(operands[0], bits)
        if name == "cvt" and parts[0] == "rn":
            dtype = HALVES[parts[1].removesuffix("x2")]
            high, low = (self.value(x, 32).view(np.float32).astype(dtype).view(np.uint16) for x in operands)
            return high.astype(np.uint32) << np.uint32(16) | low
        if name == "cvt" and parts[0][0] == parts[1][0] == "u":
            return self.value(operands[0], int(parts[1][1:])).astype(UNSIGNED[int(parts[0][1:])])
        if name == "cvt" and parts == ["s64", "s32"]:
            return self.signed(operands[0], 32).astype(np.int64).view(np.uint64)
        if name == "bfe":
            return self.bit_field(kind, bits, *operands)
        if kind == "pred":
            return LOGIC[name](*(self.registers[operand] for operand in operands))
        if name == "setp":
            read = self.signed if kind.startswith("s") else self.value
            found = COMPARISONS[parts[0]](read(operands[0], bits), read(operands[1], bits))
            if len(parts) == 2:
                return found
            other = self.registers[operands[2].lstrip("!")]
            return LOGIC[parts[1]](found, ~other if operands[2].startswith("!") else other)
        if name == "selp":
            return np.where(self.registers[operands[2]], self.value(operands[0], bits), self.value(operands[1], bits))
        if name == "mul" and parts[0] == "wide":
            read = self.signed if kind.startswith("s") else self.value
            wide = np.int64 if kind.startswith("s") else np.uint64
            product = read(operands[0], bits).astype(wide) * read(operands[1], bits).astype(wide)
            return product.view(np.uint64).astype(UNSIGNED[2 * bits])
        if name == "mad" and parts[0] == "lo":
            first, second, third = (self.value(operand, bits) for operand in operands)
            return first * second + third
        if name == "mul" and parts[0] == "lo":
            return self.value(operands[0], bits) * self.value(operands[1], bits)
        if name == "mul" and parts[0] == "hi" and kind == "u32":
            product = self.value(operands[0], bits).astype(np.uint64) * self.value(operands[1], bits).astype(np.uint64)
            return (product >> np.uint64(32)).astype(np.uint32)
        if name in ("shr", "min") and kind.startswith("s"):
            return ARITHMETIC[name](self.signed(operands[0], bits), self.signed(operands[1], bits)).view(UNSIGNED[bits])
        if name in ARITHMETIC and name != "mul":
            return ARITHMETIC[name](self.value(operands[0], bits), self.value(operands[1], bits))
        raise NotImplementedError(f"{opcode} {', '.join(operands)}")

    def bit_field(self, kind, bits, operand, start, length):
        """So many bits from a start on; of a signed kind, the last of them is the sign."""
        value, start, length = self.value(operand, bits), int(start), int(length)
        if not 0 < length <= bits - start:
            raise NotImplementedError(f"bfe of {length} bits from {start} on")
        field = value >> value.dtype.type(start) & value.dtype.type((1 << length) - 1)
        if kind.startswith("u"):
            return field
        left = SIGNED[bits](bits - length)
        return (field.view(SIGNED[bits]) << left >> left).view(value.dtype)

    def barrier(self):
        for where, data in self.landed:
            self.shared[where] = data
        self.landed = []
        self.read[:] = False

    def copy(self, parts, operands):
        """`cp.async` and what waits for it."""
        if parts[1] == "commit_group":
            self.groups.append(self.issued)
            self.issued = []
        elif parts[1] == "wait_group":
            while len(self.groups) > int(operands[0]):
                self.landed += self.groups.pop(0)
        else:
            width = int(operands[2])
            where = self.address(operands[0]).astype(np.int64)[:, None] + np.arange(width)
            if self.read[where].any():
                raise RuntimeError("a copy begins onto shared memory that was read since the last barrier")
            buffer, index = self.memory.at(self.address(operands[1]), width)
            self.issued.append((where, buffer[index]))

    def from_shared(self, address, width):
        where = address.astype(np.int64)[:, None] + np.arange(width)
        self.read[where] = True
        return self.shared[where]

    def load_matrices(self, operands):
        """Lanes 8 q to 8 q + 7 name the rows of matrix q; lane l gets the l-th pair of entries of each matrix."""
        rows = self.from_shared(self.address(operands[1]), 16)
        loaded = rows.view(np.uint32).reshape(-1, 4, 32)  # warp, matrix, lane
        for matrix, register in enumerate(listed(operands[0])):
            self.registers[register] = loaded[:, matrix].reshape(-1)

    def store(self, opcode, operands):
        if opcode != "st.global.v4.b32":
            raise NotImplementedError(opcode)
        data = np.stack([self.value(x, 32) for x in listed(operands[1])], axis=1)
        buffer, index = self.memory.at(self.address(operands[0]), 16)
        buffer[index] = data.view(np.uint8)

    def multiply(self, opcode, operands):
        if not opcode.startswith("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32."):
            raise NotImplementedError(opcode)
        dtype, selector = HALVES[opcode.split(".")[-2]], int(operands[5])
        a, b, c = (np.stack([self.value(x, 32) for x in listed(group)], axis=1) for group in operands[1:4])
        a, b = (x.view(np.uint16).view(dtype).reshape(-1, 32, 4, 2) for x in (a, b))
        words = self.value(operands[4], 32).reshape(-1, 32)
        sums = mma_sp(a, b, c.view(np.float32).reshape(-1, 32, 4), words, selector)
        for k, register in enumerate(listed(operands[0])):
            self.registers[register] = sums[:, :, k].reshape(-1).view(np.uint32)


def mma_sp(a, b, c, words, selector):
    """`mma.sp.m16n8k32` from the registers of the lanes alone (PTX ISA, matrix fragments for sparse mma).

    Args:
      a: (warps, 32 lanes, 4 registers, 2 entries) of the kept values, 16 x 16.
      b: likewise of the dense 32 x 8 operand.
      c: (warps, 32, 4) sums.
      words: (warps, 32) metadata.
      selector: 0 or 1.
    """
    warps = len(words)
    warp = np.arange(warps)[:, None]
    left, right = np.zeros((warps, 16, 32), np.float32), np.zeros((warps, 32, 8), np.float32)
    for register in range(4):
        row, group = G + 8 * (register & 1), T + 4 * (register >> 1)
        source = LANE - T + 2 * selector + (register >> 1)
        nibbles = words[:, source] >> (16 * (register & 1) + 4 * (group % 4)).astype(np.uint32) & 15
        first, second = (nibbles & 3).astype(int), (nibbles >> 2).astype(int)
        assert (first < second).all(), "metadata is not in order"
        left[warp, row, 4 * group + first] = a[:, :, register, 0]
        left[warp, row, 4 * group + second] = a[:, :, register, 1]
        for half in range(2):
            right[:, 2 * T + 8 * register + half, G] = b[:, :, register, half]
    product = left @ right
    sums = [product[:, G + 8 * (k >> 1), 2 * T + (k & 1)] for k in range(4)]
    return c + np.stack(sums, axis=2)


def listed(operand):
    return [register.strip() for register in operand.strip("{} ").split(",")]
