"""The fast warp on the CPU: one fused kernel in numba, exact, float32, as quick as the matrix product it contains.

The mathematics is that of `numpy_warp`. What makes it fast, against products from BLAS and separate passes:
  - Diagonals. The taps of (query row r, key row s) need the products of rows (r + k, s + k), so a thread follows
    diagonals s - r = const down its strip of query rows and keeps the products of the last `patch` steps: every
    product is formed once and used while it is in the second-level cache. Only the ends of a strip are formed twice.
  - The product is our own 6 x 16 register tile (Goto and van de Geijn, doi 10.1145/1356052.1356053): each thread
    makes its own, so that no BLAS threads spin against ours, and nothing but a few hundred kilobytes is ever written.
  - Weights are 2^x by a polynomial, eight at a time; a row of keys whose largest logit is so far below the maximum
    that all its weights together vanish in float32 is left out.
numba's own vectorizer is not relied on: `F8`, eight floats, is a type of this file, with loads, stores and arithmetic.
LLVM fits it to the machine (one AVX register, two NEON registers). The threads are Python's, and the kernels release
the interpreter lock; `NUMBA_NUM_THREADS` sets their number. Compiled code is kept in numba's cache where one can be
written (beside this file, else in the user's cache folder), so everything compiled stays in this one file: numba
would not notice a change in another.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba import extending, types
from numba.core import cgutils, config
from numba.extending import models, overload, register_model

from .numpy_warp import LOWEST, Array, Match, empty_match, statistics_of_sums
from .tiling import CacheBlocks, choose_cache_blocks

LANES = 8
ROWS, COLUMNS = 6, 16  # the register tile: 12 of 16 AVX registers accumulate, the rest hold operands
SMALL = 8  # up to so many value channels are summed key by key; more go through the register tile
LOG2_E = math.log2(math.e)
# 2^f for |f| <= 1/2, relative error 2e-8; the constant term is 1, so that the largest key has weight exactly 1
POLYNOMIAL = (
    6.9314718246e-01,
    2.4022647738e-01,
    5.5503323674e-02,
    9.6184369177e-03,
    1.3398876181e-03,
    1.5353359049e-04,
)


intrinsic: Any = extending.intrinsic  # numba's own type has the builder's parameters, not the kernel's


class _F8Type(types.Type):
    def __init__(self) -> None:
        super().__init__(name="F8")


F8 = _F8Type()
_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_VECTOR, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)
_FUSE = ("contract",)  # lets LLVM join a multiplication and an addition where the machine can


@register_model(_F8Type)
class _F8Model(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, _VECTOR)


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


def _read(builder: Any, address: Any) -> Any:
    return builder.load(builder.bitcast(address, _VECTOR.as_pointer()), align=4)


def _write(builder: Any, vector: Any, address: Any) -> None:
    builder.store(vector, builder.bitcast(address, _VECTOR.as_pointer()), align=4)


def _spread(builder: Any, scalar: Any) -> Any:
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_INTS, [0] * LANES))


def _constant(value: float) -> Any:
    return ir.Constant(_VECTOR, [float(np.float32(value))] * LANES)


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=_FUSE), c, flags=_FUSE)


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", a, b), b, a)  # a nan in `a` stays


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Any:
    """Eight floats of a flat array from `index` on."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _read(builder, _address(context, builder, signature.args[0], *arguments))

    return F8(array, types.intp), build


