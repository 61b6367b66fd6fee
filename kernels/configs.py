"""Tile sizes of the Triton kernels, one line per architecture, with the reason for each.

No line has been timed: all were chosen by count (shared memory, registers) and checked by compiling, without a GPU.
`tests/kernels/test_aot.py` compiles every line and fails past the shared-memory limit or on a register spill.
"""

from __future__ import annotations

import dataclasses

from ..errors import BackendError


@dataclasses.dataclass(frozen=True)
class Tile:
    """Queries, keys and channels of one step, with the warps and pipeline stages that serve it."""

    queries: int
    keys: int
    channels: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One line of the table: the shared memory a block may use, and a tile for each kind of problem.

    half: float16 and bfloat16 maps; single: float32 maps, multiplied exactly by FMA; wide: more than `NARROW` values.
    """

    shared_kib: int
    half: Tile
    single: Tile
    wide: Tile
    bfloat16: bool = True
    tf32: bool = True


NARROW = 64  # value channels up to which `half` and `single` hold; beyond, the output tile takes the registers
MAX_VALUES = 256  # value channels of one launch; more are warped in several

# float32 on every line: FMA takes its operands from registers, so the tile is small, and its time hides the loads
_SINGLE = Tile(queries=64, keys=64, channels=16, warps=8, stages=2)
# wide on the lines with asynchronous copies: a 64 x 256 output tile takes 64 registers a thread
_WIDE = Tile(queries=64, keys=64, channels=64, warps=8, stages=3)

ARCHITECTURES: dict[int, Architecture] = {
    # Turing: no asynchronous copies, so the next loads wait in registers and larger tiles spill; no bfloat16, no tf32
    75: Architecture(64, Tile(64, 32, 32, 8, 2), _SINGLE, Tile(32, 32, 32, 8, 2), bfloat16=False, tf32=False),
    # A100: registers allow one block of 128 x 128 a multiprocessor, so it may take 64 channels in three stages, 64 KiB
    80: Architecture(163, Tile(128, 128, 64, 8, 3), _SINGLE, _WIDE),
    # A40, A6000, RTX 30: as 80, since 64 KiB is within 99
    86: Architecture(99, Tile(128, 128, 64, 8, 3), _SINGLE, _WIDE),
    # RTX 40, L4, L40: as 86; the larger L2 changes no tile
    89: Architecture(99, Tile(128, 128, 64, 8, 3), _SINGLE, _WIDE),
    # H100, H200: warpgroup products read both operands from shared memory, so one stage more, 128 KiB
    90: Architecture(227, Tile(128, 128, 64, 8, 4), _SINGLE, _WIDE),
    # RTX 50: Ampere-style products; with 64 channels 128 x 128 spills, with 32 it does not
    120: Architecture(99, Tile(128, 128, 32, 8, 3), _SINGLE, _WIDE),
}

FOLD = Tile(queries=64, keys=32, channels=64, warps=4, stages=2)  # fold_kernel: target and source positions, channels
PACK = Tile(
    queries=64, keys=0, channels=64, warps=4, stages=1
)  # pack_kernel: a square transposed through shared memory
STATISTICS = Tile(queries=64, keys=0, channels=64, warps=4, stages=2)


def architecture(capability: int) -> Architecture:
    """The line for compute capability `capability` (major * 10 + minor): its own, or that of the nearest older one.

    A newer chip with less shared memory than the older line assumes would fail at launch, with Triton's own message.
    Raises `BackendError` below 75.
    """
    known = [sm for sm in ARCHITECTURES if sm <= capability]
    if not known:
        raise BackendError(
            f"the Triton kernels need compute capability {min(ARCHITECTURES)} or newer, got {capability}; "
            'use backend="cpu" on CPU tensors'
        )
    return ARCHITECTURES[max(known)]


def tile_for(capability: int, itemsize: int, values: int) -> Tile:
    """The tile for maps of `itemsize` bytes an element and `values` value channels."""
    line = architecture(capability)
    if itemsize == 4:
        return line.single
    return line.half if values <= NARROW else line.wide


def value_block(values: int) -> int:
    """Value channels padded to a power of two of at least 16, the least a tensor-core product takes."""
    return max(16, 1 << (values - 1).bit_length())


def padded_values(values: int) -> int:
    """Value channels of a packed row: a multiple of 8, so that float16 rows can be loaded 16 bytes at a time."""
    return -(-values // 8) * 8
