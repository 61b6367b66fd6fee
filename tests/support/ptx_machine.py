"""Execute PTX as Triton emits it for sm_80 to 89 and sm_120, in numpy, and report what a GPU would not.

The threads of up to `TOGETHER` blocks run in lock-step, an element of every array for each: those of blocks that have
taken the same branches. Where blocks part, each part runs alone from there.

What is checked: every access lies in the memory that was handed over and is aligned; all threads of a block branch
alike, so no barrier can hang; between two barriers nothing that one thread writes is read by another, or written by
another with a different value; nobody touches what a `cp.async` still copies; and nothing that one block writes is
read by another, or written by another with a different value. What is not: ptxas and what it makes of the PTX, timing,
and how a GPU rounds `ex2.approx`, `div.full` and the sums of a matrix product, which here round as float32 does.
`ptx_memory.py` has the checks, `ptx_operations.py` the instructions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from ptx_memory import NO_GUARD, REGION_BITS, Group, Region
from ptx_operations import Instruction, build

TOGETHER = 32  # blocks


class Machine:
    """A compiled kernel. problems: what was noticed, with the instructions, and how often."""

    def __init__(self, ptx: str, threads: int, shared_bytes: int) -> None:
        self.threads, self.shared_bytes = threads, -(-max(shared_bytes, 1) // 16) * 16
        self.pointers, code, labels = parse(ptx)
        self.names = set(re.findall(r"%(?:p|rs?|rd)\d+", " ".join(one.text for one in code)))
        self.program = [build(one, labels, place, len(code)) for place, one in enumerate(code)]
        self.grains = {space: _grain(code, space) for space in ("shared", "global")}
        self.problems: Counter[str] = Counter()
        self.instructions = 0  # executed, each once for all blocks in lock-step

    def run(self, grid: tuple[int, int, int], arguments: Sequence[float], memory: Mapping[str, np.ndarray]) -> None:
        """Launch; memory: uint8 arrays by name, in which the pointers among the arguments lie."""
        self.grid, count = grid, int(np.prod(grid))
        shared = np.full(count * self.shared_bytes, 0xCD, np.uint8)
        self.regions = [Region("shared", shared, self.grains["shared"], 0, self.shared_bytes)]
        for name, data in memory.items():
            self.regions.append(Region(name, data, self.grains["global"], data.ctypes.data % 256, data.size))
        self.arguments = [self._argument(*pair) for pair in zip(arguments, self.pointers, strict=True)]
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

    def _argument(self, value: float, pointer: bool) -> int:
        """Its bits; of a pointer, the address here."""
        if isinstance(value, float):
            return int(np.float32(value).view(np.uint32))
        for number, region in enumerate(self.regions[1:] if pointer else (), 1):
            if 0 <= value - region.data.ctypes.data < region.data.size:
                return (number << REGION_BITS) + region.start + value - region.data.ctypes.data
        assert not (pointer and value), f"pointer {value:#x} lies in none of the arrays"
        return value


def parse(ptx: str) -> tuple[list[bool], list[Instruction], dict[str, int]]:
    """Which parameters of the only kernel are pointers, its instructions, and the places of its labels."""
    found = re.search(r"\.entry\s+\w+\s*\((.*?)\)[^{]*\{(.*?)\n\}", ptx, re.DOTALL)
    assert found, "no kernel in this PTX"
    code: list[Instruction] = []
    labels = {}
    for line in found[2].splitlines():
        line = " ".join(line.partition("//")[0].split())
        if label := re.fullmatch(r"(\$\w+):", line):
            labels[label[1]] = len(code)
        elif line and line[0] not in ".{}":
            parts = re.fullmatch(r"(?:@(!?%p\d+) )?([\w.:]+) ?(.*);", line)
            assert parts, line
            name, *modifiers = parts[2].split(".")
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", parts[3])
            code.append(Instruction(line, parts[1] or NO_GUARD, name, tuple(modifiers), tuple(operands)))
    return [".ptr" in parameter for parameter in found[1].split(",")], code, labels


def _grain(code: Sequence[Instruction], space: str) -> int:
    """Bytes of the smallest access to `space`; ldmatrix and cp.async move 4 and more."""
    plain = [one.modifiers[-1] for one in code if one.name in ("ld", "st") and space in one.modifiers]
    return min([4, *(int(re.sub(r"\D", "", kind)) // 8 for kind in plain)])