@intrinsic
def store(typing: Any, array: Any, index: Any, vector: Any) -> Any:
    """Write eight floats to a flat array from `index` on."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, index, vector = arguments
        _write(builder, vector, _address(context, builder, signature.args[0], array, index))
        return context.get_dummy_value()

    return types.void(array, types.intp, F8), build


@intrinsic
def splat(typing: Any, scalar: Any) -> Any:
    """One float in all eight places."""
    return F8(types.float32), lambda context, builder, signature, arguments: _spread(builder, arguments[0])


@intrinsic
def larger(typing: Any, a: Any, b: Any) -> Any:
    """The larger of each pair."""
    return F8(F8, F8), lambda context, builder, signature, arguments: _larger(builder, *arguments)


@intrinsic
def exp2(typing: Any, x: Any) -> Any:
    """2^x for -126 <= x <= 0; relative error 1e-7, exact at 0."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rounding = ir.FunctionType(_VECTOR, [_VECTOR])
        nearest = cgutils.get_or_insert_function(builder.module, rounding, f"llvm.rint.v{LANES}f32")
        whole = builder.call(nearest, arguments)
        fraction = builder.fsub(arguments[0], whole)
        power = _constant(POLYNOMIAL[-1])
        for coefficient in (*POLYNOMIAL[-2::-1], 1.0):
            power = _multiply_add(builder, power, fraction, _constant(coefficient))
        exponent = builder.shl(builder.fptosi(whole, _INTS), ir.Constant(_INTS, [23] * LANES))
        return builder.bitcast(builder.add(builder.bitcast(power, _INTS), exponent), _VECTOR)

    return F8(F8), build


