"""The gradient of the warp on the CPU in numba: float32, fused, as `numba_warp`, whose docstring comes first.

The mathematics is that of `torch_warp.warp_backward`. A task follows the diagonals of its query rows once more and does
three things in each step, all in the second-level cache:
  1. products of query row r with key row r + diagonal,
  2. of the row half a patch before, whose taps are complete: logits, weights 2^(logit - lse), and gradients of taps,
  3. of the row another half before: the adjoint of the taps, and the matrix products with both maps.
A tile of ROWS queries and COLUMNS keys is left out of 2 and 3 where each of its weights is below 2^-25 / M, M keys.
What a query leaves out weighs less than 2^-25 together, half a unit in the last place of 1, the sum of its weights. So
each gradient loses less than by the rounding of `delta`, the mean gradient under these weights that each is less by.

Items of a batch are independent. Where they are fewer than the threads, the query rows of an item are shared out too,
each strip with gradients of phi and values of its own, which are added in order: equal numbers of threads, equal bits.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np

from . import numba_warp, tiling
from .numba_warp import (
    COLUMNS,
    LANES,
    LOG2_E,
    ROWS,
    Inputs,
    Shape,
    add_product,
    diagonal_sum,
    exp2,
    form_products,
    larger,
    largest,
    load,
    pack_keys,
    pack_queries,
    round_up,
    set_product,
    splat,
    store,
    total,
)
from .numpy_warp import LOWEST, Array, box_sum, statistics_of_sums

_jit = numba.njit(nogil=True, error_model="numpy")  # without a cache: see `_cached`


class Adjoint(NamedTuple):
    """What the backward of one item needs beside `Inputs`, flat float32 arrays."""

    factors: Any  # (3, hq, wq): lse, base 2; delta; reciprocal norm / temperature
    grad_out: Any  # (hq, padded x, values)
    grad_row: int  # floats of one map row of `grad_out`
    keys: Any  # (hk, columns, wide)
    wide: int  # channels rounded up to COLUMNS
    features: bool  # gradients of theta or phi are wanted
    values: bool  # gradients of the values are wanted


class Gradients(NamedTuple):
    """What one task adds up, flat float32 arrays; channels are rounded up to the register tile."""

    theta: Any  # (strip and halo, padded x, channels)
    phi: Any  # (hk, channels, columns)
    values: Any  # (hk, values, columns)
    query_sums: Any  # (2, hq, wq): over keys, of d_taps * D * mean; of d_logits * logits, base 2
    key_sums: Any  # (2, hk, columns): over queries, of d_taps * mean; of d_logits * logits, base 2


class Work(NamedTuple):
    """Memory of one task; matrices of queries and keys have rows of `line` floats."""

    tile: Any  # (2, ROWS, COLUMNS): logits less lse; gradients of weights
    sums: Any  # (2, rows, LANES): `query_sums` of the present row
    weights: Any  # (rows, line)
    taps: Any  # (patch, rows + halo, line): gradients of taps, with a zero gap on all sides
    products: Any  # (rows, line): gradients of products
    live: Any  # (patch + 2, tiles, panels): tiles that the taps of each slot reach; all slots; tiles of `weights`


@_jit
def form_tile(shape, inputs, adjoint, gradients, work, products, slots, n, o_g, s, y, start, stop, cutoff):
    """Weights of a register tile, queries from n + start on, keys from (s, y) on, and gradients of its taps.

    Returns False where all weights vanish.
    """
    o_k, half = s * shape.columns + y, len(slots) // 2
    plane, key_plane = shape.hq * shape.wq, shape.hk * shape.columns
    o_t = slots[-1] + 2 * half * shape.line + LANES + y
    top = splat(np.float32(LOWEST))
    for v in range(0, COLUMNS, LANES):
        b_mean, b_scale = load(inputs.key_factors, o_k + v), load(inputs.key_factors, key_plane + o_k + v)
        b_padding = load(inputs.key_factors, 2 * key_plane + o_k + v)
        for i in range(start, stop):
            taps = diagonal_sum(products, slots, i * shape.line + LANES - half + y + v, shape.line + 1)
            b_a = splat(inputs.query_factors[plane + n + i]) * b_scale
            logits = (taps - splat(inputs.query_factors[n + i]) * b_mean) * b_a + b_padding
            logits = logits - splat(adjoint.factors[n + i])
            store(work.tile, (i - start) * COLUMNS + v, logits)
            top = larger(logits, top)
    if largest(top) < -cutoff:
        for i in range(start, stop):
            for v in range(0, COLUMNS, LANES):
                store(work.taps, o_t + i * shape.line + v, splat(np.float32(0)))
        return False
    o_d = ROWS * COLUMNS
    if adjoint.features:
        set_product(
            adjoint.grad_out, o_g + start * shape.values, shape.values, 1,
            inputs.values, o_k * shape.values, COLUMNS, shape.values, work.tile, o_d, COLUMNS,
        )  # fmt: skip
    for v in range(0, COLUMNS, LANES):
        b_mean, b_scale = load(inputs.key_factors, o_k + v), load(inputs.key_factors, key_plane + o_k + v)
        k_mean, k_scale = load(gradients.key_sums, o_k + v), load(gradients.key_sums, key_plane + o_k + v)
        for i in range(start, stop):
            o_w = (i - start) * COLUMNS + v
            logits = larger(load(work.tile, o_w), splat(np.float32(-126)))
            weights = exp2(logits)
            store(work.weights, i * shape.line + y + v, weights)
            d_logits = weights * (load(work.tile, o_d + o_w) - splat(adjoint.factors[plane + n + i]))
            share = d_logits * (logits + splat(adjoint.factors[n + i]))
            d_taps = d_logits * (splat(adjoint.factors[2 * plane + n + i]) * b_scale)
            store(work.taps, o_t + i * shape.line + v, d_taps)
            o_s, o_r = i * LANES, (shape.rows + i) * LANES
            store(work.sums, o_s, load(work.sums, o_s) + d_taps * b_mean)
            store(work.sums, o_r, load(work.sums, o_r) + share)
            k_mean = k_mean + d_taps * splat(inputs.query_factors[n + i])
            k_scale = k_scale + share
        store(gradients.key_sums, o_k + v, k_mean)
        store(gradients.key_sums, key_plane + o_k + v, k_scale)
    return True


@_jit
def add_by_keys(shape, live, matrix, left, o_a, channels, target, o_c):
    """target (channels, keys) += left (queries, channels)^T @ matrix (queries, keys), where tiles are live."""
    panels, tiles = shape.columns // COLUMNS, shape.rows // ROWS
    for p in range(panels):
        start = 0
        for t in range(tiles + 1):
            if t < tiles and live[t * panels + p]:
                continue
            for c in range(0, channels if t > start else 0, ROWS):
                add_product(
                    left, o_a + start * ROWS * channels + c, 1, channels,
                    matrix, start * ROWS * shape.line + p * COLUMNS, shape.line, (t - start) * ROWS,
                    target, o_c + c * shape.columns + p * COLUMNS, shape.columns,
                )  # fmt: skip
            start = t + 1


@_jit
def add_by_queries(shape, live, matrix, right, o_b, channels, target, o_c):
    """target (queries, channels) += matrix (queries, keys) @ right (keys, channels), where tiles are live."""
    panels, tiles = shape.columns // COLUMNS, shape.rows // ROWS
    for t in range(tiles):
        start = 0
        for p in range(panels + 1):
            if p < panels and live[t * panels + p]:
                continue
            for c in range(0, channels if p > start else 0, COLUMNS):
                add_product(
                    matrix, t * ROWS * shape.line + start * COLUMNS, shape.line, 1,
                    right, o_b + start * COLUMNS * channels + c, channels, (p - start) * COLUMNS,
                    target, o_c + t * ROWS * channels + c, channels,
                )  # fmt: skip
            start = p + 1


@_jit
def form_row(shape, inputs, adjoint, gradients, work, products, slots, x, r, s, cutoff):
    """Gradients of taps of query row r with key row s, into the last of `slots`; adds those of the values."""
    panels, tiles, patch = shape.columns // COLUMNS, shape.rows // ROWS, len(slots)
    size = tiles * panels
    reached = work.live[slots[-1] // slot_size(shape, patch) * size :]
    live = work.live[(patch + 1) * size :]
    n, o_g, count = r * shape.wq + x, r * adjoint.grad_row + x * shape.values, min(shape.block, shape.wq - x)
    work.sums[:] = 0
    live[:] = 0
    for panel in range(panels):
        for tile in range((count + ROWS - 1) // ROWS):
            start, y = tile * ROWS, panel * COLUMNS
            stop = min(start + ROWS, count)
            if not form_tile(
                shape, inputs, adjoint, gradients, work, products, slots, n, o_g, s, y, start, stop, cutoff
            ):
                continue
            live[tile * panels + panel] = 1
            for t in range(tile, min(tile + 2, tiles)):
                for p in range(max(panel - 1, 0), min(panel + 2, panels)):
                    reached[t * panels + p] = 1
    for i in range(count):
        gradients.query_sums[n + i] += total(load(work.sums, i * LANES))
        gradients.query_sums[shape.hq * shape.wq + n + i] += total(load(work.sums, (shape.rows + i) * LANES))
    if adjoint.values:
        o_v = s * shape.columns * ((shape.values + ROWS - 1) // ROWS * ROWS)
        add_by_keys(shape, live, work.weights, adjoint.grad_out, o_g, shape.values, gradients.values, o_v)


@_jit
def slot_size(shape, patch):
    """Floats of one slot: a row of products, or of gradients of taps with their gap."""
    return (shape.rows + patch - 1) * shape.line


@_jit
def spread_row(shape, inputs, adjoint, gradients, work, slots, x, r, s, o_theta):
    """Gradients of the products of query row r, halo included, with key row s, and theirs of both maps."""
    panels, tiles, patch = shape.columns // COLUMNS, shape.rows // ROWS, len(slots)
    size = tiles * panels
    live = work.live[patch * size :]
    for tile in range(size):
        live[tile] = 0
        for slot in range(patch):
            live[tile] |= work.live[slot * size + tile]
        if live[tile]:
            o_y = tile % panels * COLUMNS
            for i in range(tile // panels * ROWS, tile // panels * ROWS + ROWS):
                for y in range(o_y, o_y + COLUMNS, LANES):
                    o_t = i * shape.line + LANES - patch // 2 + y
                    store(work.products, i * shape.line + y, diagonal_sum(work.taps, slots, o_t, shape.line + 1))
    o_k = s * shape.columns
    add_by_queries(shape, live, work.products, adjoint.keys, o_k * adjoint.wide, adjoint.wide, gradients.theta, o_theta)
    o_q = r * inputs.row + x * shape.channels
    o_p = o_k * ((shape.channels + ROWS - 1) // ROWS * ROWS)
    add_by_keys(shape, live, work.products, inputs.queries, o_q, shape.channels, gradients.phi, o_p)


def _cached(function: Callable[..., Any]) -> Any:
    """Compile with numba's cache, where there is a folder for it."""
    compiler = functools.partial(numba.njit, nogil=True, error_model="numpy")
    try:
        return compiler(cache=True)(function)
    except RuntimeError:  # no folder for the cache can be written: compile in each process
        return compiler()(function)


