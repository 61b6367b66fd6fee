"""The warp on the CPU in numpy alone: exact, float32, tiled over queries and keys; the path that is always there.

The correlation of two p x p patches is a diagonal sum over p * p offsets of the plain correlation of the channels,
  logits(i, j) = (sum_k theta(i + k) . phi(j + k)  -  D mu_i nu_j) a_i b_j / temperature,
so no unfolded map is made and the matrix product is p * p times smaller than upstream's. Maps are padded by p // 2
zeros on each side and addressed flat, so that an offset k is one shift of the flat index for a whole tile; the columns
between two map rows are then gaps, which the softmax ignores. The softmax is online over key tiles (Milakov and
Gimelshein, arXiv 1805.02867).
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from .tiling import fit_tiles

Array = npt.NDArray[np.float32]

BUDGET = 24 << 20  # bytes of the tile buffers; beyond the last-level cache a larger tile gains nothing
LOWEST = -1e30  # stands for minus infinity: its weight is 0 too, and 0 times it is 0, not nan
BUFFERS = 2  # the product, whose memory becomes the logits, and the horizontal taps


Match = tuple[npt.NDArray[np.int64], Array]  # index, probability, each (B, N): see CorrMatch


def empty_match(batch: int, queries: int) -> Match:
    """An uninitialized match of `batch` items with `queries` positions."""
    return np.empty((batch, queries), np.int64), np.empty((batch, queries), np.float32)


def box_sum(plane: npt.NDArray[np.float64], patch: int) -> npt.NDArray[np.float64]:
    """Sum over the patch around each position of (H, W), zeros outside."""
    half, (height, width) = patch // 2, plane.shape
    padded = np.pad(plane, half)
    rows = np.sum([padded[i : i + height] for i in range(patch)], axis=0)
    return np.asarray(np.sum([rows[:, i : i + width] for i in range(patch)], axis=0))


def patch_statistics(features: Array, patch: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and reciprocal centered norm of the patch around each position of (C, H, W), as (H, W) float64.

    In float64, because the squared norm is a difference. A constant patch, whose centered norm is rounding alone, gets
    reciprocal 0: it correlates with nothing.
    """
    sums = features.sum(axis=0, dtype=np.float64)
    squares = np.einsum("chw,chw->hw", features, features, dtype=np.float64)
    return statistics_of_sums(sums, squares, patch, features.shape[0])


