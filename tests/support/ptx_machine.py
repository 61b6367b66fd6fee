"""Execute PTX as Triton emits it for sm_80 to 89 and sm_120, in numpy, and report what a GPU would not.

The threads of up to `TOGETHER` blocks run in lock-step, an element of every array for each: those of blocks that have
taken the same branches. Where blocks part, each part runs alone from there.

What is checked: every access lies in the memory that was handed over and is aligned; all threads of a block branch
alike, so no barrier can hang; between two barriers nothing that one thread writes is read by another, or written by
another with a different value; nobody touches what a `cp.async` still copies; and nothing that one block writes is
read by another, or written by another with a different value. What is not: ptxas and what it makes of the PTX, timing,
and how a GPU rounds `ex2.approx`, `div.full` and the sums of a matrix product, which here round as float32 does.
`ptx_operations.py` has the instructions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

TOGETHER = 32  # blocks
REGION_BITS = 40  # an address is the number of its region and an offset
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
REGISTERS = {"p": np.bool_, "rs": np.uint16, "r": np.uint32, "rd": np.uint64}

Run = Callable[["Group"], "int | None"]  # executes an instruction; returns where to go on if that is not the next one


class Fault(AssertionError):
    """What cannot be executed: an unknown instruction, a wild address, or threads of a block that part."""


class Instruction(NamedTuple):
    """`@guard name.modifiers operands`; guard is "" for none; a braced list is one operand."""

    text: str
    guard: str
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]


class Region:
    """Memory as kernels see it. grain: bytes of its smallest access, the unit in which accesses are compared.

    start: address of its first byte, less the number of the region; size: bytes that a block may use.
    """

    def __init__(self, name: str, data: np.ndarray, grain: int, start: int, size: int) -> None:
        self.name, self.data, self.grain, self.start, self.size = name, data, grain, start, size
        grains = -(-data.size // grain)
        self.thread = np.full(grains, -1, np.int32)  # the last that wrote since the barrier; used by `Group.compare`
        self.value = np.zeros(grains, BITS[grain])
        self.copying = np.zeros(grains, bool)
        self.block = np.full(grains, -1, np.int32)  # the last that wrote
        self.readers: dict[int, np.ndarray] = {}  # block -> the grains that it has read

    def view(self, item: int) -> np.ndarray:
        """The memory as items of so many bytes."""
        return self.data[: self.data.size // item * item].view(BITS[item])


class Access(NamedTuple):
    """Items of `item` bytes, which are a row for each thread, numbered within the region; their values if written."""

    region: Region
    items: np.ndarray
    item: int
    threads: np.ndarray
    values: np.ndarray | None
    text: str

    def grains(self) -> np.ndarray:
        """The numbers of the region's grains, a row for each thread."""
        share = self.item // self.region.grain
        if share == 1:
            return self.items
        return (self.items[:, :, None] * share + np.arange(share)).reshape(len(self.items), self.items.shape[1] * share)

    def grain_values(self) -> np.ndarray:
        assert self.values is not None
        return np.ascontiguousarray(self.values).view(BITS[self.region.grain])

    def write(self) -> None:
        self.region.view(self.item)[self.items] = self.values

    def of(self, threads: np.ndarray) -> Access:
        """The part of these threads."""
        mine = np.isin(self.threads, threads)
        values = None if self.values is None else self.values[mine]
        return self._replace(items=self.items[mine], threads=self.threads[mine], values=values)


