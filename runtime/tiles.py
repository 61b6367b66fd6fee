"""Tiles of a picture for the fine half of the synthesis, which sees less than `TILE_OVERLAP` pixels around each.

All tiles of a picture have one size, so that they share buffers, engines and CUDA graphs: the smallest that is enough
for as few tiles as the side asked for. They are spread evenly, the outermost end where the picture ends, and of each
the outer `TILE_OVERLAP` pixels towards its neighbors are thrown away: what is kept is what the whole picture would
have there, not a blend.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..bundle import TensorSpec
from ..config import SIZE_MULTIPLE, TILE_OVERLAP

# axes that a tile cuts
_ROWS = ("height", "half_height", "h")
_COLUMNS = ("width", "half_width", "w")
_ALIGNED = 4  # pixels; tiles begin on whole positions of all maps


class Span(NamedTuple):
    """One axis of a tile in pixels: `size` from `start` on are made, those of [first, last) of the picture kept."""

    start: int
    size: int
    first: int
    last: int

    @property
    def kept(self) -> slice:
        """What is kept, in the picture."""
        return slice(self.first, self.last)

    @property
    def inner(self) -> slice:
        """What is kept, in the tile."""
        return slice(self.first - self.start, self.last - self.start)


class Tile(NamedTuple):
    """One tile of a picture whose correspondence has a position every `warp_stride` pixels."""

    rows: Span
    columns: Span
    warp_stride: int

    def window(self, tensor: TensorSpec) -> tuple[slice, ...]:
        """Where the tile lies in a tensor of the whole picture."""
        spans = (self.rows, self.columns)
        return self._cut(tensor, *(slice(span.start, span.start + span.size) for span in spans))

    def kept(self, tensor: TensorSpec) -> tuple[slice, ...]:
        """Where what is kept lies in a tensor of the whole picture."""
        return self._cut(tensor, self.rows.kept, self.columns.kept)

    def inner(self, tensor: TensorSpec) -> tuple[slice, ...]:
        """Where what is kept lies in the tile's own tensor."""
        return self._cut(tensor, self.rows.inner, self.columns.inner)

    def _cut(self, tensor: TensorSpec, rows: slice, columns: slice) -> tuple[slice, ...]:
        """`rows` and `columns`, in pixels, of a tensor, whatever its scale."""
        steps = {"half_height": 2, "half_width": 2, "h": self.warp_stride, "w": self.warp_stride}
        cuts = []
        for side in tensor.shape:
            cut = rows if side in _ROWS else columns if side in _COLUMNS else slice(None)
            step = steps.get(str(side), 1)
            cuts.append(cut if step == 1 else slice(cut.start // step, cut.stop // step))
        return tuple(cuts)


def is_cut(tensor: TensorSpec) -> bool:
    """Whether a tile has a part of its own of `tensor`."""
    return any(side in _ROWS for side in tensor.shape)


def tile_size(height: int, width: int, tile: int | None) -> tuple[int, int]:
    """(height, width) of the tiles of a picture, at most `tile` a side; its own where `tile` is None or as large."""
    return tile_side(height, tile), tile_side(width, tile)


def tile_side(length: int, tile: int | None) -> int:
    """Side of the tiles along an axis: as small as their number allows, for what overlaps is made twice."""
    if tile is None or length <= tile:
        return length
    count = 1 + _gaps(length, tile)
    return -(-(length + 2 * TILE_OVERLAP * (count - 1)) // (count * SIZE_MULTIPLE)) * SIZE_MULTIPLE


def tiles(height: int, width: int, tile: int | None, warp_stride: int) -> Iterator[Tile]:
    """The tiles of a picture, row by row: one that is the picture where `tile` is None or as large."""
    rows, columns = tile_size(height, width, tile)
    for row in _spans(height, rows):
        for column in _spans(width, columns):
            yield Tile(row, column, warp_stride)


def _spans(length: int, size: int) -> Sequence[Span]:
    if size == length:
        return [Span(0, size, 0, length)]
    gaps = _gaps(length, size)
    starts = [(length - size) * gap // gaps // _ALIGNED * _ALIGNED for gap in range(gaps + 1)]
    ends = [start + size - TILE_OVERLAP for start in starts[:-1]] + [length]
    return [Span(start, size, first, last) for start, first, last in zip(starts, [0, *ends], ends, strict=False)]


def _gaps(length: int, size: int) -> int:
    """How many tiles of `size` follow the first."""
    return -(-(length - size) // (size - 2 * TILE_OVERLAP))
