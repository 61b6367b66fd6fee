"""The gradient of the warp on the CPU in numba: float32, fused, as `numba_warp`, whose docstring comes first.

Each tile of weights is formed again from the saved log-sum-exp (Dao et al., arXiv 2205.14135, section 3.1), and its
gradient goes through the adjoint of the diagonal taps. The terms through norms and means are vectors over positions:
  logits_ij = (taps_ij - D mu_i nu_j) a_i b_j / temperature,   a = 1 / |centered theta patch|,
  d mu_i = -D sum_j d_taps_ij nu_j,   d a_i = sum_j d_logits_ij logits_ij / a_i,   d |theta|^2_i = -a_i^3 d a_i / 2.

A task follows the diagonals of its query rows once more and does three things in each step, all in the second-level
cache:
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

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from . import numba_warp, tiling
from .numba_warp import (
    COLUMNS,
    F8,
    LANES,
    LOG2_E,
    ROWS,
    Inputs,
    Shape,
    add_product,
    cached_jit,
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

_jit = numba.njit(nogil=True, error_model="numpy")  # without a cache: see `_backward_task`
_inline = numba.njit(nogil=True, error_model="numpy", forceinline=True)
Statistics = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]  # means and reciprocal norms of patches, (H, W)


class Adjoint(NamedTuple):
    """What the backward of one item needs beside `Inputs`, flat float32 arrays.

    `Inputs.query_factors` has three planes more: lse, base 2; delta; reciprocal norm / temperature.
    """

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


@numba_warp.intrinsic
def spread(typing: Any, array: Any, index: Any) -> Any:
    """One float of a flat array in all eight places."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = numba_warp._address(context, builder, signature.args[0], *arguments)
        return numba_warp._spread(builder, builder.load(address))

    return F8(array, types.intp), build


@_inline
def form_logits(line, factors, key_factors, products, slots, tile, n, plane, o_p, o_k, key_plane, count):
    """Logits less lse, base 2, of `count` queries from n on with COLUMNS keys, into `tile`; returns the largest."""
    top = splat(np.float32(LOWEST))
    for v in range(0, COLUMNS, LANES):
        b_mean, b_scale = load(key_factors, o_k + v), load(key_factors, key_plane + o_k + v)
        b_padding = load(key_factors, 2 * key_plane + o_k + v)
        for i in range(count):
            taps = diagonal_sum(products, slots, o_p + i * line + v, line + 1)
            b_a = spread(factors, plane + n + i) * b_scale
            logits = (taps - spread(factors, n + i) * b_mean) * b_a + (b_padding - spread(factors, 2 * plane + n + i))
            store(tile, i * COLUMNS + v, logits)
            top = larger(logits, top)
    return largest(top)