class Group:
    """Blocks in lock-step: their registers, their accesses since the last barrier, and their copies in flight."""

    def __init__(self, machine: Machine, blocks: np.ndarray, place: int = 0) -> None:
        self.machine, self.blocks, self.place = machine, blocks, place
        self.threads = (blocks[:, None] * machine.threads + np.arange(machine.threads)).ravel()
        self.everyone = np.ones(len(self.threads), bool)
        # garbage, for Triton leaves a half undefined that is not used
        garbage = {kind: np.full(len(self.threads), 0xCD, bits) for kind, bits in REGISTERS.items()}
        self.registers = {name: garbage[name.strip("%0123456789")] for name in machine.names}
        self.log: list[Access] = []
        self.copies: list[list[Access]] = [[]]  # of each committed group, and last of the open one

    def part(self, chosen: np.ndarray, place: int) -> Group:
        """The blocks that are `chosen`, as a group that goes on at `place`."""
        other = Group(self.machine, self.blocks[chosen], place)
        mine = np.repeat(chosen, self.machine.threads)
        other.registers = {name: values[mine] for name, values in self.registers.items()}
        other.log = [access.of(other.threads) for access in self.log]
        other.copies = [[access.of(other.threads) for access in copies] for copies in self.copies]
        return other

    def special(self, name: str) -> np.ndarray:
        """`%tid.x`, or an axis of `%ctaid` or `%nctaid`, for each thread."""
        kind, axis = name[1:-2], "xyz".index(name[-1])
        if kind == "tid":
            return (self.threads % self.machine.threads if axis == 0 else self.threads * 0).astype(np.uint32)
        grid = self.machine.grid
        block = np.unravel_index(self.threads // self.machine.threads, grid[::-1])[::-1][axis]
        return (block if kind == "ctaid" else np.full_like(block, grid[axis])).astype(np.uint32)

    def load(
        self, space: str, addresses: np.ndarray, item: int, count: int, chosen: np.ndarray, text: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """What the `chosen` threads read (threads, count), and the numbers of those that may."""
        access, numbers = self._access(space, addresses, item, count, chosen, text)
        self._note(access)
        return access.region.view(item)[access.items], numbers

    def store(self, space: str, addresses: np.ndarray, values: np.ndarray, chosen: np.ndarray, text: str) -> None:
        """Write `values` (threads, count) of the `chosen` threads."""
        item, count = values.dtype.itemsize, values.shape[1]
        access, numbers = self._access(space, addresses, item, count, chosen, text)
        access = access._replace(values=values[numbers])
        self._note(access)
        access.write()

    def copy(
        self, target: np.ndarray, source: np.ndarray, size: int, taken: np.ndarray, chosen: np.ndarray, text: str
    ) -> None:
        """`cp.async` of `size` bytes, or of zeros where none is `taken`; they arrive when they are waited for."""
        values = np.zeros((len(target), size // 4), np.uint32)
        loaded, numbers = self.load("global", source, 4, size // 4, chosen & taken, text)
        values[numbers] = loaded
        access, numbers = self._access("shared", target, 4, size // 4, chosen, text)
        access = access._replace(values=values[numbers])
        self._note(access)  # nobody else may touch the target from here on
        access.region.copying[access.grains()] = True
        self.copies[-1].append(access)

    def wait(self, pending: int) -> None:
        """Until at most so many committed groups of copies are in flight."""
        while len(self.copies) - 1 > pending:
            for access in self.copies.pop(0):
                access.region.copying[access.grains()] = False
                self._note(access)
                access.write()

    def compare(self) -> None:
        """At a barrier: has a thread met what another one wrote since the last?"""
        problem, written = self.machine.problem, [access for access in self.log if access.values is not None]
        for access in written:
            places = access.grains()
            access.region.thread[places] = access.threads[:, None]
            access.region.value[places] = access.grain_values()
        for access in self.log if written else ():
            places, region = access.grains(), access.region
            others = (region.thread[places] >= 0) & (region.thread[places] != access.threads[:, None])
            if access.values is not None:
                others &= region.value[places] != access.grain_values()
            if others.any():
                problem("race: " + ("read" if access.values is None else "written"), region, access.text)
        for access in written:
            access.region.thread[access.grains()] = -1
        self.log = []

    def _access(
        self, space: str, addresses: np.ndarray, item: int, count: int, chosen: np.ndarray, text: str
    ) -> tuple[Access, np.ndarray]:
        """The access, checked, and the numbers of the threads that may go on with it."""
        machine, size = self.machine, item * count
        numbers = np.flatnonzero(chosen)
        offsets, threads = addresses[numbers].astype(np.int64), self.threads[numbers]
        number = 0
        if space == "global":
            number = int(offsets[0]) >> REGION_BITS if len(offsets) else 1
            if not 0 < number < len(machine.regions):
                raise Fault(f"wild address {int(offsets[0]):#x}: {text}")
            offsets -= number << REGION_BITS
        region = machine.regions[number]
        aligned = offsets % size == 0
        offsets -= region.start
        inside = (offsets >= 0) & (offsets <= region.size - size)
        if not (aligned & inside).all():
            machine.problem("misaligned" if not aligned.all() else "out of bounds", region, text)
            numbers, offsets, threads = (array[aligned & inside] for array in (numbers, offsets, threads))
        if space == "shared":
            offsets += threads // machine.threads * region.size
        items = (offsets // item)[:, None] + np.arange(count)
        return Access(region, items, item, threads, None, text), numbers

    def _note(self, access: Access) -> None:
        self.log.append(access)
        region, machine = access.region, self.machine
        places = access.grains()
        if region is machine.regions[0]:
            if self.copies != [[]] and region.copying[places].any():
                machine.problem("race: touched while cp.async copies", region, access.text)
            return
        blocks = access.threads // machine.threads
        if access.values is None:
            for block in self.blocks:
                readers = region.readers.setdefault(int(block), np.zeros(region.thread.size, bool))
                readers[places if len(self.blocks) == 1 else places[blocks == block]] = True
        else:
            others = (region.block[places] >= 0) & (region.block[places] != blocks[:, None])
            if (others & (region.view(region.grain)[places] != access.grain_values())).any():
                machine.problem("race: written by two blocks", region, access.text)
            region.block[places] = blocks[:, None]


class Machine:
    """A compiled kernel. problems: what was noticed, with the instructions, and how often."""

    def __init__(self, ptx: str, threads: int, shared_bytes: int) -> None:
        from ptx_operations import build

        self.threads, self.shared_bytes = threads, -(-max(shared_bytes, 1) // 16) * 16
        self.pointers, code, labels = parse(ptx)
        self.names = set(re.findall(r"%(?:p|rs?|rd)\d+", " ".join(one.text for one in code)))
        self.program = [build(one, labels, place, len(code)) for place, one in enumerate(code)]
        self.grains = {space: _grain(code, space) for space in ("shared", "global")}
        self.problems: Counter[str] = Counter()
        self.instructions = 0  # executed, each once for all blocks in lock-step

    def run(
        self, grid: tuple[int, int, int], arguments: Sequence[int | float], memory: Mapping[str, np.ndarray]
    ) -> None:
        """Launch; memory: uint8 arrays by name, in which the pointers among the arguments lie."""
        self.grid, count = grid, int(np.prod(grid))
        shared = np.full(count * self.shared_bytes, 0xCD, np.uint8)
        self.regions = [Region("shared", shared, self.grains["shared"], 0, self.shared_bytes)]
        for name, data in memory.items():
            self.regions.append(Region(name, data, self.grains["global"], data.ctypes.data % 256, data.size))
        self.arguments = [
            self._address(int(value)) if pointer else value
            for value, pointer in zip(arguments, self.pointers, strict=True)
        ]
        for first in range(0, count, TOGETHER):
            self.waiting = [Group(self, np.arange(first, min(first + TOGETHER, count)))]
            while self.waiting:
                self._execute(self.waiting.pop())
        for region in self.regions[1:]:
            for block, read in region.readers.items():
                if (read & (region.block >= 0) & (region.block != block)).any():
                    self.problem("race: read by one block and written by another", region, "whole launch")

    def problem(self, what: str, region: Region, text: str) -> None:
        self.problems[f"{what}, {region.name}: {text}"] += 1

    def _execute(self, group: Group) -> None:
        with np.errstate(all="ignore"):
            while group.place < len(self.program):
                place = self.program[group.place](group)
                group.place = group.place + 1 if place is None else place
                self.instructions += 1

    def _address(self, pointer: int) -> int:
        for number, region in enumerate(self.regions[1:], 1):
            if 0 <= pointer - region.data.ctypes.data < region.data.size:
                return (number << REGION_BITS) + region.start + pointer - region.data.ctypes.data
        assert not pointer, f"pointer {pointer:#x} lies in none of the arrays"
        return 0


def parse(ptx: str) -> tuple[list[bool], list[Instruction], dict[str, int]]:
    """Which parameters of the only kernel are pointers, its instructions, and the places of its labels."""
    found = re.search(r"\.entry\s+\w+\s*\((.*?)\)[^{]*\{(.*?)\n\}", ptx, re.DOTALL)
    assert found, "no kernel in this PTX"
    code: list[Instruction] = []
    labels = {}
    for line in found[2].splitlines():
        line = line.partition("//")[0].strip()
        if label := re.fullmatch(r"(\$\w+):", line):
            labels[label[1]] = len(code)
        elif line and line[0] not in ".{}":
            parts = re.fullmatch(r"(?:@(!?%p\d+)\s+)?([\w.:]+)\s*(.*);", line)
            assert parts, line
            name, *modifiers = parts[2].split(".")
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", parts[3])
            code.append(Instruction(line, parts[1] or "", name, tuple(modifiers), tuple(operands)))
    return [".ptr" in parameter for parameter in found[1].split(",")], code, labels


def _grain(code: Sequence[Instruction], space: str) -> int:
    """Bytes of the smallest access to `space`; ldmatrix and cp.async move 4 and more."""
    plain = [one.modifiers[-1] for one in code if one.name in ("ld", "st") and space in one.modifiers]
    return min([4, *(int(re.sub(r"\D", "", kind)) // 8 for kind in plain)])
