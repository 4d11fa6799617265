"""One warp of the machine of `hopper_machine.py`: the instructions that the Hopper kernel uses, and no other."""

import dataclasses
import re

import numpy as np

from tests.matmul import ptx
from tests.matmul.hopper_machine import DESCRIPTOR_BYTES, PARAMETER, Barrier, Load, Meeting, Race, swizzled

CLUSTER_SHIFT = 24  # an address of the cluster is one of a block, with its rank + 1 above these bits


@dataclasses.dataclass
class Product:
    """This warp's 16 rows of a `wgmma` that has not retired."""

    registers: list[str]
    left: np.ndarray  # addresses of the kept values, (16, 16)
    right: np.ndarray  # addresses of X, (tokens, 32)
    words: np.ndarray
    selector: int
    dtype: np.dtype

    def sums(self, shared):
        """The product, as the lanes hold it: register -> 32 lanes."""
        memory = shared.view(np.uint16)
        kept, right = (memory[at // 2].view(self.dtype).astype(np.float32) for at in (self.left, self.right))
        dense = np.zeros((16, 32), np.float32)
        for row, group in np.ndindex(16, 8):
            word = int(self.words[4 * (row % 8) + 2 * self.selector + group // 4])
            nibble = word >> (16 * (row // 8) + 4 * (group % 4)) & 15
            assert nibble & 3 < nibble >> 2, "metadata is not in order"
            dense[row, 4 * group + (nibble & 3)] = kept[row, 2 * group]
            dense[row, 4 * group + (nibble >> 2)] = kept[row, 2 * group + 1]
        product = dense @ right.T
        rows = [ptx.G + 8 * (k // 2 % 2) for k in range(len(self.registers))]
        columns = [8 * (k // 4) + 2 * ptx.T + k % 2 for k in range(len(self.registers))]
        return {name: product[row, column] for name, row, column in zip(self.registers, rows, columns, strict=True)}


class Warp(ptx.Block):
    """32 threads in step: registers, and work in flight."""

    def __init__(self, cta, index):
        self.cta, self.machine, self.index = cta, cta.machine, index
        self.program, self.counts = cta.machine.program, cta.machine.counts
        self.threads, self.at, self.done, self.blocked = 32, 0, False, None
        threads = np.arange(32 * index, 32 * index + 32, dtype=np.uint32)
        ranks = {"%ctaid.x": self.splat(cta.index, 32), "%cluster_ctaid.x": self.splat(cta.rank, 32)}
        self.registers = {"%tid.x": threads, **ranks}
        self.open, self.groups, self.committed, self.retired = [], [], 0, 0  # products
        self.locked = set()  # registers of their sums
        self.stores = []

    @property
    def busy(self):
        return bool(self.groups or self.open or self.stores)

    @property
    def in_flight(self):
        return [*self.open, *(product for group in self.groups for product in group)]

    # ------------------------------------------------------------------------------------------------- instructions

    def step(self, instructions):
        """Runs until the warp waits, ends, or has run so many instructions."""
        self.blocked = None
        for _ in range(instructions):
            predicate, wanted, opcode, operands = self.program.instructions[self.at]
            name = opcode.split(".")[0]
            self.counts[name] = self.counts.get(name, 0) + 1
            self.at += 1
            if name == "ret":
                self.done = True
                return
            if name == "bra":
                if predicate is None or self.uniform(predicate) == wanted:
                    self.at = self.program.labels[operands[0]]
                continue
            self.mask = np.ones(32, bool) if predicate is None else self.registers[predicate] == wanted
            if self.mask.any():
                self.execute(opcode, operands)
            if self.blocked is not None:
                return

    def wait(self, until):
        if not until():
            self.blocked = until

    def one(self, values):
        """The value that the active threads agree on."""
        values = np.asarray(values)[self.mask]
        assert (values == values[0]).all(), "the active threads differ"
        return int(values[0])

    def value(self, operand, bits):
        if operand.startswith("__dynamic_shmem"):
            return self.splat(self.machine.base_address + int(operand.partition("+")[2] or 0), bits)
        if operand.endswith("_param_0"):
            return self.splat(PARAMETER, bits)
        if operand in self.locked:
            raise Race(f"{operand} is read while a product that writes it is in flight")
        return super().value(operand, bits)

    def address(self, operand):
        inside = operand.strip("[] ")
        return self.value(inside, 64) if inside.startswith("__dynamic_shmem") else super().address(operand)

    def set(self, register, values):
        if register in self.locked:
            raise Race(f"{register} is written while a product is in flight")
        if not self.mask.all():
            values = np.where(self.mask, values, self.registers.get(register, np.zeros_like(values)))
        self.registers[register] = values

    def execute(self, opcode, operands):
        name = opcode.split(".")[0]
        if opcode.startswith(("prefetch.tensormap", "fence.mbarrier_init", "setmaxnreg", "wgmma.fence")):
            return
        if opcode == "fence.proxy.async.shared::cta":
            self.cta.unfenced[self.cta.unfenced == self.index] = -1
        elif name in ("mbarrier", "wait_for_phase"):
            self.barrier_operation(opcode, operands)
        elif name in ("bar", "barrier"):
            self.meet(opcode, operands)
        elif opcode.startswith("cp.async.bulk"):
            self.bulk_copy(opcode, operands)
        elif name == "wgmma":
            self.warpgroup(opcode, operands)
        elif opcode == "st.shared.b32":
            self.store_shared(operands)
        elif opcode == "elect.sync":
            register, predicate = operands[0].split("|")
            self.registers[register], self.registers[predicate] = self.splat(0, 32), np.arange(32) == 0
        else:
            self.set(operands[0], self.result(opcode, operands[1:]))

    def result(self, opcode, operands):
        """The value of an instruction that writes one register."""
        if opcode == "ld.shared.b32":
            where = self.address(operands[0]).astype(np.int64)[:, None] + np.arange(4)
            return self.cta.shared[where].view(np.uint32)[:, 0]
        if opcode.startswith("mapa"):
            rank = self.value(operands[1], 32) + np.uint32(1)
            return self.value(operands[0], 32) | rank << np.uint32(CLUSTER_SHIFT)
        if opcode.startswith("shfl.sync"):
            source = self.value(operands[1], 32).astype(int)
            return self.value(operands[0], 32)[source if ".idx." in opcode else np.arange(32) ^ source]
        if opcode == "prmt.b32":
            low, high, selectors = (self.value(operand, 32) for operand in operands)
            source = np.stack([low, high], axis=1).view(np.uint8)  # eight bytes of each lane
            chosen = np.stack([selectors >> np.uint32(4 * k) & np.uint32(15) for k in range(4)], axis=1).astype(int)
            return np.take_along_axis(source, chosen, axis=1).view(np.uint32)[:, 0]
        if opcode == "cvta.param.u64":
            return self.value(operands[0], 64)
        name, *parts = opcode.split(".")
        return self.compute(opcode, name, parts, operands)

    # ----------------------------------------------------------------------------------------------------- barriers

    def barrier_operation(self, opcode, operands):
        barriers = self.cta.barriers
        if opcode.startswith("mbarrier.init"):
            barriers[self.one(self.address(operands[0]))] = Barrier(self.one(self.value(operands[1], 32)))
        elif opcode.startswith("mbarrier.arrive.expect_tx"):
            arrivals = int(self.mask.sum())
            expected = arrivals * self.one(self.value(operands[2], 32))
            barriers[self.one(self.address(operands[1]))].arrive(arrivals, expected)
        elif opcode.startswith("mbarrier.arrive.release.cta"):
            barriers[self.one(self.address(operands[1]))].arrive(int(self.mask.sum()))
        elif opcode.startswith("mbarrier.arrive.shared::cluster"):
            for address in self.address(operands[1])[self.mask].astype(int):
                cta = self.machine.ctas[(address >> CLUSTER_SHIFT) - 1]
                if cta.ended:
                    raise Race("an arrival at a block that has ended")
                cta.barriers[address & ((1 << CLUSTER_SHIFT) - 1)].arrive(1)
        elif opcode == "wait_for_phase":
            barrier = barriers[self.one(self.address(operands[0]))]
            parity = self.one(self.value(operands[1], 32))
            self.wait(lambda: barrier.phase != parity)
        else:
            raise NotImplementedError(opcode)

    def meet(self, opcode, operands):
        machine = self.machine
        if opcode == "bar.sync":
            count = self.one(self.value(operands[1], 32)) if len(operands) > 1 else self.program.threads
            meeting = self.cta.meetings.setdefault(self.one(self.value(operands[0], 32)), Meeting())
            goal = meeting.arrive(self, count // 32)
            self.wait(lambda: meeting.phase > goal)
        elif opcode.startswith("barrier.cluster.arrive"):
            self.goal = machine.meeting.arrive(self, machine.cluster * self.program.threads // 32)
        elif opcode.startswith("barrier.cluster.wait"):
            goal = self.goal
            self.wait(lambda: machine.meeting.phase > goal)
        else:
            raise NotImplementedError(opcode)

    # ---------------------------------------------------------------------------------------- shared memory, copies

    def store_shared(self, operands):
        where = self.address(operands[0]).astype(np.int64)[:, None] + np.arange(4)
        if self.cta.stored[where].any():
            raise Race("shared memory is written while a copy still reads it")
        self.cta.shared[where] = self.value(operands[1], 32)[:, None].view(np.uint8).reshape(32, 4)
        self.cta.unfenced[where] = self.index

    def bulk_copy(self, opcode, operands):
        if opcode.endswith("commit_group"):
            return
        if "wait_group" in opcode:
            for which, coordinates, start in self.stores:
                self.machine.store(self.cta, which, coordinates, start)
            self.stores = []
            return
        assert self.mask.sum() == 1, "a bulk copy by several threads"
        if ".global.shared::cta" in opcode:
            job = (*self.tensor(operands[0]), self.one(self.address(operands[1])))
            where = self.machine.descriptors[job[0]].shared(job[2])
            if (self.cta.unfenced[where] >= 0).any():
                raise Race("a copy reads bytes that were written without a proxy fence")
            self.cta.stored[where] += 1
            self.stores.append(job)
            return
        blocks = [self.cta]
        if "multicast" in opcode:
            mask = self.one(self.value(operands[3], 16))
            blocks = [cta for cta in self.machine.ctas if mask >> cta.rank & 1]
        if any(cta.ended for cta in blocks):
            raise Race("a multicast to a block that has ended")
        start, barrier = (self.one(self.address(operand)) for operand in (operands[0], operands[2]))
        self.machine.loads.append(Load(*self.tensor(operands[1]), blocks, start, barrier))

    def tensor(self, operand):
        """(which descriptor, coordinates from the slowest dimension on) of a tensor operand."""
        descriptor, listed = re.fullmatch(r"\[(%\w+), ?(\{.*\}) ?\]", operand).groups()
        which = (self.one(self.value(descriptor, 64)) - PARAMETER) // DESCRIPTOR_BYTES
        signed = [self.one(self.signed(register, 32)) for register in ptx.listed(listed)]
        return which, signed[::-1]

    def check_operands_stay(self, where):
        """Raises if a copy lands on operands of a product in flight."""
        if not self.in_flight:
            return
        hit = np.zeros(self.cta.shared.size, bool)
        hit[where] = True
        if any(hit[product.left].any() or hit[product.right].any() for product in self.in_flight):
            raise Race("a copy lands on operands of a product in flight")

    # ----------------------------------------------------------------------------------------------------- products

    def warpgroup(self, opcode, operands):
        if opcode == "wgmma.commit_group.sync.aligned":
            self.groups.append(self.open)
            self.open, self.committed = [], self.committed + 1
        elif opcode.startswith("wgmma.wait_group"):
            self.wait_for_products(self.committed - int(operands[0]))
        else:
            self.open.append(self.product(opcode, operands))
            self.locked.update(self.open[-1].registers)

    def product(self, opcode, operands):
        tokens, half = re.fullmatch(
            r"wgmma\.mma_async\.sp\.sync\.aligned\.m64n(\d+)k32\.f32\.(\w+)\.\2", opcode
        ).groups()
        assert operands[5:] == ["add", "1", "1", "0", "0"], operands[5:]  # D = A B + D, nothing negated or transposed
        left, right = (self.one(self.value(operand, 64)) for operand in operands[1:3])
        rows = slice(16 * (self.index % 4), 16 * (self.index % 4) + 16)
        return Product(
            ptx.listed(operands[0]),
            read_addresses(left, 64, 16)[rows],
            read_addresses(right, int(tokens), 32),
            self.value(operands[3], 32).copy(),
            int(operands[4]),
            np.dtype(ptx.HALVES[half]),
        )

    def wait_for_products(self, goal):
        """Until the groups before `goal` have retired, which takes all four warps of the warpgroup."""
        first = self.index // 4 * 4
        group = self.cta.warps[first : first + 4]

        def committed():
            return all(warp.committed >= goal for warp in group)

        if not committed():
            self.at -= 1  # comes back to this instruction
            self.blocked = committed
            return
        for warp in group:
            while warp.retired < goal:
                warp.retire()

    def retire(self):
        for product in self.groups.pop(0):
            for register, sums in product.sums(self.cta.shared).items():
                total = self.registers[register].view(np.float32) + sums
                self.registers[register] = total.astype(np.float32).view(np.uint32)
        self.retired += 1
        self.locked = {register for product in self.in_flight for register in product.registers}


def read_addresses(descriptor, rows, columns):
    """Where a tensor core reads an operand: rows eight by eight, `stride` bytes apart, through the swizzle."""
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    width = {1: 128, 2: 64, 3: 32}[descriptor >> 62]
    assert descriptor >> 49 & 7 == 0, "no base offset is expected"
    row, column = np.ogrid[:rows, :columns]
    return swizzled(start + row // 8 * stride + row % 8 * width + 2 * column, width)
