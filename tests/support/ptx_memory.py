"""Memory, and blocks in lock-step that read and write it, with the checks of `ptx_machine.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from ptx_machine import Machine

REGION_BITS = 40  # an address is the number of its region and an offset
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
NO_GUARD = "%p"  # a register that is always true
REGISTERS = {"p": np.bool_, "rs": np.uint16, "r": np.uint32, "rd": np.uint64}


class Fault(AssertionError):
    """What cannot be executed: an unknown instruction, a wild address, or threads of a block that part."""


class Region:
    """Memory as kernels see it. grain: bytes of its smallest access, the unit in which accesses are compared.

    start: address of its first byte, less the number of the region; size: bytes that a block may use.
    """

    def __init__(self, name: str, data: np.ndarray, grain: int, start: int, size: int) -> None:
        self.name, self.data, self.grain, self.start, self.size = name, data, grain, start, size
        grains = -(-data.size // grain)
        self.thread = np.full(grains, -1, np.int32)  # the last that wrote since the barrier; used by `Group.compare`
        self.value = np.zeros(grains, BITS[grain])  # what it wrote
        self.copying = np.zeros(grains, bool)
        self.block = np.full(grains, -1, np.int32)  # the last that wrote
        self.readers: dict[int, np.ndarray] = {}  # block -> the grains that it has read

    def view(self, item: int) -> np.ndarray:
        """The memory as items of so many bytes."""
        return self.data[: self.data.size // item * item].view(BITS[item])


class Access(NamedTuple):
    """What threads read, or with values write: a row of items of `item` bytes each, by their numbers in the region."""

    region: Region
    item: int
    items: np.ndarray
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
        self.log: list[Access] = []
        self.copies: list[list[Access]] = [[]]  # of each committed group, and last of the open one
        # garbage, for Triton leaves a half undefined that is not used
        garbage = {kind: np.full(len(self.threads), 0xCD, bits) for kind, bits in REGISTERS.items()}
        self.registers = {name: garbage[name.strip("%0123456789")] for name in machine.names}
        block, thread = np.divmod(self.threads, machine.threads)
        special = {"%tid.x": thread}
        for axis, count in zip("xyz", machine.grid, strict=True):
            special |= {f"%ctaid.{axis}": block % count, f"%nctaid.{axis}": np.full_like(block, count)}
            block = block // count
        self.registers |= {name: values.astype(np.uint32) for name, values in special.items()}
        self.registers[NO_GUARD] = np.ones(len(self.threads), bool)

    def part(self, chosen: np.ndarray, place: int) -> Group:
        """The blocks that are `chosen`, as a group that goes on at `place`."""
        other = Group(self.machine, self.blocks[chosen], place)
        mine = np.repeat(chosen, self.machine.threads)
        other.registers = {name: values[mine] for name, values in self.registers.items()}
        other.log = [access.of(other.threads) for access in self.log]
        other.copies = [[access.of(other.threads) for access in copies] for copies in self.copies]
        return other

    def load(
        self, space: str, addresses: np.ndarray, item: int, count: int, chosen: np.ndarray, text: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """What the `chosen` threads read (threads, count), and the numbers of those that may."""
        access, numbers = self._access(space, addresses, item, count, chosen, text)
        self._note(access)
        return access.region.view(item)[access.items], numbers

    def store(self, space: str, addresses: np.ndarray, values: np.ndarray, chosen: np.ndarray, text: str) -> Access:
        """Write `values` (threads, count) of the `chosen` threads."""
        access, numbers = self._access(space, addresses, values.itemsize, values.shape[1], chosen, text)
        access = access._replace(values=values[numbers])
        self._note(access)
        access.write()
        return access

    def copy(self, target: np.ndarray, values: np.ndarray, chosen: np.ndarray, text: str) -> None:
        """Begin to write `values` to shared memory: until they are waited for there is garbage, not to be touched."""
        access = self.store("shared", target, np.full_like(values, 0xCDCDCDCD), chosen, text)
        access.region.copying[access.grains()] = True
        self.copies[-1].append(access._replace(values=values[np.isin(self.threads, access.threads)]))

    def wait(self, pending: int) -> None:
        """Until at most so many committed groups of copies are in flight."""
        while len(self.copies) - 1 > pending:
            for access in self.copies.pop(0):
                access.region.copying[access.grains()] = False
                self._note(access)
                access.write()

    def compare(self) -> None:
        """At a barrier: has a thread met what another one wrote since the last?"""
        written = [access for access in self.log if access.values is not None]
        for access in written:
            grains = access.grains()
            access.region.thread[grains] = access.threads[:, None]
            access.region.value[grains] = access.grain_values()
        for access in self.log if written else ():
            grains, region = access.grains(), access.region
            others = (region.thread[grains] >= 0) & (region.thread[grains] != access.threads[:, None])
            if access.values is not None:
                others &= region.value[grains] != access.grain_values()
            if others.any():
                what = "read" if access.values is None else "written"
                self.machine.problem(f"race: {what}", region, access.text)
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
        return Access(region, item, (offsets // item)[:, None] + np.arange(count), threads, None, text), numbers

    def _note(self, access: Access) -> None:
        """Remember the access for the next barrier; compare it with copies in flight, and with other blocks'."""
        self.log.append(access)
        region, machine, grains = access.region, self.machine, access.grains()
        if region is machine.regions[0]:
            if self.copies != [[]] and region.copying[grains].any():
                machine.problem("race: touched while cp.async copies", region, access.text)
            return
        blocks = access.threads // machine.threads
        if access.values is None:
            for block in self.blocks:
                readers = region.readers.setdefault(int(block), np.zeros(region.thread.size, bool))
                readers[grains if len(self.blocks) == 1 else grains[blocks == block]] = True
        else:
            others = (region.block[grains] >= 0) & (region.block[grains] != blocks[:, None])
            if (others & (region.view(region.grain)[grains] != access.grain_values())).any():
                machine.problem("race: written by two blocks", region, access.text)
            region.block[grains] = blocks[:, None]