def _backward_task(version: str) -> Any:
    """`backward_task` for one version of `numba_warp`.

    numba compares the file of a function and what it encloses, not the files it imports: this function alone is cached,
    with all that it calls, and it encloses the version.
    """

    @_cached
    def backward_task(shape, inputs, adjoint, gradients, slots, first, last, cutoff):
        """One task: what the queries of rows first to last add to all gradients. `slots` holds `patch` offsets."""
        assert version
        half, patch, slot = len(slots) // 2, len(slots), slot_size(shape, len(slots))
        size = shape.rows // ROWS * (shape.columns // COLUMNS)
        products = np.zeros(patch * slot + LANES, np.float32)
        work = Work(
            np.zeros(2 * ROWS * COLUMNS, np.float32), np.zeros(2 * shape.rows * LANES, np.float32),
            np.zeros(shape.rows * shape.line, np.float32), np.zeros(patch * slot + LANES, np.float32),
            np.zeros(shape.rows * shape.line, np.float32), np.zeros((patch + 2) * size, np.uint8),
        )  # fmt: skip
        for x in range(0, shape.wq, shape.block):
            work.taps[:] = 0
            work.weights[:] = 0
            for diagonal in range(1 - last, shape.hk - first):
                top, bottom = max(first, -diagonal), min(last, shape.hk - diagonal)
                for r in range(top - half, bottom + 3 * half):
                    slots = slots[1:] + slots[:1]
                    if r < bottom + half:
                        form_products(shape, inputs, products, slots[-1], x, r, diagonal)
                    number, q = slots[-1] // slot, r - half
                    work.live[number * size : (number + 1) * size] = 0
                    if top <= q < bottom:
                        form_row(shape, inputs, adjoint, gradients, work, products, slots, x, q, q + diagonal, cutoff)
                    else:
                        work.taps[slots[-1] : slots[-1] + slot] = 0
                    q -= half
                    s = q + diagonal
                    if adjoint.features and top - half <= q and 0 <= q < shape.hq and 0 <= s < shape.hk:
                        o_theta = ((q - first + half) * (inputs.row // shape.channels) + x) * adjoint.wide
                        spread_row(shape, inputs, adjoint, gradients, work, slots, x, q, s, o_theta)

    return backward_task


backward_task = _backward_task(hashlib.sha256(Path(numba_warp.__file__).read_bytes()).hexdigest())


def warp_backward(
    theta: Array,
    phi: Array,
    values: Array,
    out: Array,
    lse: Array,
    grad_out: Array,
    patch: int,
    temperature: float,
    needs: tuple[bool, bool, bool] = (True, True, True),
    *,
    threads: int = 1,
) -> tuple[Array | None, Array | None, Array | None]:
    """As `torch_warp.warp_backward`, for contiguous float32 arrays.

    Memory beside inputs and results: for each thread at work, about three times an item's theta, phi and values, and
    0.5 MiB of tiles.
    """
    grads = [np.empty_like(x) if need else None for x, need in zip((theta, phi, values), needs, strict=True)]
    strips = min(-(-threads // len(theta)), theta.shape[2])

    def run(i: int) -> None:
        gradients = _item_gradients(
            theta[i], phi[i], values[i], out[i], lse[i], grad_out[i], patch, temperature, needs, strips
        )
        for target, gradient in zip(grads, gradients, strict=True):
            if target is not None:
                target[i] = gradient

    with ThreadPoolExecutor(min(threads, len(theta))) as pool:
        list(pool.map(run, range(len(theta))))
    return grads[0], grads[1], grads[2]


def _item_gradients(
    theta: Array,
    phi: Array,
    values: Array,
    out: Array,
    lse: Array,
    grad_out: Array,
    patch: int,
    temperature: float,
    needs: tuple[bool, bool, bool],
    strips: int,
) -> tuple[Array, Array, Array]:
    """The gradients of one item, the unneeded ones of no use."""
    (channels, hq, wq), (_, hk, wk), half = theta.shape, phi.shape, patch // 2
    columns, wide = round_up(wk, COLUMNS), round_up(channels, COLUMNS)
    block = choose_block(wq, columns + LANES, patch)
    rows, padded = round_up(block + patch - 1, ROWS), round_up(wq, block) + round_up(block + patch - 1, ROWS)
    shape = Shape(hq, wq, hk, wk, channels, len(values), columns, columns + LANES, block, rows, rows, 1, len(values))
    queries, query_mean, query_reciprocal = _pack(theta, pack_queries, (hq, padded, channels), patch)
    keys, key_mean, key_reciprocal = _pack(phi, pack_keys, (hk, columns // COLUMNS, channels, COLUMNS), patch)
    query_factors = np.stack([query_mean, query_reciprocal * (LOG2_E / temperature)]).astype(np.float32)
    key_factors = np.zeros((3, hk, columns), np.float32)
    key_factors[:2, :, :wk] = key_mean * (patch * patch * channels), key_reciprocal
    key_factors[2, :, wk:] = LOWEST
    carried = np.zeros((len(values), hk, columns), np.float32)
    carried[:, :, :wk] = values
    panels = carried.reshape(len(values), hk, -1, COLUMNS).transpose(1, 2, 0, 3)
    inputs = Inputs(queries, padded * channels, keys, *map(_flat, (query_factors, key_factors, panels)))
    delta = np.einsum("vhw,vhw->hw", grad_out, out)
    factors = np.stack([lse * np.float64(LOG2_E), delta, query_reciprocal / temperature]).astype(np.float32)
    right = np.zeros((hk, columns, wide), np.float32)
    right[:, :wk, :channels] = phi.transpose(1, 2, 0)
    left = np.zeros((hq, padded, len(values)), np.float32)
    left[:, :wq] = grad_out.transpose(1, 2, 0)
    adjoint = Adjoint(_flat(factors), _flat(left), left[0].size, _flat(right), wide, needs[0] or needs[1], needs[2])
    slots = tuple(range(0, patch * (rows + patch - 1) * shape.line, (rows + patch - 1) * shape.line))
    # a nan somewhere must reach the gradients: no tile is left out
    cutoff = np.float32(25 + math.log2(hk * wk) if np.isfinite(lse).all() else math.inf)

    def run(strip: range) -> Gradients:
        sizes = (
            (len(strip) + 2 * half) * padded * wide, hk * round_up(channels, ROWS) * columns,
            hk * round_up(len(values), ROWS) * columns, 2 * hq * wq, 2 * hk * columns,
        )  # fmt: skip
        gradients = Gradients(*(np.zeros(size, np.float32) for size in sizes))
        backward_task(shape, inputs, adjoint, gradients, slots, strip.start, strip.stop, cutoff)
        return gradients

    step = -(-hq // strips)
    tasks = [range(top, min(top + step, hq)) for top in range(0, hq, step)]
    with ThreadPoolExecutor(len(tasks)) as pool:
        first, *others = pool.map(run, tasks)
    d_theta = np.zeros((hq + 2 * half, padded, wide), np.float32)
    for task, part in zip(tasks, (first, *others), strict=True):
        d_theta[task.start : task.stop + 2 * half] += part.theta.reshape(-1, padded, wide)
    for part in others:
        for field in ("phi", "values", "query_sums", "key_sums"):
            target = getattr(first, field)
            target += getattr(part, field)
    query_sums, key_sums = first.query_sums.reshape(2, hq, wq), first.key_sums.reshape(2, hk, columns)[:, :, :wk]
    return (
        d_theta[half : half + hq, half : half + wq, :channels].transpose(2, 0, 1)
        + _through_statistics(theta, query_mean, query_reciprocal, -query_sums[0], query_sums[1], patch),
        first.phi.reshape(hk, -1, columns)[:, :channels, :wk].transpose(1, 0, 2)
        + _through_statistics(
            phi, key_mean, key_reciprocal, -patch * patch * channels * key_sums[0], key_sums[1], patch
        ),
        first.values.reshape(hk, -1, columns)[:, : len(values), :wk].transpose(1, 0, 2),
    )


def choose_block(width: int, line: int, patch: int) -> int:
    """Query columns of a task, such that its matrices of rows of `line` floats fit in `tiling.CACHE`."""
    rows = max(tiling.CACHE // (4 * line * (2 * patch + 2)) // ROWS, 2) * ROWS
    return -(-width // -(-width // (rows - patch + 1)))


def _flat(array: Array) -> Array:
    """A flat copy, with some zeros behind that the last register tile may read."""
    return np.append(array, np.zeros(ROWS, np.float32))


def _pack(features: Array, kernel: Any, shape: tuple[int, ...], patch: int) -> tuple[Array, Any, Any]:
    """A map in the flat layout of `kernel`, the mean and the reciprocal norm of its patches."""
    packed = np.zeros(shape, np.float32)
    sums, squares = np.zeros((2, *features.shape[1:]))
    kernel(features, packed, sums, squares, 0, features.shape[1], patch // 2)
    return _flat(packed), *statistics_of_sums(sums, squares, patch, len(features))


def _through_statistics(
    features: Array, mean: Any, reciprocal: Any, d_mean: Array, d_scale: Array, patch: int
) -> Array:
    """The gradient of features (C, H, W) through means and norms; `d_scale` sums d_logits * logits, base 2."""
    d_squares = -0.5 / LOG2_E * d_scale * reciprocal**2  # of the sum of squares, and of the centered one
    # the centered square is squares - D mean^2; a constant patch has no gradient
    slope: Any = (reciprocal > 0) * (d_mean / (patch * patch * len(features)) - 2 * mean * d_squares)
    through_norm, through_mean = (box_sum(d, patch).astype(np.float32) for d in (2 * d_squares, slope))
    return features * through_norm + through_mean
