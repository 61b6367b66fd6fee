"""Memory as kernels see it, with the check for races of `ptx_machine.py`."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
from ptx_operations import BITS

# of a thread: its block, its interval between barriers, and its place in the block
BLOCK_SHIFT, INTERVAL_SHIFT = 40, 20
SEVERAL_THREADS, SEVERAL_BLOCKS = (1 << INTERVAL_SHIFT) - 1, 1 << 62


class Region:
    """`data` from address `start` on; a block may use `size` bytes of it.

    grain: bytes of the smallest access, the unit in which accesses are compared. writer, reader: of each grain, the
    number of the thread that met it last, or -1; a reader may also be several threads of a block, or several blocks.
    log: problems, and how often.
    """

    def __init__(self, name: str, data: np.ndarray, grain: int, start: int, size: int, log: Counter[str]) -> None:
        assert start % grain == 0, f"{name} starts at {start}, expected a multiple of {grain}"
        self.name, self.grain, self.start, self.size, self.log = name, grain, start, size, log
        self.data = data[: data.size // grain * grain].view(BITS[grain])
        self.writer, self.reader = np.full(self.data.size, -1), np.full(self.data.size, -1)
        # what `cp.async` brings, and the number of its group until it is there
        self.arriving, self.copying = self.data.copy(), np.zeros(self.data.size, np.int32)

    def problem(self, what: str, text: str) -> None:
        self.log[f"{what}, {self.name}: {text}"] += 1


class Access(NamedTuple):
    """The grains, a row for each of the threads in these places of a group, that an instruction reads or writes."""

    region: Region
    grains: np.ndarray
    threads: np.ndarray
    places: np.ndarray
    text: str

    def read(self) -> np.ndarray:
        """What is there; another should not have written it."""
        region, grains, threads = self.region, self.grains, self.threads
        self._check(_meet(region.writer[grains], threads))
        region.reader[grains] = _joined(region.reader[grains], threads)
        np.maximum.at(region.reader, grains.ravel(), _joined(region.reader[grains], threads).ravel())  # those at once
        return region.data[grains]

    def write(self, values: np.ndarray) -> None:
        """Their rows of `values`; another should not have read there, or written something else."""
        region, grains, threads = self.region, self.grains, self.threads
        values = values[self.places].view(region.data.dtype)
        met = _meet(region.writer[grains], threads) & (region.data[grains] != values)
        met |= _meet(region.reader[grains], threads)
        region.data[grains], region.writer[grains] = values, threads
        self._check(met | (region.data[grains] != values))

    def copy(self, values: np.ndarray, number: int) -> None:
        """Begin to write: until this group of copies is waited for there is garbage, not to be touched."""
        self.write(np.full_like(values, 0xCDCDCDCD))
        self.region.arriving[self.grains] = values[self.places].view(self.region.data.dtype)
        self.region.copying[self.grains] = number

    def _check(self, met: np.ndarray) -> None:
        if (met | (self.region.copying[self.grains] > 0)).any():
            self.region.problem("race", self.text)


def _meet(other: np.ndarray, threads: np.ndarray) -> np.ndarray:
    """Are they of two blocks, or two of one block within an interval?"""
    different = other ^ threads
    return (different >= 1 << BLOCK_SHIFT) | ((different > 0) & (different < 1 << INTERVAL_SHIFT))


def _joined(other: np.ndarray, threads: np.ndarray) -> np.ndarray:
    """The mark of both."""
    several = np.where(other ^ threads >= 1 << BLOCK_SHIFT, SEVERAL_BLOCKS, threads | SEVERAL_THREADS)
    return np.where(_meet(other, threads), several, threads)
