"""The Triton kernels: pack a map, patch statistics, forward (warp and match), and the two steps of the backward.

Why these: the patch correlation is a dot product over D = PATCH * PATCH * C channels, and no unfolded tensor is formed.
Each step of the channel loop is one shift of the patch and one block of channels, loaded straight from the packed map
`(B, H * W, C)` at a shifted offset, zero outside the map. Mathematics: `flashcocos.kernels.reference`, and for the
backward `flashcocos.kernels.gpu.triton_warp`.

Names are those of `flashcocos.kernels`. Logits, statistics and sums are float32 whatever the input; the softmax works
in base 2, with log2(e) folded into the scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

EPSILON = tl.constexpr(2.2e-16)  # added to each norm, as the published networks do
FLAT = tl.constexpr(1e-10)  # variance over squared mean below which a patch is constant to float32 rounding
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def pack_kernel(
    source,  # (B, channels, H, W), any strides
    target,  # (B, H * W, padded), contiguous
    width,
    positions,  # H * W
    channels,
    padded,  # at least `channels`; zeros are written beyond
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """Channels last, converted to the dtype of `target`."""
    i_b = tl.program_id(2).to(tl.int64)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_c = (tl.program_id(1) * BC + tl.arange(0, BC)).to(tl.int64)
    m_n = o_n < positions
    o_pixel = (o_n // width).to(tl.int64) * stride_y + (o_n % width).to(tl.int64) * stride_x
    p_source = source + i_b * stride_b + o_c[:, None] * stride_c + o_pixel[None, :]
    b_pixels = tl.load(p_source, mask=(o_c < channels)[:, None] & m_n[None, :], other=0.0)  # [BC, BN]
    p_target = target + (i_b * positions + o_n[:, None]) * padded + o_c[None, :]
    tl.store(p_target, tl.trans(b_pixels).to(target.dtype.element_ty), mask=m_n[:, None] & (o_c < padded)[None, :])


# the interpreter keeps bfloat16 as 16-bit integers and multiplies those; the values are exact in float32
WIDEN = tl.constexpr(not isinstance(pack_kernel, triton.JITFunction))


@triton.jit
def shifted_mask(o_y, o_x, height, width, shift, PATCH: tl.constexpr):
    """Offset in pixels of a patch's shift, and which positions it leaves inside the map."""
    dy = shift // PATCH - PATCH // 2
    dx = shift % PATCH - PATCH // 2
    m_inside = (o_y + dy >= 0) & (o_y + dy < height) & (o_x + dx >= 0) & (o_x + dx < width)
    return dy * width + dx, m_inside


