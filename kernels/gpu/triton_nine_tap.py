"""The forward by the nine-tap identity: a patch of 3 at about a sixth of the multiply-adds of `forward_kernel`.

The patch correlation is a diagonal sum of plain products. With A(r, s) the tile of theta's row r times phi's row s,

    V(r, s) = A(r - 1, s - 1) + A(r, s) + A(r + 1, s + 1)                  the vertical taps
    S(r, s)[i, j] = V[i - 1, j - 1] + V[i, j] + V[i + 1, j + 1]            the horizontal ones

A program walks down diagonals: r and s grow together, so each tile is made once, serves three scores and is then
forgotten; two sums of tiles are all that is carried. The horizontal taps are two shifts of the finished sum through
shared memory (`diagonal_taps`), after which its outermost lanes miss a neighbor and only feed the others.

Lanes. A tile's rows are BN lanes of queries, its columns BM lanes of keys. A query lane is a column of a band of at
most BAND rows, and the lanes of all bands follow one another; a key lane is a column of a segment of the key map, and
the lanes of all segments likewise, so that a narrow map fills its tiles. What lies outside a map is loaded as zero, the
padding of the definition.

State. Of each query the running maximum stays in registers; the denominator and the unfinished output and match wait
in memory where the result will be, in float32. With few tiles of queries the walks are split over programs, each with
an output of its own, and `merge_kernel` joins them.

Skipping. A tile whose largest logit lies `skip` below the running maximum of each of its queries is dropped before the
exponential and the product with the values. All that can be dropped weighs at most M 2^-skip = 2^-24 of the largest
weight, so the result is exact to float32 rounding. Offsets are 32 bits: `configs.nine_tap_blocks` sees to it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernels import LN_2, WIDEN

SEGMENT = tl.constexpr(32)  # most key rows of a segment
SKIP_BITS = tl.constexpr(24)  # weights below 2^-24 of the largest, all keys together, are below float32 rounding
EMPTY = tl.constexpr(-1e30)  # a running maximum before any key: finite, so that no difference is inf - inf


@triton.jit
def key_lanes(height, width, BM: tl.constexpr):
    """Segments, rows of each, lanes from one segment to the next, lanes from one tile to the next, and tiles."""
    segments = tl.cdiv(height, SEGMENT)
    rows = tl.cdiv(height, segments)
    # a row that nearly fills the tile has the map's border for a halo
    whole = (width <= BM) & (8 * width >= 7 * BM)
    period = tl.where(whole, BM, width + 1)
    stride = tl.where(whole, BM, BM - 2)
    return segments, rows, period, stride, tl.cdiv(segments * period, stride)


@triton.jit
def diagonal_taps(b_v, m_next, m_last, BN: tl.constexpr, BM: tl.constexpr):
    """b_v[i, j] + b_v[i + 1, j + 1] + b_v[i - 1, j - 1], with the neighbors of those i that m_next and m_last name.

    Beyond the first and last column there is zero, beyond the first and last row anything.

    The flat order that crosses shared memory splits i into (i2, i1), i1 below 8, and j into (j3, j2, j1), j2 below 4
    and j1 below 2: a warp that holds tensor-core sums has the 32 combinations of i1 and j2, which are innermost and so
    lie in 32 banks. The shifts are spelled out by digit, so that an address is a lane's own part and a constant.
    """
    flat = tl.reshape(tl.permute(tl.reshape(b_v, [BN // 8, 8, BM // 8, 4, 2]), (0, 2, 4, 3, 1)), [BN * BM])
    i2 = tl.arange(0, BN // 8)[:, None, None, None, None]
    j3 = tl.arange(0, BM // 8)[None, :, None, None, None]
    j1 = tl.arange(0, 2)[None, None, :, None, None]
    j2 = tl.arange(0, 4)[None, None, None, :, None]
    i1 = tl.arange(0, 8)[None, None, None, None, :]
    row_next = tl.where(i1 == 7, tl.where(i2 == BN // 8 - 1, 0, 8 * BM), i1 + 1)
    row_last = tl.where(i1 == 0, tl.where(i2 == 0, 0, 7 - 8 * BM), i1 - 1)
    column_next = tl.where(j1 == 0, 32 + 8 * j2, tl.where(j2 == 3, tl.where(j3 == BM // 8 - 1, 0, 64), 8 * j2 + 8))
    column_last = tl.where(j1 == 1, 8 * j2, tl.where(j2 == 0, tl.where(j3 == 0, 24, -8), 8 * j2 + 24))
    base = i2 * (8 * BM) + j3 * 64
    b_next = tl.gather(flat, tl.reshape(base + (row_next + column_next), [BN * BM]), 0)
    b_last = tl.gather(flat, tl.reshape(base + (row_last + column_last), [BN * BM]), 0)
    o_j = tl.arange(0, BM)[None, :]
    b_next = tl.where(m_next[:, None] & (o_j < BM - 1), _unflatten(b_next, BN, BM), 0.0)
    b_last = tl.where(m_last[:, None] & (o_j > 0), _unflatten(b_last, BN, BM), 0.0)
    return b_v + b_next + b_last


@triton.jit
def _unflatten(flat, BN: tl.constexpr, BM: tl.constexpr):
    return tl.reshape(tl.permute(tl.reshape(flat, [BN // 8, BM // 8, 2, 4, 8]), (0, 4, 1, 3, 2)), [BN, BM])


@triton.jit
def plain_product(
    p_q,  # [BN, BC] pointers
    p_k,  # [BC, BM] pointers
    m_q,
    m_k,
    C: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """The product [BN, BM] over C channels; zero where a mask is."""
    b_product = tl.zeros([BN, BM], tl.float32)
    for first_c in range(0, C, BC):
        m_q2 = m_q[:, None]
        m_k2 = m_k[None, :]
        if C % BC != 0:
            m_c = first_c + tl.arange(0, BC) < C
            m_q2 = m_q2 & m_c[None, :]
            m_k2 = m_k2 & m_c[:, None]
        b_q = tl.load(p_q + first_c, mask=m_q2, other=0.0)  # [BN, BC]
        b_k = tl.load(p_k + first_c, mask=m_k2, other=0.0)  # [BC, BM]
        if WIDEN:
            b_q, b_k = b_q.to(tl.float32), b_k.to(tl.float32)
        # [BN, BC] @ [BC, BM] -> [BN, BM]
        b_product = tl.dot(b_q, b_k, b_product, input_precision="ieee")
    return b_product


@triton.jit
def pick(b_band, o_r, r):
    """Row r of a tile of BAND rows."""
    return tl.max(tl.where(o_r == r, b_band, float("-inf")), 0)


@triton.jit
def nine_tap_kernel(
    theta,  # (B, Hq * Wq, C)
    phi,  # (B, Hk * Wk, C)
    values,  # (B, Hk * Wk, VP), V padded to VP, a multiple of 8
    mu,  # (B, Hq * Wq) float32, as are a, nu, b
    a,
    nu,
    b,
    # each of the results that is not None is written, lse or probability being one; those of the match in one split
    out,  # (splits, B, V, Hq * Wq) float32
    lse,  # (splits, B, Hq * Wq) float32, natural logarithm of the softmax denominator
    index,  # (B, Hq * Wq) int64, the key of largest probability, the first of equals
    probability,  # (B, Hq * Wq) float32 of that key
    height_q,
    width_q,
    height_k,
    width_k,
    scale,  # log2(e) / temperature
    C: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    PATCH: tl.constexpr,
    BAND: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BV: tl.constexpr,
):
    """BN lanes of at most BAND queries each against the walks of one split; programs (tiles of lanes, B, splits)."""
    tl.static_assert(PATCH == 3)
    i_b = tl.program_id(1).to(tl.int64)
    i_out = tl.program_id(2) * tl.num_programs(1).to(tl.int64) + i_b
    N, M = height_q * width_q, height_k * width_k
    skip = SKIP_BITS + tl.log2(tl.cast(M, tl.float32))
    bands = tl.cdiv(height_q, BAND)
    depth = tl.cdiv(height_q, bands)
    o_v = tl.arange(0, BV)
    # a lane's column, the first row of its band, and that position
    o_lane = tl.arange(0, BN)
    o_u = tl.program_id(0) * (BN - 2) - 1 + o_lane
    o_xq = o_u % width_q
    o_top = o_u // width_q * depth
    o_n = o_top * width_q + o_xq
    m_q = (o_u >= 0) & (o_top < height_q)
    m_own = m_q & (o_lane > 0) & (o_lane < BN - 1)
    m_left, m_right = o_xq > 0, o_xq < width_q - 1
    # offsets are summed in 32 bits before they meet a pointer: vectors of pointers would not fit the registers
    o_q = o_n[:, None] * C + tl.arange(0, BC)[None, :]
    o_out = o_v[None, :] * N + o_n[:, None]
    o_r = tl.arange(0, BAND)[:, None]
    # lanes without a query never hinder a skip
    b_max = tl.where(m_own[None, :] & (o_top[None, :] + o_r < height_q), EMPTY, -EMPTY)  # [BAND, BN]
    # what a skip leaves alone waits in memory, where the result will be: the denominator, the output or the match
    p_sum = lse + i_out * N if probability is None else probability + i_b * N
    for r in range(depth):
        m_n = m_own & (o_top + r < height_q)
        o_row = o_n + r * width_q
        tl.store(p_sum + o_row, tl.zeros([BN], tl.float32), mask=m_n)
        if index is not None:
            tl.store(index + i_b * N + o_row, tl.zeros([BN], tl.int64), mask=m_n)
        if out is not None:
            for first_v in range(0, V, BV):
                p_out = out + (i_out * V + first_v) * N + (o_out + r * width_q)
                m_out = m_n[:, None] & (first_v + o_v < V)[None, :]
                tl.store(p_out, tl.zeros([BN, BV], tl.float32), mask=m_out)
    tl.debug_barrier()
    segments, rows, period, stride, tiles = key_lanes(height_k, width_k, BM)
    halo = (BM - stride) // 2
    diagonals = rows + depth - 1
    share = tl.cdiv(tiles * diagonals, tl.num_programs(2))
    first = tl.program_id(2) * share
    for walk in range(first, tl.minimum(first + share, tiles * diagonals)):
        o_lane_k = tl.arange(0, BM)
        o_w = walk // diagonals * stride - halo + o_lane_k
        o_xk = o_w % period
        o_top_k = o_w // period * rows
        o_m = o_top_k * width_k + o_xk
        m_k = (o_w >= 0) & (o_w < segments * period) & (o_xk < width_k)
        m_own_k = m_k & (o_lane_k >= halo) & (o_lane_k < BM - halo)
        o_k = o_m[None, :] * C + tl.arange(0, BC)[:, None]
        # the key row, in its segment, that meets the band's first row
        shift = walk % diagonals - (depth - 1)
        start, end = tl.maximum(0, -shift), tl.minimum(depth, rows - shift)
        b_two = tl.zeros([BN, BM], tl.float32)  # A(r - 2, s - 2) + A(r - 1, s - 1)
        b_one = tl.zeros([BN, BM], tl.float32)  # A(r - 1, s - 1)
        for r in range(start - 1, end + 1):
            s = shift + r
            m_r = m_q & (o_top + r >= 0) & (o_top + r < height_q)
            m_s = m_k & (o_top_k + s >= 0) & (o_top_k + s < height_k)
            p_q = theta + i_b * N * C + (o_q + r * width_q * C)
            p_k = phi + i_b * M * C + (o_k + s * width_k * C)
            b_tile = plain_product(p_q, p_k, m_r, m_s, C, BN, BM, BC)
            if r > start:
                # the scores of the row above are complete
                i_r = r - 1
                o_row, o_key = o_n + i_r * width_q, o_m + (s - 1) * width_k
                m_n = m_own & (o_top + i_r < height_q)
                m_m = m_own_k & (o_top_k + s <= height_k)
                b_mu = tl.load(mu + i_b * N + o_row, mask=m_n, other=0.0) * (9 * C)
                b_a = tl.load(a + i_b * N + o_row, mask=m_n, other=0.0) * scale
                b_nu = tl.load(nu + i_b * M + o_key, mask=m_m, other=0.0)
                b_b = tl.load(b + i_b * M + o_key, mask=m_m, other=0.0)
                b_s = diagonal_taps(b_two + b_tile, m_right, m_left, BN, BM)
                b_s = (b_s - b_mu[:, None] * b_nu[None, :]) * (b_a[:, None] * b_b[None, :])
                b_s = tl.where(m_m[None, :], b_s, float("-inf"))
                b_old = pick(b_max, o_r, i_r)
                b_tile_max = tl.max(b_s, 1)
                # asked this way round, no tile of NaN is skipped
                if (tl.max(b_tile_max - b_old) <= -skip) == 0:
                    b_new = tl.maximum(b_old, b_tile_max)
                    b_decay = tl.exp2(b_old - b_new)
                    b_p = tl.exp2(b_s - b_new[:, None])
                    b_max = tl.where(o_r == i_r, b_new[None, :], b_max)
                    b_sum = tl.load(p_sum + o_row, mask=m_n, other=0.0)
                    b_total = b_sum * b_decay + tl.sum(b_p, 1)
                    if index is not None:
                        # the walks do not meet the keys in order
                        b_best = tl.min(tl.where(b_s == b_tile_max[:, None], o_key[None, :], M), 1)
                        b_index = tl.load(index + i_b * N + o_row, mask=m_n, other=0)
                        m_index = (b_tile_max > b_old) | ((b_tile_max == b_old) & (b_best < b_index))
                    if out is not None:
                        b_p = b_p.to(values.dtype.element_ty)
                        for first_v in range(0, V, BV):
                            p_v = values + i_b * M * VP + (o_key[:, None] * VP + first_v + o_v[None, :])
                            m_v = m_m[:, None] & (first_v + o_v < VP)[None, :]
                            b_v = tl.load(p_v, mask=m_v, other=0.0)  # [BM, BV]
                            if WIDEN:
                                b_p, b_v = b_p.to(tl.float32), b_v.to(tl.float32)
                            p_out = out + (i_out * V + first_v) * N + (o_out + i_r * width_q)
                            m_out = m_n[:, None] & (first_v + o_v < V)[None, :]
                            b_out = tl.load(p_out, mask=m_out, other=0.0) * b_decay[:, None]
                            b_out += tl.dot(b_p, b_v, input_precision="ieee")  # [BN, BM] @ [BM, BV]
                            tl.store(p_out, b_out, mask=m_out)
                    # a value that several threads hold was loaded by each of them
                    tl.debug_barrier()
                    if index is not None:
                        tl.store(index + i_b * N + o_row, b_best.to(tl.int64), mask=m_n & m_index)
                    tl.store(p_sum + o_row, b_total, mask=m_n)
            b_two = b_one + b_tile
            b_one = b_tile
    tl.debug_barrier()
    for r in range(depth):
        m_n = m_own & (o_top + r < height_q)
        o_row = o_n + r * width_q
        b_sum = tl.load(p_sum + o_row, mask=m_n, other=1.0)
        if out is not None:
            # a split's last walk may meet no key of a query: its lse is -inf, and its output stays 0
            b_total = tl.where(b_sum > 0.0, b_sum, 1.0)
            for first_v in range(0, V, BV):
                p_out = out + (i_out * V + first_v) * N + (o_out + r * width_q)
                m_out = m_n[:, None] & (first_v + o_v < V)[None, :]
                tl.store(p_out, tl.load(p_out, mask=m_out, other=0.0) / b_total[:, None], mask=m_out)
        b_last = (pick(b_max, o_r, r) + tl.log2(b_sum)) * LN_2 if probability is None else 1.0 / b_sum
        tl.debug_barrier()
        tl.store(p_sum + o_row, b_last, mask=m_n)


@triton.jit
def merge_kernel(
    parts,  # (splits, B, V, N) float32
    part_lse,  # (splits, B, N) float32
    out,  # (B, V, N)
    lse,  # (B, N) float32
    positions,  # N
    splits,
    V: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
):
    """The warp over all keys from those over the splits: their mean, weighted by the softmax of their lse."""
    i_b, batch = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_v = tl.program_id(2) * BV + tl.arange(0, BV)
    m_n = o_n < positions
    m_out = (o_v < V)[:, None] & m_n[None, :]
    b_max = tl.full([BN], EMPTY, tl.float32)
    for split in range(splits):
        b_max = tl.maximum(b_max, tl.load(part_lse + (split * batch + i_b) * positions + o_n, mask=m_n, other=0.0))
    b_sum = tl.zeros([BN], tl.float32)
    b_out = tl.zeros([BV, BN], tl.float32)
    for split in range(splits):
        i_part = split * batch + i_b
        b_weight = tl.exp(tl.load(part_lse + i_part * positions + o_n, mask=m_n, other=0.0) - b_max)
        p_part = parts + (i_part * V + o_v[:, None]) * positions + o_n[None, :]
        b_sum += b_weight
        b_out += b_weight[None, :] * tl.load(p_part, mask=m_out, other=0.0)
    p_out = out + (i_b * V + o_v[:, None]) * positions + o_n[None, :]
    tl.store(p_out, (b_out / b_sum[None, :]).to(out.dtype.element_ty), mask=m_out)
    # each program of these positions writes the same
    tl.store(lse + i_b * positions + o_n, b_max + tl.log(b_sum), mask=m_n)


def key_tiles(height: int, width: int, lanes: int) -> tuple[int, int]:
    """Tiles of key lanes and rows of a segment, as `key_lanes` has them."""
    segments = -(-height // SEGMENT.value)
    rows = -(-height // segments)
    whole = 7 * lanes <= 8 * width <= 8 * lanes
    return (segments if whole else -(-segments * (width + 1) // (lanes - 2))), rows


def walks(height_q: int, height_k: int, width_k: int, band: int, lanes: int) -> int:
    """Walks of a tile of queries: what can be split over programs."""
    tiles, rows = key_tiles(height_k, width_k, lanes)
    bands = -(-height_q // band)
    return tiles * (rows + -(-height_q // bands) - 1)
