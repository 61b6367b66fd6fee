"""Execute PTX as Triton emits it for sm_80 to 89 and sm_120, in numpy, and report what a GPU would not.

The threads of up to `TOGETHER` blocks run in lock-step, an element of every array for each, until the blocks part.

What is checked: every access lies in the memory that was handed over and is aligned; all threads of a block branch
alike, so no barrier can hang; between two barriers nothing that one thread writes is read by another, or written by
another with a different value; nobody touches what a `cp.async` still copies; and nothing that one block writes is
read by another, or written by another with a different value. What is not: ptxas and what it makes of the PTX, timing,
and how a GPU rounds `ex2.approx`, `div.full` and the sums of a matrix product, which here round as float32 does.
`ptx_memory.py` has the checks, `ptx_operations.py` the instructions.
"""

from __future__ import annotations

import copy
import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ptx_memory import BLOCK_SHIFT, INTERVAL_SHIFT, Access, Region
from ptx_operations import BITS, NO_GUARD, Fault, Handler, Instruction, constant, find, parts

TOGETHER = 32  # blocks
REGION_SHIFT = 40  # an address is the number of its region, and a place there
REGISTERS = {"p": np.dtype(bool), "rs": BITS[2], "r": BITS[4], "rd": BITS[8]}


class Machine:
    """A compiled kernel. problems: what was noticed, with the instructions, and how often."""

    def __init__(self, ptx: str, threads: int, shared_bytes: int) -> None:
        self.threads, self.shared_bytes = threads, -(-max(shared_bytes, 1) // 16) * 16
        self.program, self.labels = parse(ptx)
        self.grains = {"shared": 4, "global": 4}  # ldmatrix and cp.async move no less
        for space, bits in re.findall(r"(?:ld|st)\.(shared|global)\.(?:v\d\.)?[bs](\d+)", ptx):
            self.grains[space] = min(self.grains[space], int(bits) // 8)
        self.problems: Counter[str] = Counter()

    @np.errstate(all="ignore")
    def run(self, grid: tuple[int, int, int], arguments: Sequence[float], memory: Mapping[str, np.ndarray]) -> None:
        """Launch; memory: uint8 arrays by name, at whose first bytes the pointers among the arguments point."""
        self.grid, count = grid, int(np.prod(grid))
        shared = np.full(count * self.shared_bytes, 0xCD, np.uint8)
        self.regions = [Region("shared", shared, self.grains["shared"], 0, self.shared_bytes, self.problems)]
        addresses = {}
        for name, data in memory.items():
            start = data.ctypes.data % 256
            addresses[data.ctypes.data] = (len(self.regions) << REGION_SHIFT) + start
            self.regions.append(Region(name, data, self.grains["global"], start, data.size, self.problems))
        self.arguments = [
            int(np.float32(value).view(np.uint32)) if isinstance(value, float) else addresses.get(value, value)
            for value in arguments
        ]
        self.waiting = [Group(self, some) for some in np.array_split(np.arange(count), -(-count // TOGETHER))]
        while self.waiting:
            group = self.waiting.pop()
            while group.place < len(self.program):
                execute, one = self.program[group.place]
                place = execute(group, one)
                group.place = group.place + 1 if place is None else place


class Group:
    """Blocks in lock-step, with their registers. Values have an element or a row for each thread."""

    def __init__(self, machine: Machine, blocks: np.ndarray) -> None:
        self.machine, self.blocks, self.place = machine, blocks, 0
        self.interval, self.copies = 0, 1  # the numbers of what is open: between barriers, and of a group of copies
        block, thread = np.repeat(blocks, machine.threads), np.tile(np.arange(machine.threads), len(blocks))
        self.threads = block << BLOCK_SHIFT | thread
        self.registers = {NO_GUARD: np.ones(len(thread), bool), "%tid.x": thread.astype(np.uint32)}
        for axis, count in zip("xyz", machine.grid, strict=True):
            self.registers[f"%ctaid.{axis}"] = (block % count).astype(np.uint32)
            self.registers[f"%nctaid.{axis}"] = np.full(len(block), count, np.uint32)
            block = block // count

    def part(self, chosen: np.ndarray, place: int) -> Group:
        """The blocks that are `chosen`, as a group that goes on at `place`."""
        mine = np.repeat(chosen, self.machine.threads)
        other = copy.copy(self)
        other.blocks, other.threads, other.place = self.blocks[chosen], self.threads[mine], place
        other.registers = {name: values[mine] for name, values in self.registers.items()}
        return other

    def read(self, operand: str, kind: np.dtype[Any]) -> Any:
        """Of a constant or a parameter one value for all; of a wider register all of it, or its pairs of float32."""
        if operand[0] == "{":
            return np.stack([self.read(part, kind) for part in parts(operand)], 1)
        if operand[0] == "[":
            operand = str(self.machine.arguments[int(operand.rstrip("]").rpartition("_")[2])])
        if operand[0] != "%":
            return constant(operand, kind)
        if operand not in self.registers:  # Triton leaves a half undefined that is not used
            self.registers[operand] = np.full(len(self.threads), 0xCD, REGISTERS[operand.strip("%0123456789")])
        values = self.registers[operand]
        pairs = kind == np.float32 and values.itemsize == 8
        return values.view(kind) if pairs or kind.itemsize == values.itemsize else values

    def write(self, target: str, values: Any) -> None:
        """To one register, or columns to those of a braced list; what is smaller is extended, by its sign if any."""
        names, count = parts(target), len(self.threads)
        if len(names) > 1:
            columns = values.reshape(count, -1).view(BITS[values.nbytes // count // len(names)])
            for name, column in zip(names, columns.T, strict=True):
                self.write(name, column)
        elif names != ["_"]:
            stored = REGISTERS[names[0].strip("%0123456789")]
            values = np.ascontiguousarray(values) if values.ndim else np.full(count, values)
            whole = values.nbytes == stored.itemsize * count
            self.registers[names[0]] = values.view(stored).reshape(count) if whole else values.astype(stored)

    def chosen(self, one: Instruction) -> np.ndarray:
        """The threads that execute it."""
        chosen: np.ndarray = self.registers[one.guard.lstrip("!")]
        return ~chosen if one.guard[0] == "!" else chosen

    def access(self, one: Instruction, operand: str, size: int, chosen: np.ndarray | None = None) -> Access:
        """Of so many bytes at the address `operand`, by those of the `chosen` threads that may."""
        machine, (base, *offset) = self.machine, parts(operand)
        kind = BITS[8 if base.startswith("%rd") else 4]  # of global and of shared memory
        addresses = sum((self.read(part, kind) for part in offset), self.read(base, kind))
        places = np.flatnonzero(self.chosen(one) if chosen is None else chosen)
        offsets = np.broadcast_to(addresses, len(self.threads))[places].astype(np.int64)
        number = int(offsets[0]) >> REGION_SHIFT if len(offsets) else int(kind.itemsize == 8)
        if kind.itemsize == 8 and not 0 < number < len(machine.regions):
            raise Fault(f"wild address {int(offsets[0]):#x}: {one.text}")
        region = machine.regions[number]
        offsets -= number << REGION_SHIFT
        aligned = offsets % size == 0
        offsets -= region.start
        fits = aligned & (offsets >= 0) & (offsets <= region.size - size)
        if not fits.all():
            region.problem("misaligned" if not aligned.all() else "out of bounds", one.text)
            offsets, places = offsets[fits], places[fits]
        if number == 0:
            offsets += (self.threads[places] >> BLOCK_SHIFT) * region.size
        grains = (offsets // region.grain)[:, None] + np.arange(size // region.grain)
        threads = self.threads[places, None] | self.interval << INTERVAL_SHIFT
        return Access(region, grains, np.broadcast_to(threads, grains.shape), places, one.text)

    def commit(self) -> None:
        """Close the group of copies."""
        self.copies += 1

    def wait(self, pending: int) -> None:
        """Until at most so many closed groups of copies are under way."""
        shared = self.machine.regions[0]
        mine = np.arange(shared.data.size).reshape(-1, shared.size // shared.grain)[self.blocks]
        done = mine[(shared.copying[mine] > 0) & (shared.copying[mine] < self.copies - pending)]
        shared.data[done], shared.copying[done] = shared.arriving[done], 0
        # as if written now, by the threads that began the copy
        block, thread = shared.writer[done] >> BLOCK_SHIFT, shared.writer[done] % (1 << INTERVAL_SHIFT)
        shared.writer[done] = block << BLOCK_SHIFT | self.interval << INTERVAL_SHIFT | thread

    def barrier(self, number: str) -> None:
        assert number == "0", f"barrier {number} is not that of all threads"
        self.interval += 1


@functools.cache
def parse(ptx: str) -> tuple[list[tuple[Handler, Instruction]], dict[str, int]]:
    """The instructions of the only kernel, and the places of its labels."""
    found = re.search(r"\.entry[^{]*\{(.*?)\n\}", ptx, re.DOTALL)
    assert found, "no kernel in this PTX"
    code, labels = [], {}
    for line in found[1].splitlines():
        line = " ".join(line.partition("//")[0].split())
        if label := re.fullmatch(r"(\$\w+):", line):
            labels[label[1]] = len(code)
        elif line and line[0] not in ".{}":
            guarded = re.fullmatch(r"(?:@(!?%p\d+) )?([\w.:]+) ?(.*);", line)
            assert guarded, line
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", guarded[3])
            one = Instruction(line, guarded[1] or NO_GUARD, guarded[2], tuple(operands))
            code.append((find(one.opcode, one.guard != NO_GUARD), one))
    return code, labels