@triton.jit
def statistics_kernel(
    packed,  # (B, H * W, C)
    mean,  # (B, H * W) float32
    inverse,  # (B, H * W) float32: 1 / (norm of the centered patch + EPSILON), 0 for a constant patch
    height,
    width,
    C: tl.constexpr,
    PATCH: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """Mean and inverse norm of each patch, in two passes: no difference of large sums, whatever the dtype."""
    i_b = tl.program_id(1).to(tl.int64)
    positions = height * width
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_y = o_n // width
    o_x = o_n % width
    blocks: tl.constexpr = (C + BC - 1) // BC
    dimension: tl.constexpr = PATCH * PATCH * C
    p_pixel = packed + (i_b * positions + o_n[:, None]) * C + tl.arange(0, BC)[None, :]
    b_total = tl.zeros([BN, BC], tl.float32)
    for step in range(PATCH * PATCH * blocks):
        offset, m_inside = shifted_mask(o_y, o_x, height, width, step // blocks, PATCH)
        first_c = step % blocks * BC
        m_c = first_c + tl.arange(0, BC) < C
        b_total += tl.load(p_pixel + (offset * C + first_c), mask=m_inside[:, None] & m_c[None, :], other=0.0)
    b_mu = tl.sum(b_total, 1) / dimension
    b_square = tl.zeros([BN, BC], tl.float32)
    for step in range(PATCH * PATCH * blocks):
        offset, m_inside = shifted_mask(o_y, o_x, height, width, step // blocks, PATCH)
        first_c = step % blocks * BC
        m_c = first_c + tl.arange(0, BC) < C
        b_x = tl.load(p_pixel + (offset * C + first_c), mask=m_inside[:, None] & m_c[None, :], other=0.0)
        # the padding's zeros are part of the patch, the channels past C are not
        b_centered = tl.where(m_c[None, :], b_x.to(tl.float32) - b_mu[:, None], 0.0)
        b_square += b_centered * b_centered
    b_square_norm = tl.sum(b_square, 1)
    m_flat = b_square_norm <= FLAT * dimension * b_mu * b_mu
    b_a = tl.where(m_flat, 0.0, 1.0 / (tl.sqrt(b_square_norm) + EPSILON))
    tl.store(mean + i_b * positions + o_n, b_mu, mask=o_n < positions)
    tl.store(inverse + i_b * positions + o_n, b_a, mask=o_n < positions)


@triton.jit
def correlate(
    theta,
    phi,
    o_n,
    o_m,
    height_q,
    width_q,
    height_k,
    width_k,
    C: tl.constexpr,
    PATCH: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Patch dot products [BN, BM] of the queries `o_n` and keys `o_m`, before centering; finite outside the maps."""
    o_yq = o_n // width_q
    o_xq = o_n % width_q
    o_yk = o_m // width_k
    o_xk = o_m % width_k
    blocks: tl.constexpr = (C + BC - 1) // BC
    p_q = theta + o_n.to(tl.int64)[:, None] * C + tl.arange(0, BC)[None, :]
    p_k = phi + o_m.to(tl.int64)[None, :] * C + tl.arange(0, BC)[:, None]
    b_dot = tl.zeros([BN, BM], tl.float32)
    for step in range(PATCH * PATCH * blocks):
        offset_q, m_q = shifted_mask(o_yq, o_xq, height_q, width_q, step // blocks, PATCH)
        offset_k, m_k = shifted_mask(o_yk, o_xk, height_k, width_k, step // blocks, PATCH)
        first_c = step % blocks * BC
        m_q2 = m_q[:, None]
        m_k2 = m_k[None, :]
        if C % BC != 0:
            m_c = first_c + tl.arange(0, BC) < C
            m_q2 = m_q2 & m_c[None, :]
            m_k2 = m_k2 & m_c[:, None]
        b_q = tl.load(p_q + (offset_q * C + first_c), mask=m_q2, other=0.0)  # [BN, BC]
        b_k = tl.load(p_k + (offset_k * C + first_c), mask=m_k2, other=0.0)  # [BC, BM]
        if WIDEN:
            b_q, b_k = b_q.to(tl.float32), b_k.to(tl.float32)
        # [BN, BC] @ [BC, BM] -> [BN, BM]
        b_dot = tl.dot(b_q, b_k, b_dot, input_precision="ieee")
    return b_dot


@triton.jit
def forward_kernel(
    theta,  # (B, Hq * Wq, C)
    phi,  # (B, Hk * Wk, C)
    values,  # (B, Hk * Wk, VP), V padded to VP, a multiple of 8, so that every row can be loaded 16 bytes at a time
    mu,  # (B, Hq * Wq) float32, as are a, nu, b
    a,
    nu,
    b,
    # each of the results that is not None is written; out needs values, probability needs index
    out,  # (B, V, Hq * Wq), dtype of values
    lse,  # (B, Hq * Wq) float32, natural logarithm of the softmax denominator
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
    BN: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BV: tl.constexpr,
):
    """One tile of queries against all keys: online softmax, the values that it weights, and the best match."""
    i_b = tl.program_id(1).to(tl.int64)
    N, M = height_q * width_q, height_k * width_k
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_v = tl.arange(0, BV)
    m_n = o_n < N
    b_mu = tl.load(mu + i_b * N + o_n, mask=m_n, other=0.0) * (PATCH * PATCH * C)
    b_a = tl.load(a + i_b * N + o_n, mask=m_n, other=0.0) * scale
    # finite, so that the first difference is no inf - inf; every tile holds a key, so it is replaced at once
    b_max = tl.full([BN], -1e30, tl.float32)
    b_sum = tl.zeros([BN], tl.float32)
    b_out = tl.zeros([BN, BV], tl.float32)
    b_index = tl.zeros([BN], tl.int32)
    for start in range(0, M, BM):
        o_m = start + tl.arange(0, BM)
        m_m = o_m < M
        b_s = correlate(
            theta + i_b * N * C, phi + i_b * M * C, o_n, o_m, height_q, width_q, height_k, width_k, C, PATCH, BN, BM, BC
        )  # [BN, BM]
        b_nu = tl.load(nu + i_b * M + o_m, mask=m_m, other=0.0)
        b_b = tl.load(b + i_b * M + o_m, mask=m_m, other=0.0)
        b_s = (b_s - b_mu[:, None] * b_nu[None, :]) * (b_a[:, None] * b_b[None, :])
        b_s = tl.where(m_m[None, :], b_s, float("-inf"))
        if index is None:
            b_tile_max = tl.max(b_s, 1)
        else:
            b_tile_max, b_tile_index = tl.max(b_s, 1, return_indices=True)
            b_index = tl.where(b_tile_max > b_max, start + b_tile_index, b_index)
        b_new = tl.maximum(b_max, b_tile_max)
        b_decay = tl.exp2(b_max - b_new)
        b_p = tl.exp2(b_s - b_new[:, None])
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_max = b_new
        if out is not None:
            p_v = values + (i_b * M + o_m[:, None]) * VP + o_v[None, :]
            b_v = tl.load(p_v, mask=m_m[:, None] & (o_v[None, :] < VP), other=0.0)  # [BM, BV]
            b_p = b_p.to(b_v.dtype)
            if WIDEN:
                b_p, b_v = b_p.to(tl.float32), b_v.to(tl.float32)
            b_out = tl.dot(b_p, b_v, b_out * b_decay[:, None], input_precision="ieee")  # [BN, BM] @ [BM, BV]
    if index is not None:
        tl.store(index + i_b * N + o_n, b_index.to(tl.int64), mask=m_n)
        tl.store(probability + i_b * N + o_n, 1.0 / b_sum, mask=m_n)
    if out is not None:
        p_out = out + (i_b * V + o_v[None, :]) * N + o_n[:, None]
        tl.store(p_out, (b_out / b_sum[:, None]).to(out.dtype.element_ty), mask=m_n[:, None] & (o_v[None, :] < V))
    if lse is not None:
        tl.store(lse + i_b * N + o_n, (b_max + tl.log2(b_sum)) * LN_2, mask=m_n)


@triton.jit
def score_gradient_kernel(
    theta,  # (Hq * Wq, C): one batch element from here on
    phi,  # (Hk * Wk, C)
    values,  # (V, Hk * Wk)
    grad_out,  # (V, Hq * Wq), dtype of values
    mu,
    a,
    nu,
    b,
    lse,
    delta,  # (Hq * Wq) float32: sum over V of out * grad_out
    gradient,  # (count_q, count_k) float32: d loss / d (patch dot product)
    weight,  # (count_q, count_k) float32: the softmax, written if STORE_WEIGHT
    row_sums,  # (2, key tiles, count_q) float32: sums over the tile's keys of gradient * nu and of d logit * logit
    column_sums,  # (2, query tiles, count_k) float32: the same over its queries, with mu
    first_q,  # the chunk: queries first_q .. first_q + count_q, keys likewise
    count_q,
    first_k,
    count_k,
    height_q,
    width_q,
    height_k,
    width_k,
    scale,
    inverse_temperature,
    C: tl.constexpr,
    V: tl.constexpr,
    PATCH: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BV: tl.constexpr,
    STORE_WEIGHT: tl.constexpr,
):
    """One tile of one chunk: recompute its scores, differentiate the softmax, store the gradient and its sums."""
    o_i = tl.program_id(0) * BN + tl.arange(0, BN)
    o_j = tl.program_id(1) * BM + tl.arange(0, BM)
    m_i = o_i < count_q
    m_j = o_j < count_k
    o_n = first_q + o_i
    o_m = first_k + o_j
    N = height_q * width_q
    M = height_k * width_k
    dimension: tl.constexpr = PATCH * PATCH * C
    b_s = correlate(theta, phi, o_n, o_m, height_q, width_q, height_k, width_k, C, PATCH, BN, BM, BC)  # [BN, BM]
    b_mu = tl.load(mu + o_n, mask=m_i, other=0.0)
    b_nu = tl.load(nu + o_m, mask=m_j, other=0.0)
    b_a = tl.load(a + o_n, mask=m_i, other=0.0)
    b_b = tl.load(b + o_m, mask=m_j, other=0.0)
    # the same order of operations as in the forward, so that exp2 meets the lse it was summed with
    b_s = b_s - (b_mu * dimension)[:, None] * b_nu[None, :]
    b_s = b_s * ((b_a * scale)[:, None] * b_b[None, :])
    b_lse = tl.load(lse + o_n, mask=m_i, other=0.0) * LOG2_E
    m_tile = m_i[:, None] & m_j[None, :]
    b_p = tl.where(m_tile, tl.exp2(b_s - b_lse[:, None]), 0.0)
    b_dp = tl.zeros([BN, BM], tl.float32)
    for first_v in range(0, V, BV):
        o_v = first_v + tl.arange(0, BV)
        p_do = grad_out + o_v.to(tl.int64)[None, :] * N + o_n[:, None]
        p_v = values + o_v.to(tl.int64)[:, None] * M + o_m[None, :]
        b_do = tl.load(p_do, mask=m_i[:, None] & (o_v[None, :] < V), other=0.0)  # [BN, BV]
        b_v = tl.load(p_v, mask=(o_v[:, None] < V) & m_j[None, :], other=0.0)  # [BV, BM]
        if WIDEN:
            b_do, b_v = b_do.to(tl.float32), b_v.to(tl.float32)
        # [BN, BV] @ [BV, BM] -> [BN, BM]
        b_dp = tl.dot(b_do, b_v, b_dp, input_precision="ieee")
    b_delta = tl.load(delta + o_n, mask=m_i, other=0.0)
    b_dz = b_p * (b_dp - b_delta[:, None])
    b_g = b_dz * ((b_a * inverse_temperature)[:, None] * b_b[None, :])
    o_tile = o_i[:, None] * count_k + o_j[None, :]
    tl.store(gradient + o_tile, b_g, mask=m_tile)
    if STORE_WEIGHT:
        tl.store(weight + o_tile, b_p, mask=m_tile)
    b_dz_z = b_dz * b_s * LN_2
    p_row = row_sums + tl.program_id(1) * count_q + o_i
    tl.store(p_row, tl.sum(b_g * b_nu[None, :], 1), mask=m_i)
    tl.store(p_row + tl.num_programs(1) * count_q, tl.sum(b_dz_z, 1), mask=m_i)
    p_column = column_sums + tl.program_id(0) * count_k + o_j
    tl.store(p_column, tl.sum(b_g * b_mu[:, None], 0), mask=m_j)
    tl.store(p_column + tl.num_programs(0) * count_k, tl.sum(b_dz_z, 0), mask=m_j)


@triton.jit
def fold_kernel(
    chunk,  # the chunk's matrix, element (i, j) at i * stride_i + j * stride_j
    source,  # element (y, c) at y * source_n + c * source_c
    target,  # float32, element (x, c) at x * target_n + c * target_c
    first_i,  # the chunk: rows first_i .. first_i + count_i of the target's map, columns likewise of the source's map
    count_i,
    first_j,
    count_j,
    stride_i,
    stride_j,
    source_n,
    source_c,
    target_n,
    target_c,
    first_x,  # the target positions that the chunk reaches
    end_x,
    first_y,  # the source positions that it reaches
    end_y,
    height_x,
    width_x,
    height_y,
    width_y,
    C: tl.constexpr,
    PATCH: tl.constexpr,
    BX: tl.constexpr,
    BY: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """target[x] += sum over y of (sum over patch offsets k of chunk[x - k, y - k]) source[y].

    The transposed patch correlation: the diagonal sum comes first, so the product has C channels, not D.
    Each program owns its part of `target`: no atomics, the same bits on every run.
    """
    o_x = first_x + tl.program_id(0) * BX + tl.arange(0, BX)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_x = o_x < end_x
    m_c = o_c < C
    o_yx = o_x // width_x
    o_xx = o_x % width_x
    b_sum = tl.zeros([BX, BC], tl.float32)
    for start in range(first_y, end_y, BY):
        o_y = start + tl.arange(0, BY)
        o_yy = o_y // width_y
        o_xy = o_y % width_y
        b_h = tl.zeros([BX, BY], tl.float32)
        for shift in range(PATCH * PATCH):
            offset_x, m_i = shifted_mask(o_yx, o_xx, height_x, width_x, shift, PATCH)
            offset_y, m_j = shifted_mask(o_yy, o_xy, height_y, width_y, shift, PATCH)
            # the window is symmetric, so walking +k visits the same pairs as -k
            o_i = o_x + offset_x - first_i
            o_j = o_y + offset_y - first_j
            m_i = m_i & (o_i >= 0) & (o_i < count_i)
            m_j = m_j & (o_j >= 0) & (o_j < count_j)
            p_chunk = chunk + o_i[:, None] * stride_i + o_j[None, :] * stride_j
            b_h += tl.load(p_chunk, mask=m_i[:, None] & m_j[None, :], other=0.0)
        p_source = source + o_y.to(tl.int64)[:, None] * source_n + o_c.to(tl.int64)[None, :] * source_c
        b_source = tl.load(p_source, mask=(o_y < end_y)[:, None] & m_c[None, :], other=0.0)  # [BY, BC]
        # [BX, BY] @ [BY, BC] -> [BX, BC]
        b_sum = tl.dot(b_h, b_source.to(tl.float32), b_sum, input_precision=PRECISION)
    p_target = target + o_x.to(tl.int64)[:, None] * target_n + o_c.to(tl.int64)[None, :] * target_c
    m_target = m_x[:, None] & m_c[None, :]
    tl.store(p_target, tl.load(p_target, mask=m_target, other=0.0) + b_sum, mask=m_target)