@_inline
def form_gradients(
    line, factors, key_factors, tile, weights, taps, sums, key_sums, n, plane, o_s, o_w, o_t, o_k, key_plane, count
):
    """Weights and gradients of taps from a tile's logits and gradients of weights; adds to the sums of both sides."""
    floor, rows = splat(np.float32(-126)), len(sums) // 2
    for v in range(0, COLUMNS, LANES):
        b_mean, b_scale = load(key_factors, o_k + v), load(key_factors, key_plane + o_k + v)
        k_mean, k_scale = load(key_sums, o_k + v), load(key_sums, key_plane + o_k + v)
        for i in range(count):
            logits = larger(load(tile, i * COLUMNS + v), floor)
            b_weights = exp2(logits)
            store(weights, o_w + i * line + v, b_weights)
            d_weights = load(tile, (ROWS + i) * COLUMNS + v) - spread(factors, 3 * plane + n + i)
            d_logits = b_weights * d_weights
            share = d_logits * (logits + spread(factors, 2 * plane + n + i))
            d_taps = d_logits * (spread(factors, 4 * plane + n + i) * b_scale)
            store(taps, o_t + i * line + v, d_taps)
            o_i = o_s + i * LANES
            store(sums, o_i, load(sums, o_i) + d_taps * b_mean)
            store(sums, rows + o_i, load(sums, rows + o_i) + share)
            k_mean = k_mean + d_taps * spread(factors, n + i)
            k_scale = k_scale + share
        store(key_sums, o_k + v, k_mean)
        store(key_sums, key_plane + o_k + v, k_scale)


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
    panels, tiles, half = shape.columns // COLUMNS, shape.rows // ROWS, len(slots) // 2
    # numba counts references to an array at each access to a field: none inside the loops
    factors, key_factors, values, grad_out = inputs.query_factors, inputs.key_factors, inputs.values, adjoint.grad_out
    tile, weights, taps, sums = work.tile, work.weights, work.taps, work.sums
    query_sums, key_sums = gradients.query_sums, gradients.key_sums
    reached = work.live[slots[-1] // slot_size(shape, len(slots)) * tiles * panels :]
    live = work.live[(len(slots) + 1) * tiles * panels :]
    line, plane, key_plane = shape.line, shape.hq * shape.wq, shape.hk * shape.columns
    n, o_g, count = r * shape.wq + x, r * adjoint.grad_row + x * shape.values, min(shape.block, shape.wq - x)
    sums[:] = 0
    live[:] = 0
    for y in range(0, shape.columns, COLUMNS):
        o_k = s * shape.columns + y
        for i in range(0, count, ROWS):
            rows = min(ROWS, count - i)
            o_w, o_t = i * line + y, slots[-1] + (i + 2 * half) * line + LANES + y
            o_p = i * line + LANES - half + y
            top = form_logits(
                line, factors, key_factors, products, slots, tile, n + i, plane, o_p, o_k, key_plane, rows
            )
            if top < -cutoff:
                for o_row in range(o_t, o_t + rows * line, line):
                    store(taps, o_row, splat(np.float32(0)))
                    store(taps, o_row + LANES, splat(np.float32(0)))
                continue
            if adjoint.features:
                set_product(
                    grad_out, o_g + i * shape.values, shape.values, 1,
                    values, o_k * shape.values, COLUMNS, shape.values, tile, ROWS * COLUMNS, COLUMNS,
                )  # fmt: skip
            form_gradients(
                line, factors, key_factors, tile, weights, taps, sums, key_sums,
                n + i, plane, i * LANES, o_w, o_t, o_k, key_plane, rows,
            )  # fmt: skip
            t, p = i // ROWS, y // COLUMNS
            live[t * panels + p] = 1
            for o_l in range(t * panels, min(t + 2, tiles) * panels, panels):
                reached[o_l + max(p - 1, 0) : o_l + min(p + 2, panels)] = 1
    for i in range(count):
        query_sums[n + i] += total(load(sums, i * LANES))
        query_sums[plane + n + i] += total(load(sums, (shape.rows + i) * LANES))
    if adjoint.values:
        o_v = s * shape.columns * ((shape.values + ROWS - 1) // ROWS * ROWS)
        add_by_keys(shape, live, weights, grad_out, o_g, shape.values, gradients.values, o_v)


@_jit
def slot_size(shape, patch):
    """Floats of one slot: a row of products, or of gradients of taps with their gap."""
    return (shape.rows + patch - 1) * shape.line


@_jit
def spread_row(shape, inputs, adjoint, gradients, work, slots, x, r, s, o_theta):
    """Gradients of the products of query row r, halo included, with key row s, and theirs of both maps."""
    panels, tiles, patch = shape.columns // COLUMNS, shape.rows // ROWS, len(slots)
    size = tiles * panels
    reached, live, taps, products = work.live, work.live[patch * size :], work.taps, work.products
    for tile in range(size):
        live[tile] = 0
        for slot in range(patch):
            live[tile] |= reached[slot * size + tile]
        if live[tile]:
            o_y = tile % panels * COLUMNS
            for i in range(tile // panels * ROWS, tile // panels * ROWS + ROWS):
                for y in range(o_y, o_y + COLUMNS, LANES):
                    o_t = i * shape.line + LANES - patch // 2 + y
                    store(products, i * shape.line + y, diagonal_sum(taps, slots, o_t, shape.line + 1))
    o_k = s * shape.columns
    add_by_queries(shape, live, products, adjoint.keys, o_k * adjoint.wide, adjoint.wide, gradients.theta, o_theta)
    o_q = r * inputs.row + x * shape.channels
    o_p = o_k * ((shape.channels + ROWS - 1) // ROWS * ROWS)
    add_by_keys(shape, live, products, inputs.queries, o_q, shape.channels, gradients.phi, o_p)


def _backward_task(version: str) -> Any:
    """`backward_task` for one version of `numba_warp`.

    numba compares the file of a function and what it encloses, not the files it imports: this function alone is cached,
    with all that it calls, and it encloses the version.
    """

    @cached_jit
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
                for r in range(top - half, bottom + 3 * half if adjoint.features else bottom + half):
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
    """Gradients of theta, phi and values from that of `out`, for contiguous float32 arrays; None without `needs`.

    Memory beside inputs and results: for each thread at work, copies of an item's theta (1), phi (2), values and
    `grad_out`, gradients of theta, phi and values, and 0.5 MiB of tiles.
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
    delta = np.einsum("vhw,vhw->hw", grad_out, out)
    length, step = patch * patch * channels, -(-hq // strips)
    tasks = [range(top, min(top + step, hq)) for top in range(0, hq, step)]
    shape, (first, *others), query_statistics, key_statistics = _run_tasks(
        theta, phi, values, lse, delta, grad_out, patch, temperature, needs, tasks
    )
    d_theta = np.zeros((hq + 2 * half, len(first.theta) // (len(tasks[0]) + 2 * half)), np.float32)
    for task, part in zip(tasks, (first, *others), strict=True):
        d_theta[task.start : task.stop + 2 * half] += part.theta.reshape(-1, d_theta.shape[1])
    d_theta = d_theta.reshape(hq + 2 * half, -1, round_up(channels, COLUMNS))[half : half + hq, half : half + wq]
    for part in others:
        for field in ("phi", "values", "query_sums", "key_sums"):
            target = getattr(first, field)
            target += getattr(part, field)
    query_sums = first.query_sums.reshape(2, hq, wq)
    d_phi, d_values, key_sums = (
        field.reshape(*rows, -1, shape.columns)[..., :wk]
        for field, rows in ((first.phi, (hk,)), (first.values, (hk,)), (first.key_sums, (2,)))
    )
    return (
        d_theta[..., :channels].transpose(2, 0, 1)
        + _through_statistics(theta, query_statistics, -query_sums[0], query_sums[1], patch),
        d_phi[:, :channels].transpose(1, 0, 2)
        + _through_statistics(phi, key_statistics, -length * key_sums[0], key_sums[1], patch),
        d_values[:, : len(values)].transpose(1, 0, 2),
    )


def _run_tasks(
    theta: Array,
    phi: Array,
    values: Array,
    lse: Array,
    delta: Array,
    grad_out: Array,
    patch: int,
    temperature: float,
    needs: tuple[bool, bool, bool],
    tasks: list[range],
) -> tuple[Shape, list[Gradients], Statistics, Statistics]:
    """What each strip of query rows adds to the gradients, and the statistics of both maps."""
    (channels, hq, wq), (_, hk, wk) = theta.shape, phi.shape
    columns, wide = round_up(wk, COLUMNS), round_up(channels, COLUMNS)
    block = choose_block(wq, columns + LANES, patch)
    rows = round_up(block + patch - 1, ROWS)
    padded = round_up(wq, block) - block + rows
    shape = Shape(hq, wq, hk, wk, channels, len(values), columns, columns + LANES, block, rows, rows, 1, len(values))
    queries, query_statistics = _pack(theta, pack_queries, (hq, padded, channels), patch)
    keys, key_statistics = _pack(phi, pack_keys, (hk, columns // COLUMNS, channels, COLUMNS), patch)
    mean, reciprocal = query_statistics
    query_factors = np.empty((5, hq, wq), np.float32)
    query_factors[[0, 1, 4]] = mean, reciprocal * (LOG2_E / temperature), reciprocal / temperature
    query_factors[2:4] = lse * np.float64(LOG2_E), delta
    key_factors = np.zeros((3, hk, columns), np.float32)
    key_factors[:2, :, :wk] = key_statistics[0] * (patch * patch * channels), key_statistics[1]
    key_factors[2, :, wk:] = LOWEST
    carried = np.zeros((len(values), hk, columns), np.float32)
    carried[:, :, :wk] = values
    carried = carried.reshape(len(values), -1, COLUMNS).transpose(1, 0, 2)
    keys_by_position = np.zeros((hk, columns, wide), np.float32)
    keys_by_position[:, :wk, :channels] = phi.transpose(1, 2, 0)
    left = np.zeros((hq, padded, len(values)), np.float32)
    left[:, :wq] = grad_out.transpose(1, 2, 0)
    inputs = Inputs(queries, padded * channels, keys, query_factors.ravel(), key_factors.ravel(), carried.ravel())
    adjoint = Adjoint(_flat(left), left[0].size, keys_by_position.ravel(), wide, needs[0] or needs[1], needs[2])
    slot = (rows + patch - 1) * shape.line
    # a nan somewhere must reach the gradients: no tile is left out
    cutoff = np.float32(25 + math.log2(hk * wk) if np.isfinite(lse).all() else math.inf)

    def run(strip: range) -> Gradients:
        sizes = (
            (len(strip) + patch - 1) * padded * wide, hk * round_up(channels, ROWS) * columns,
            hk * round_up(len(values), ROWS) * columns, 2 * hq * wq, 2 * hk * columns,
        )  # fmt: skip
        gradients = Gradients(*(np.zeros(size, np.float32) for size in sizes))
        slots = tuple(range(0, patch * slot, slot))
        backward_task(shape, inputs, adjoint, gradients, slots, strip.start, strip.stop, cutoff)
        return gradients

    with ThreadPoolExecutor(len(tasks)) as pool:
        return shape, list(pool.map(run, tasks)), query_statistics, key_statistics


def choose_block(width: int, line: int, patch: int) -> int:
    """Query columns of a task, such that its matrices of rows of `line` floats fit in `tiling.CACHE`."""
    rows = max(tiling.CACHE // (4 * line * (2 * patch + 2)) // ROWS, 2) * ROWS
    return -(-width // -(-width // (rows - patch + 1)))


def _flat(array: Array) -> Array:
    """A flat copy, with some zeros behind that the last register tile may read."""
    return np.append(array, np.zeros(ROWS, np.float32))


def _pack(features: Array, kernel: Any, shape: tuple[int, ...], patch: int) -> tuple[Array, Statistics]:
    """A map in the flat layout of `kernel`, and the statistics of its patches."""
    packed = np.zeros(shape, np.float32)
    sums, squares = np.zeros((2, *features.shape[1:]))
    kernel(features, packed, sums, squares, 0, features.shape[1], patch // 2)
    return _flat(packed), statistics_of_sums(sums, squares, patch, len(features))


def _through_statistics(features: Array, statistics: Statistics, d_mean: Array, d_scale: Array, patch: int) -> Array:
    """The gradient of features (C, H, W) through means and norms; `d_scale` sums d_logits * logits, base 2."""
    mean, reciprocal = statistics
    d_squares = -0.5 / LOG2_E * d_scale * reciprocal**2  # of the sum of squares, and of the centered one
    # the centered square is squares - D mean^2; a constant patch has no gradient
    slope: Any = (reciprocal > 0) * (d_mean / (patch * patch * len(features)) - 2 * mean * d_squares)
    through_norm, through_mean = (box_sum(d, patch).astype(np.float32) for d in (2 * d_squares, slope))
    return features * through_norm + through_mean
