"""One rule for the tiles that the CPU paths work in: how many rows of queries and of keys fit in a budget of bytes.

A tile is (query rows) x (key rows) of whole map rows; the diagonal taps of a patch need patch - 1 rows more on each
axis (the halo), which are computed again in the next tile, so tiles are as square as the budget allows.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Tiles(NamedTuple):
    """Rows of the query map and of the key map in one tile, without the halo."""

    query_rows: int
    key_rows: int


def fit_tiles(query_map: tuple[int, int], key_map: tuple[int, int], patch: int, budget: int, *, buffers: int) -> Tiles:
    """The largest tiles of which `buffers` copies in float32 stay within `budget` bytes.

    query_map, key_map: (height, width). One row of each is always a tile, even where the budget is smaller.
    Where the whole matrix fits, it is one tile; else the rows are shared out so that the last tile is not a sliver.
    """
    halo = patch - 1
    (hq, wq), (hk, wk) = query_map, key_map
    cell = (wq + halo) * (wk + halo) * 4 * buffers  # bytes of one query row against one key row
    cells = max(budget // cell, 1)  # (query rows + halo) * (key rows + halo) of a tile
    side = max(math.isqrt(cells), halo + 1)
    # a map shorter than the square's side leaves its share of the budget to the other axis
    padded_q = min(hq + halo, max(side, cells // min(side, hk + halo)))
    padded_k = min(hk + halo, max(halo + 1, cells // padded_q))
    return Tiles(_even(hq, max(padded_q - halo, 1)), _even(hk, max(padded_k - halo, 1)))


class CacheBlocks(NamedTuple):
    """Blocks of the fused kernel that stay in the cache.

    block: query columns of a task. strip: query rows of a task. group: key rows followed at once.
    """

    block: int
    strip: int
    group: int


CACHE = 256 << 10  # bytes of products a thread keeps: half of a usual second-level cache, the key panels have the rest
KEYS = 256  # keys of one pass: enough to spread the cost of a pass, few enough for the cache
SHORTEST = 4  # query rows of a strip: shorter ones spend as much on the strip's ends as on its inside


def choose_cache_blocks(
    query_map: tuple[int, int], key_map: tuple[int, int], patch: int, threads: int, *, rows: int, columns: int
) -> CacheBlocks:
    """Tasks for `threads` threads, whose products of `patch` steps fit in `CACHE`; register tile (rows, columns)."""
    (hq, wq), (_, wk) = query_map, key_map
    width = math.ceil(wk / columns) * columns
    group = max(KEYS // width, 1)
    lines = CACHE // (patch * group * width * 4) // rows * rows  # whole register tiles, halo included
    block = _even(wq, max(lines, 2 * rows) - patch + 1)
    strips = math.ceil(threads / math.ceil(wq / block))
    return CacheBlocks(block, max(math.ceil(hq / strips), min(SHORTEST, hq)), group)


def _even(length: int, limit: int) -> int:
    """The tile length at most `limit` that cuts `length` into the same number of tiles, as evenly as it goes."""
    return math.ceil(length / math.ceil(length / limit))