def statistics_of_sums(
    sums: npt.NDArray[np.float64], squares: npt.NDArray[np.float64], patch: int, channels: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """`patch_statistics` from each position's sums over channels of the features and of their squares."""
    mean = box_sum(sums, patch) / (patch * patch * channels)
    squares = box_sum(squares, patch)
    centered = squares - mean * mean * (patch * patch * channels)
    proper = centered > 1e-12 * squares
    norm = np.sqrt(centered, where=proper, out=np.ones_like(centered))
    return mean, np.where(proper, 1.0 / (norm + sys.float_info.epsilon), 0.0)


def warp_forward(
    theta: Array, phi: Array, values: Array, patch: int, temperature: float, *, match: bool = False
) -> tuple[Array, Array, Match | None]:
    """Warp values (B, V, Hk, Wk) by theta (B, C, Hq, Wq) and phi (B, C, Hk, Wk); all float32, V may be 0.

    Returns out (B, V, N), lse (B, N) and, if asked for, the match, of the same pass. Logits are float32, their
    statistics float64. Memory beside these: padded copies of one item's inputs, and at most `BUDGET` bytes of tiles.
    """
    (batch, _, hq, wq), channels = theta.shape, values.shape[1]
    out, lse = np.empty((batch, channels, hq * wq), np.float32), np.empty((batch, hq * wq), np.float32)
    matches = empty_match(batch, hq * wq) if match else None
    for i in range(batch):
        queries, keys = _Side(theta[i], patch, 1.0 / temperature), _Side(phi[i], patch, 1.0)
        weighed = _weighed(values[i], patch)
        tiles = fit_tiles(theta.shape[2:], phi.shape[2:], patch, BUDGET, buffers=BUFFERS)
        size = (tiles.query_rows + patch - 1) * queries.stride * (tiles.key_rows + patch - 1) * keys.stride
        buffers = np.empty((BUFFERS, size), np.float32)
        for top in range(0, hq, tiles.query_rows):
            rows = (top, min(top + tiles.query_rows, hq))
            strip = _Strip(queries, rows, channels, match)
            for start in range(0, keys.height, tiles.key_rows):
                strip.add(keys, weighed, (start, min(start + tiles.key_rows, keys.height)), patch, buffers)
            strip.finish(out[i], lse[i], None if matches is None else [field[i] for field in matches])
    return out, lse, matches


class _Side:
    """One map in the padded flat layout: its features (C, flat), and the two vectors that make logits of taps."""

    def __init__(self, features: Array, patch: int, scale: float) -> None:
        half = patch // 2
        channels, self.height, self.width = features.shape
        self.stride = self.width + 2 * half
        self.flat = np.pad(features, ((0, 0), (half, half), (half, half))).reshape(channels, -1)
        mean, reciprocal = patch_statistics(features, patch)
        factors = np.stack([reciprocal * scale, mean * math.sqrt(channels) * patch]).astype(np.float32)
        self.reciprocal, self.mean = np.pad(factors, ((0, 0), (0, 0), (0, 2 * half))).reshape(2, -1)


def _weighed(values: Array, patch: int) -> Array:
    """Values and a row of ones, (V + 1, flat), zero in the gaps: the product with them also sums the weights."""
    rows = np.concatenate([values, np.ones((1, *values.shape[1:]), np.float32)])
    return np.pad(rows, ((0, 0), (0, 0), (0, patch - 1))).reshape(len(rows), -1)


def _taps(
    queries: _Side, keys: _Side, rows: tuple[int, int], key_rows: tuple[int, int], patch: int, buffers: Array
) -> Array:
    """Diagonal sums over the patch of the products of two sets of map rows, in the memory of `buffers[0]`."""
    halo = patch - 1
    left = queries.flat[:, rows[0] * queries.stride : (rows[1] + halo) * queries.stride]
    right = keys.flat[:, key_rows[0] * keys.stride : (key_rows[1] + halo) * keys.stride]
    n, m = left.shape[1], right.shape[1]
    product = np.matmul(left.T, right, out=buffers[0, : n * m].reshape(n, m))
    if patch == 1:
        return product
    n, m = n - halo, m - halo
    across = np.add(product[:n, :m], product[1 : n + 1, 1 : m + 1], out=buffers[1, : n * m].reshape(n, m))
    for i in range(2, patch):
        across += product[i : n + i, i : m + i]
    o_q, o_k = queries.stride, keys.stride
    n, m = n - halo * o_q, m - halo * o_k
    taps = np.add(across[:n, :m], across[o_q : n + o_q, o_k : m + o_k], out=buffers[0, : n * m].reshape(n, m))
    for i in range(2, patch):
        taps += across[i * o_q : n + i * o_q, i * o_k : m + i * o_k]
    return taps


class _Strip:
    """The online softmax of some query rows: maximum, sum and numerators so far, over the flat rows with gaps."""

    def __init__(self, queries: _Side, rows: tuple[int, int], channels: int, match: bool) -> None:
        self.queries, self.rows = queries, rows
        # without the gap after the last row
        self.span = slice(rows[0] * queries.stride, rows[1] * queries.stride - (queries.stride - queries.width))
        n = self.span.stop - self.span.start
        self.maximum = np.full(n, LOWEST, np.float32)
        self.acc = np.zeros((n, channels + 1), np.float32)  # numerators, and the sum of weights last
        self.index = np.zeros(n, np.int64) if match else None

    def add(self, keys: _Side, weighed: Array, key_rows: tuple[int, int], patch: int, buffers: Array) -> None:
        """Take one tile of keys into the softmax."""
        logits = _taps(self.queries, keys, self.rows, key_rows, patch, buffers)
        n, m = logits.shape
        columns = slice(key_rows[0] * keys.stride, key_rows[0] * keys.stride + m)
        scratch = buffers[1, : n * m].reshape(n, m)
        logits -= np.multiply(self.queries.mean[self.span, None], keys.mean[columns], out=scratch)
        logits *= self.queries.reciprocal[self.span, None]
        logits *= keys.reciprocal[columns]
        for gap in range(keys.width, keys.stride):
            logits[:, gap :: keys.stride] = LOWEST
        maximum = np.maximum(self.maximum, logits.max(axis=1))
        if self.index is not None:
            best = logits.argmax(axis=1)
            flat = (key_rows[0] + best // keys.stride) * keys.width + best % keys.stride
            # the first tile always enters; a later one only with a larger logit, so that the lowest of equals stays
            self.index = np.where(maximum > self.maximum, flat, self.index)
        logits -= maximum[:, None]
        weights = np.exp(logits, out=scratch)
        decay = np.exp(self.maximum - maximum)
        self.acc *= decay[:, None]
        self.acc += weights @ weighed[:, columns].T
        self.maximum = maximum

    def finish(self, out: Array, lse: Array, match: list[npt.NDArray[Any]] | None) -> None:
        """Write the rows of this strip into the results of their batch item."""
        width, stride = self.queries.width, self.queries.stride
        target = slice(self.rows[0] * width, self.rows[1] * width)
        total = self.acc[:, -1]

        def dense(field: npt.NDArray[Any]) -> npt.NDArray[Any]:
            padded = np.pad(field, (0, stride - width)) if stride > width else field
            return padded.reshape(-1, stride)[:, :width].ravel()

        for channel in range(len(out)):
            out[channel, target] = dense(self.acc[:, channel] / total)
        lse[target] = dense(self.maximum + np.log(total))
        if match is not None and self.index is not None:
            match[0][target], match[1][target] = dense(self.index), dense(1 / total)


def softmax_row(
    theta: npt.NDArray[np.floating],
    phi: npt.NDArray[np.floating],
    position: tuple[int, int],
    patch: int,
    temperature: float,
) -> npt.NDArray[np.floating]:
    """The softmax (Hk, Wk) of one query of (C, Hq, Wq) over the keys (C, Hk, Wk); theta may be a crop around it.

    The patch's columns are correlated with the whole key map at once, (p * p, C) @ (C, M), then shifted and summed.
    """
    (channels, height, width), (y, x), half = phi.shape, position, patch // 2
    vectors = np.pad(theta, ((0, 0), (half, half), (half, half)))[:, y : y + patch, x : x + patch]
    products = np.tensordot(vectors, phi, axes=(0, 0))  # (p, p, Hk, Wk)
    padded = np.pad(products, ((0, 0), (0, 0), (half, half), (half, half)))
    taps = sum(padded[i, j, i : i + height, j : j + width] for i in range(patch) for j in range(patch))
    mu, a = (float(plane[y, x]) for plane in patch_statistics(theta, patch))
    nu, b = patch_statistics(phi, patch)
    logits = (taps - (channels * patch * patch * mu) * nu) * b * (a / temperature)
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum(), dtype=phi.dtype)
