"""Block sizes of the Triton kernels: one line per architecture, with the reason for each.

No line has been timed: all were chosen by count (shared memory, registers) and by compiling without a GPU.
`tests/kernels/gpu/test_aot.py` compiles every line and fails past the shared-memory limit or on a register spill.
"""

from __future__ import annotations

import dataclasses

from ...errors import BackendError
from ..signatures import QUERY_BAND, padded_values


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Queries, keys and channels of one tile, with the warps and pipeline stages that serve it."""

    queries: int
    keys: int
    channels: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The shared memory a block may use, what the chip multiplies, and the block sizes for 16-bit maps.

    narrow, wide: `forward_kernel` with at most, and with more than, `NARROW` value channels; backward: its score tiles;
    nine_tap: `nine_tap_kernel` for any number, None where the products are no tensor-core products; nine_tap_whole:
    whether that is predicted to win at maps of 64 x 64 where the walks are not split, so that few programs run.
    """

    shared_kib: int
    narrow: BlockSizes
    wide: BlockSizes
    backward: BlockSizes
    nine_tap: BlockSizes | None
    nine_tap_whole: bool = False
    bfloat16: bool = True
    tf32: bool = True


NARROW = 64  # value channels whose output tile leaves the registers to the scores
MAX_VALUES = 256  # value channels of one launch; more are warped in several

# the output tile of 64 x 256 takes 64 registers a thread, so the score tile shrinks to 16 registers a thread
_WIDE = BlockSizes(64, 64, 64, 8, 3)
# the backward holds three score tiles at once (logits, d weights, d logits): 128 x 128 spills, and on 80 even 128 x 64
_BACKWARD = BlockSizes(64, 64, 64, 8, 3)

# three tiles of 64 x 64 are in flight, two sums and a product, 16 registers each; with 4 warps or 128 keys it spills
_NINE_TAP = BlockSizes(64, 64, 64, 8, 3)

# chips of other compute capabilities that cubins can be made for, by the line of the nearest older one
OTHER_TARGETS = (87, 100, 103, 110, 121)

ARCHITECTURES: dict[int, Architecture] = {
    # Turing: Triton has no tensor-core products below 80 (its pull request 5066) and uses FMA, with the operands and
    # the next loads in registers: every larger tile spills
    75: Architecture(
        64,
        BlockSizes(64, 32, 32, 8, 2),
        BlockSizes(32, 16, 32, 8, 2),
        BlockSizes(64, 32, 32, 8, 2),
        None,
        bfloat16=False,
        tf32=False,
    ),
    # A100: nine taps unsplit would break even, so they are not taken
    # registers allow one 128 x 128 block a multiprocessor, so it may take 64 channels in three stages, 64 KiB
    80: Architecture(163, BlockSizes(128, 128, 64, 8, 3), _WIDE, _BACKWARD, _NINE_TAP),
    # A40, A6000, RTX 30: as 80, since its 64 KiB are within 99
    86: Architecture(99, BlockSizes(128, 128, 64, 8, 3), _WIDE, _BACKWARD, _NINE_TAP, nine_tap_whole=True),
    # RTX 40, L4, L40: as 86; the larger L2 changes no tile
    89: Architecture(99, BlockSizes(128, 128, 64, 8, 3), _WIDE, _BACKWARD, _NINE_TAP, nine_tap_whole=True),
    # H100, H200: nine taps unsplit would take 1.9 times as long, with 17 blocks on 132 multiprocessors
    # warpgroup products read both operands from shared memory, so one stage more, 128 KiB
    90: Architecture(227, BlockSizes(128, 128, 64, 8, 4), _WIDE, _BACKWARD, _NINE_TAP),
    # RTX 50: Ampere-style products; 128 x 128 spills with 64 channels and not with 32, nine taps in a third stage too
    120: Architecture(
        99, BlockSizes(128, 128, 32, 8, 3), _WIDE, _BACKWARD, BlockSizes(64, 64, 32, 8, 2), nine_tap_whole=True
    ),
}

# float32 maps are multiplied exactly, by FMA, on every architecture: operands and sums live in registers, so the tiles
# are small, and the arithmetic hides the loads; 64 x 64 spills on 80
_SINGLE = BlockSizes(64, 32, 16, 4, 2)
_SINGLE_WIDE = BlockSizes(64, 32, 16, 8, 2)

# fold_kernel: target positions, source positions, channels; the nine loads of a tile serve all its channels, so many
_FOLD = BlockSizes(64, 64, 128, 8, 2)
_FOLD_SINGLE = BlockSizes(64, 32, 64, 4, 2)