def _reduction(combine: Callable[[Any, Any, Any], Any]) -> Any:
    @intrinsic
    def reduce(typing: Any, vector: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            vector, half = arguments[0], LANES // 2
            while half:
                mask = ir.Constant(ir.VectorType(_INT, half), list(range(half)))
                rest = ir.Constant(ir.VectorType(_INT, half), list(range(half, 2 * half)))
                low, high = (builder.shuffle_vector(vector, vector, m) for m in (mask, rest))
                vector, half = combine(builder, low, high), half // 2
            return builder.extract_element(vector, ir.Constant(_INT, 0))

        return types.float32(F8), build

    return reduce


largest = _reduction(_larger)
total = _reduction(lambda builder, a, b: builder.fadd(a, b))


def _arithmetic(symbol: Callable[[Any, Any], Any], instruction: str) -> None:
    @intrinsic
    def apply(typing: Any, a: Any, b: Any) -> Any:
        return F8(F8, F8), lambda context, builder, signature, arguments: getattr(builder, instruction)(
            *arguments, flags=_FUSE
        )

    @overload(symbol)
    def choose(a, b):
        return (lambda a, b: apply(a, b)) if a == F8 and b == F8 else None


_arithmetic(operator.add, "fadd")
_arithmetic(operator.sub, "fsub")
_arithmetic(operator.mul, "fmul")


@intrinsic
def diagonal_sum(typing: Any, array: Any, slots: Any, offset: Any, step: Any) -> Any:
    """Eight tap sums: of array[slots[i] + offset + j * step ...] over i and j below len(slots), the patch."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, slots, offset, step = arguments
        patch, sums = len(signature.args[1]), list[Any]()
        for i in range(patch):
            index = builder.add(builder.extract_value(slots, i), offset)
            for j in range(patch):
                term = _read(builder, _address(context, builder, signature.args[0], array, index))
                # one sum a slot: short chains of additions
                sums[i:] = [builder.fadd(sums[i], term) if j else term]
                index = builder.add(index, step)
        return functools.reduce(builder.fadd, sums)

    return F8(array, slots, types.intp, types.intp), build


def _register_tile(accumulate: bool) -> Any:
    @intrinsic
    def product(
        typing: Any, a: Any, o_a: Any, s_a: Any, d_a: Any, b: Any, o_b: Any, d_b: Any, depth: Any,
        c: Any, o_c: Any, s_c: Any,
    ) -> Any:  # fmt: skip
        """C (ROWS, COLUMNS) = or += A (ROWS, depth) @ B (depth, COLUMNS); o_ offsets, s_ row and d_ depth strides."""

        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            a, o_a, s_a, d_a, b, o_b, d_b, depth, c, o_c, s_c = arguments
            index = depth.type
            rows = [_address(context, builder, signature.args[0], a, o_a)]
            for _ in range(1, ROWS):
                rows.append(builder.gep(rows[-1], [s_a]))
            right = _address(context, builder, signature.args[4], b, o_b)
            line = _address(context, builder, signature.args[8], c, o_c)
            targets = []
            for _ in range(ROWS):
                targets += [builder.gep(line, [ir.Constant(index, j)]) for j in range(0, COLUMNS, LANES)]
                line = builder.gep(line, [s_c])
            # LLVM turns these stack slots into registers
            sums = [
                cgutils.alloca_once_value(builder, _read(builder, target) if accumulate else _constant(0.0))
                for target in targets
            ]
            with cgutils.for_range(builder, depth) as loop:
                start = builder.gep(right, [builder.mul(loop.index, d_b)])
                panel = [_read(builder, builder.gep(start, [ir.Constant(index, j)])) for j in range(0, COLUMNS, LANES)]
                along = builder.mul(loop.index, d_a)
                for i, row in enumerate(rows):
                    factor = _spread(builder, builder.load(builder.gep(row, [along])))
                    for j, column in enumerate(panel):
                        slot = sums[i * len(panel) + j]
                        builder.store(_multiply_add(builder, factor, column, builder.load(slot)), slot)
            for slot, target in zip(sums, targets, strict=True):
                _write(builder, builder.load(slot), target)
            return context.get_dummy_value()

        n = types.intp
        return types.void(a, n, n, n, b, n, n, n, c, n, n), build

    return product


set_product, add_product = _register_tile(False), _register_tile(True)


def cached_jit(function: Callable[..., Any]) -> Any:
    """Compile with numba's cache, where there is a folder for it."""
    compiler = functools.partial(numba.njit, nogil=True, error_model="numpy")
    try:
        return compiler(cache=True)(function)
    except RuntimeError:  # no folder for the cache can be written: compile in each process
        return compiler()(function)


class Shape(NamedTuple):
    """Sizes of one batch item and its tiles, as the kernels need them; offsets are in floats."""

    hq: int
    wq: int
    hk: int
    wk: int
    channels: int
    values: int
    columns: int  # keys of a map row, rounded up to the register tile
    line: int  # products of one query with a key row, and the zero gap before them
    block: int  # queries of a map row that one task takes
    rows: int  # the same with the patch's halo, rounded up to the register tile
    weight_rows: int  # the same without the halo, rounded up
    group: int  # key rows, that is diagonals, followed at once
    carried: int  # value channels with padding


class Inputs(NamedTuple):
    """One batch item in the kernels' layout, flat float32 arrays."""

    queries: Any  # (hq, padded x, channels)
    row: int  # floats of one map row of `queries`
    keys: Any  # (hk, columns / COLUMNS, channels, COLUMNS)
    query_factors: Any  # (2, hq, wq): mean; reciprocal norm * log2(e) / temperature
    key_factors: Any  # (3, hk, columns): D * mean; reciprocal norm; 0, or LOWEST in padding
    values: Any  # (carried, hk * columns), or (carried / COLUMNS, hk * columns, COLUMNS) beyond SMALL channels


class State(NamedTuple):
    """The online softmax of one task's queries, base 2."""

    maximum: Any
    sums: Any  # of weights
    best: Any  # index of the likeliest key
    acc: Any  # (query, carried): numerators


@cached_jit
def pack_queries(features, packed, sums, squares, start, stop, half):
    """Rows of (C, H, W) to (y, x, C), and their sums over channels."""
    channels, _, width = features.shape
    for y in range(start, stop):
        for c in range(channels):
            for x in range(width):
                value = features[c, y, x]
                packed[y, x + half, c] = value
                sums[y, x] += value
                squares[y, x] += np.float64(value) * value


@cached_jit
def pack_keys(features, packed, sums, squares, start, stop, half):
    """Rows of (C, H, W) to panels (y, x // COLUMNS, C, COLUMNS), and their sums over channels."""
    channels, _, width = features.shape
    for y in range(start, stop):
        for c in range(channels):
            for x in range(width):
                value = features[c, y, x]
                packed[y, x // COLUMNS, c, x % COLUMNS] = value
                sums[y, x] += value
                squares[y, x] += np.float64(value) * value


@cached_jit
def form_products(shape, inputs, products, slot, x, r, diagonal):
    """Products of the queries of row r from padded column x on with the key rows r + diagonal + ..., into a slot."""
    panels = shape.columns // COLUMNS
    for g in range(shape.group):
        s = r + diagonal + g
        o_p = slot + g * shape.rows * shape.line + LANES
        if r < 0 or r >= shape.hq or s < 0 or s >= shape.hk:
            for i in range(shape.rows):
                products[o_p + i * shape.line : o_p + i * shape.line + shape.columns] = 0
            continue
        o_q = r * inputs.row + x * shape.channels
        for panel in range(panels):
            o_k = (s * panels + panel) * shape.channels * COLUMNS
            for i in range(0, shape.rows, ROWS):
                set_product(
                    inputs.queries, o_q + i * shape.channels, shape.channels, 1,
                    inputs.keys, o_k, COLUMNS, shape.channels,
                    products, o_p + i * shape.line + panel * COLUMNS, shape.line,
                )  # fmt: skip


@cached_jit
def form_logits(shape, factors, products, slots, o_p, mean, scale, s, weights, o_w):
    """Logits of one query with key row s, into `weights`; returns the largest."""
    plane = shape.hk * shape.columns
    b_mean, b_scale, top = splat(mean), splat(scale), splat(np.float32(LOWEST))
    for y in range(0, shape.columns, LANES):
        o_k = s * shape.columns + y
        taps = diagonal_sum(products, slots, o_p + y, shape.line + 1)
        b_a = b_scale * load(factors, o_k + plane)
        logits = (taps - b_mean * load(factors, o_k)) * b_a + load(factors, o_k + 2 * plane)
        store(weights, o_w + y, logits)
        top = larger(top, logits)
    return largest(top)


@cached_jit
def find_best(shape, state, q, weights, o_w, count, s, peak):
    """Note where the logit `peak`, at least the maximum so far, lies in key rows from s on; lowest index of equals."""
    for i in range(count):
        if weights[o_w + i] == peak:
            index = (s + i // shape.columns) * shape.wk + i % shape.columns
            if peak > state.maximum[q] or index < state.best[q]:
                state.best[q] = index
            return


@cached_jit
def form_weights(shape, state, q, weights, o_w, count, peak):
    """Turn `count` logits into weights under the maximum, which `peak` may raise; update the sums."""
    raised = max(peak, state.maximum[q])
    if raised > state.maximum[q]:
        moved = max(state.maximum[q] - raised, np.float32(-126))
        decay = largest(exp2(splat(moved)))
        state.sums[q] *= decay
        for k in range(q * shape.carried, (q + 1) * shape.carried):
            state.acc[k] *= decay
        state.maximum[q] = raised
    b_max, floor = splat(raised), splat(np.float32(-126))
    b_sum = splat(np.float32(0))
    for i in range(o_w, o_w + count, LANES):
        b_weights = exp2(larger(load(weights, i) - b_max, floor))
        store(weights, i, b_weights)
        b_sum = b_sum + b_weights
    state.sums[q] += total(b_sum)


@cached_jit
def add_values(shape, values, state, q, weights, o_w, count, s):
    """Add the weighted values of `count` keys from key row s on, four channels at once."""
    plane = shape.hk * shape.columns
    for k in range(0, shape.carried, 4):
        b_0 = b_1 = b_2 = b_3 = splat(np.float32(0))
        o_v = k * plane + s * shape.columns
        for i in range(0, count, LANES):
            b_weights = load(weights, o_w + i)
            b_0 = b_0 + b_weights * load(values, o_v + i)
            b_1 = b_1 + b_weights * load(values, o_v + plane + i)
            b_2 = b_2 + b_weights * load(values, o_v + 2 * plane + i)
            b_3 = b_3 + b_weights * load(values, o_v + 3 * plane + i)
        o_a = q * shape.carried + k
        state.acc[o_a] += total(b_0)
        state.acc[o_a + 1] += total(b_1)
        state.acc[o_a + 2] += total(b_2)
        state.acc[o_a + 3] += total(b_3)


@cached_jit
def add_value_tiles(shape, values, state, q, weights, count, s):
    """`add_values` for a whole row of queries from q on and many channels, through the register tile."""
    size, keys = shape.group * shape.columns, shape.hk * shape.columns
    for k in range(0, shape.carried, COLUMNS):
        o_v = k * keys + s * shape.columns * COLUMNS
        for i in range(0, shape.weight_rows, ROWS):
            add_product(
                weights, i * size, size, 1, values, o_v, COLUMNS, count,
                state.acc, (q + i) * shape.carried + k, shape.carried,
            )  # fmt: skip


@cached_jit
def take_row(shape, inputs, products, slots, x, r, first, diagonal, weights, state, cutoff):
    """Take the products of query row r with up to `group` key rows into the softmax; `first` is the strip's row."""
    start = max(0, -(r + diagonal))
    stop = min(shape.group, shape.hk - r - diagonal)
    s, count, half = r + diagonal + start, (stop - start) * shape.columns, len(slots) // 2
    plane = shape.hq * shape.wq
    any_left = False
    for i in range(min(shape.block, shape.wq - x)):
        n, q = r * shape.wq + x + i, (r - first) * shape.weight_rows + i
        o_w = i * shape.group * shape.columns if shape.values > SMALL else 0  # one row alone stays in the first cache
        mean, scale = inputs.query_factors[n], inputs.query_factors[plane + n]
        peak = np.float32(LOWEST)
        for g in range(start, stop):
            o_p = (g * shape.rows + i) * shape.line + LANES - half
            row_peak = form_logits(
                shape, inputs.key_factors, products, slots, o_p, mean, scale, s + g - start,
                weights, o_w + (g - start) * shape.columns,
            )  # fmt: skip
            peak = max(peak, row_peak)
        if peak < state.maximum[q] - cutoff:
            if shape.values > SMALL:
                weights[o_w : o_w + count] = 0
            continue
        if peak >= state.maximum[q]:
            find_best(shape, state, q, weights, o_w, count, s, peak)
        form_weights(shape, state, q, weights, o_w, count, peak)
        any_left = True
        if shape.values <= SMALL:
            add_values(shape, inputs.values, state, q, weights, o_w, count, s)
    if any_left and shape.values > SMALL:
        add_value_tiles(shape, inputs.values, state, (r - first) * shape.weight_rows, weights, count, s)


@cached_jit
def write_results(shape, state, x, first, last, out, lse, index, probability):
    """Finish the softmax of one task's queries."""
    for r in range(first, last):
        for i in range(min(shape.block, shape.wq - x)):
            n, q = r * shape.wq + x + i, (r - first) * shape.weight_rows + i
            weight = state.sums[q]
            for k in range(shape.values):
                out[k, n] = state.acc[q * shape.carried + k] / weight
            lse[n] = (state.maximum[q] + math.log2(weight)) * math.log(2)
            index[n] = state.best[q]
            probability[n] = 1 / weight


@cached_jit
def warp_task(shape, inputs, slots, x, first, last, cutoff, results):
    """One task: the warp of the queries of rows first to last, from column x on. `slots` holds `patch` offsets."""
    half, rows = len(slots) // 2, (last - first) * shape.weight_rows
    products = np.zeros(len(slots) * shape.group * shape.rows * shape.line + LANES, np.float32)
    weight_rows = shape.weight_rows if shape.values > SMALL else 1
    weights = np.zeros(weight_rows * shape.group * shape.columns, np.float32)
    state = State(
        np.full(rows, np.float32(LOWEST)), np.zeros(rows, np.float32), np.zeros(rows, np.int64),
        np.zeros(rows * shape.carried, np.float32),
    )  # fmt: skip
    for diagonal in range(1 - last, shape.hk - first, shape.group):
        top = max(first, 1 - diagonal - shape.group)
        bottom = min(last, shape.hk - diagonal)
        for r in range(top - half, bottom + half):
            slots = slots[1:] + slots[:1]
            form_products(shape, inputs, products, slots[-1], x, r, diagonal)
            if r - half >= top:
                take_row(shape, inputs, products, slots, x, r - half, first, diagonal, weights, state, cutoff)
    write_results(shape, state, x, first, last, *results)


def warp_forward(
    theta: Array, phi: Array, values: Array, patch: int, temperature: float, *, match: bool = False, threads: int = 0
) -> tuple[Array, Array, Match | None]:
    """As `numpy_warp.warp_forward`; the match costs nothing here. `threads` 0 stands for `NUMBA_NUM_THREADS`.

    Memory beside inputs and results: one item's theta and phi in the kernels' layout, and for each thread about
    0.5 MiB of tiles and the state of its queries, (V + 4) * 4 bytes each.
    """
    (batch, _, hq, wq), channels = theta.shape, values.shape[1]
    out, lse = np.empty((batch, channels, hq * wq), np.float32), np.empty((batch, hq * wq), np.float32)
    matches = empty_match(batch, hq * wq)
    threads = threads or config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    blocks = choose_cache_blocks(theta.shape[2:], phi.shape[2:], patch, threads, rows=ROWS, columns=COLUMNS)
    with ThreadPoolExecutor(threads) as pool:
        for i in range(batch):
            results = (out[i], lse[i], *(field[i] for field in matches))
            _warp_item(pool, blocks, theta[i], phi[i], values[i], patch, temperature, results)
    return out, lse, matches if match else None


def round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _warp_item(
    pool: ThreadPoolExecutor,
    blocks: CacheBlocks,
    theta: Array,
    phi: Array,
    values: Array,
    patch: int,
    temperature: float,
    results: tuple[npt.NDArray[Any], ...],
) -> None:
    (channels, hq, wq), (_, hk, wk) = theta.shape, phi.shape
    columns = round_up(wk, COLUMNS)
    few = len(values) <= SMALL
    rows = round_up(blocks.block + patch - 1, ROWS)
    shape = Shape(
        hq, wq, hk, wk, channels, len(values), columns, columns + LANES, blocks.block, rows,
        round_up(blocks.block, ROWS), blocks.group, round_up(len(values), 4 if few else COLUMNS),
    )  # fmt: skip
    starts = range(0, wq, blocks.block)
    queries = np.zeros((hq, starts[-1] + rows, channels), np.float32)
    keys = np.zeros((hk, columns // COLUMNS, channels, COLUMNS), np.float32)
    query_statistics = _pack(pool, pack_queries, theta, queries, patch)
    key_statistics = _pack(pool, pack_keys, phi, keys, patch)
    carried = np.zeros((shape.carried, hk, columns), np.float32)
    carried[: len(values), :, :wk] = values
    if not few:
        carried = carried.reshape(-1, COLUMNS, hk * columns).transpose(0, 2, 1)
    mean, reciprocal = query_statistics()
    query_factors = np.stack([mean, reciprocal * (LOG2_E / temperature)]).astype(np.float32)
    mean, reciprocal = key_statistics()
    key_factors = np.zeros((3, hk, columns), np.float32)
    key_factors[:2, :, :wk] = mean * (patch * patch * channels), reciprocal
    key_factors[2, :, wk:] = LOWEST
    flat = (np.ascontiguousarray(array).ravel() for array in (queries, keys, query_factors, key_factors, carried))
    inputs = Inputs(next(flat), queries[0].size, *flat)
    slots = tuple(range(0, patch * shape.group * rows * shape.line, shape.group * rows * shape.line))
    # all weights left out together are below 2^-25 of the sum, half a unit in its last place
    cutoff = np.float32(25 + math.log2(hk * wk))
    tasks = [(x, top, min(top + blocks.strip, hq)) for top in range(0, hq, blocks.strip) for x in starts]
    list(pool.map(lambda task: warp_task(shape, inputs, slots, *task, cutoff, results), tasks))


def _pack(
    pool: ThreadPoolExecutor, kernel: Any, features: Array, packed: Array, patch: int
) -> Callable[[], tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    """Begin to bring one map into the layout of `kernel`; the result waits, and returns its patch statistics."""
    (channels, height, width), step = features.shape, 8
    sums, squares = np.zeros((2, height, width))
    jobs = [
        pool.submit(kernel, features, packed, sums, squares, start, min(start + step, height), patch // 2)
        for start in range(0, height, step)
    ]

    def finish() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        for job in jobs:
            job.result()
        return statistics_of_sums(sums, squares, patch, channels)

    return finish