# query rows of a band of `nine_tap_kernel`: 16 multiply 18 percent more than the scores, 4 half as much again, but 4
# make four times the programs, for launches that are not split over the keys
SPLIT_BAND = 16
WHOLE_BAND = 4
NINE_TAP_CHANNELS = 128  # with fewer, what it does beside the products is predicted to cost more than it saves
NINE_TAP_VALUES = 16  # value channels of one product there; more take turns, so that no number of them spills
MERGE = BlockSizes(256, 0, 16, 4, 1)  # merge_kernel: positions and value channels

PACK = BlockSizes(64, 0, 64, 4, 1)  # pack_kernel: a square of positions and channels, transposed through shared memory
STATISTICS = BlockSizes(64, 0, 64, 4, 2)  # statistics_kernel: a warp reads 64 channels of a position as one line


def architecture(capability: int) -> Architecture:
    """The line for compute capability `capability` (major * 10 + minor): its own, or that of the nearest older one.

    A chip that is not in the table and has less shared memory than that line is refused by Triton at launch.
    Raises `BackendError` below 75.
    """
    known = [sm for sm in ARCHITECTURES if sm <= capability]
    if not known:
        raise BackendError(
            f"the Triton kernels need compute capability {min(ARCHITECTURES)} or newer, got {capability}; "
            'use backend="numba" on CPU tensors'
        )
    return ARCHITECTURES[max(known)]


def forward_blocks(capability: int, itemsize: int, values: int, *, match: bool = False) -> BlockSizes:
    """The block sizes of the forward for maps of `itemsize` bytes an element and `values` value channels.

    match: whether it gives the best match beside the warp.
    """
    wide = values > NARROW
    if itemsize == 4:
        return _SINGLE_WIDE if wide else _SINGLE
    line = architecture(capability)
    if wide:
        return line.wide
    # the match's index takes registers, too: before warpgroup products, 64 channels in flight spill beside 48 values
    return dataclasses.replace(line.narrow, channels=32) if match and capability < 90 else line.narrow


def nine_tap_blocks(
    capability: int,
    itemsize: int,
    patch: int,
    channels: int,
    elements: int,
    *,
    least: int = NINE_TAP_CHANNELS,
    split: bool = True,
) -> BlockSizes | None:
    """The rule that chooses the forward kernel: the block sizes of `nine_tap_kernel`, or None for `forward_kernel`.

    Nine taps are for a patch of 3, 16-bit maps, chips on which Triton's products of them run on tensor cores (80 on),
    and at least `least` channels. Float32 maps are multiplied by FMA from registers, which this kernel needs for its
    sums. elements: of the largest map or output of one batch element, which 32-bit offsets must reach. split: whether
    the walks over the keys can be split among programs.
    """
    if patch != 3 or itemsize != 2 or channels < least or elements >= 1 << 31:
        return None
    line = architecture(capability)
    return line.nine_tap if split or line.nine_tap_whole else None


def warp_constants(
    patch: int, channels: int, values: int, blocks: BlockSizes, band: int | None = None
) -> dict[str, int]:
    """The compile-time arguments of `nine_tap_kernel` with bands of `band` rows, or of `forward_kernel` without one."""
    constants = {"C": channels, "V": values, "VP": padded_values(values), "PATCH": patch}
    constants |= {"BN": blocks.queries, "BM": blocks.keys, "BC": blocks.channels}
    if band is None:
        return {**constants, "BV": value_block(values)}
    return {**constants, "BV": NINE_TAP_VALUES, QUERY_BAND: band}


def splits(programs: int, walks: int, multiprocessors: int, most: int) -> int:
    """Programs among which to split the `walks` over the keys: the fewest within an eighth of the least time.

    A block of `nine_tap_kernel` takes all registers of a multiprocessor, so time is counted in waves of one block on
    each. At most `most`, and none is left without a walk.
    """

    def time(count: int) -> int:
        return -(-programs * count // multiprocessors) * -(-walks // count)

    counts = range(1, min(most, walks) + 1)
    least = min(map(time, counts))
    fewest = next(count for count in counts if 8 * time(count) <= 9 * least)
    return -(-walks // -(-walks // fewest))


def backward_blocks(capability: int, itemsize: int) -> BlockSizes:
    """The block sizes of `score_gradient_kernel`."""
    return _SINGLE if itemsize == 4 else architecture(capability).backward


def fold_blocks(itemsize: int, channels: int) -> BlockSizes:
    """The block sizes of `fold_kernel` for a source of `itemsize` bytes an element; no more channels than needed."""
    blocks = _FOLD_SINGLE if itemsize == 4 else _FOLD
    return dataclasses.replace(blocks, channels=min(blocks.channels, value_block(channels)))


def value_block(values: int) -> int:
    """Channels padded to a power of two of at least 16, the least a tensor-core product takes."""
    return max(16, 1 << (values - 1).bit_length())
