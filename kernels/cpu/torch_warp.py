"""The warp on CPU tensors, forward and recomputing backward, in tiles that stay in the cache.

The same mathematics and the same padded flat layout as `numpy_warp` (read its docstring first). The backward forms
each tile of weights again from the saved log-sum-exp (Dao et al., arXiv 2205.14135, section 3.1) and sends its
gradient through the adjoint of the diagonal taps, so that its matrix products too are p * p times smaller than on
unfolded features. The terms through norms and means are O(N) vectors:
  logits_ij = (taps_ij - D mu_i nu_j) a_i b_j / temperature,   a = 1 / |centered theta patch|,
  d mu_i = -D sum_j d_taps_ij nu_j,   d a_i = sum_j d_logits_ij logits_ij / a_i,   d |theta|^2_i = -a_i^3 d a_i / 2.
Float32 and float64 are computed as they are, 16-bit inputs in float32; statistics always in float64.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .tiling import fit_tiles

BUDGET = 24 << 20  # bytes of the tile buffers
LOWEST = -1e30  # stands for minus infinity: its weight is 0 too, and 0 times it is 0, not nan


def warp_forward(
    theta: torch.Tensor, phi: torch.Tensor, values: torch.Tensor, patch: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The warp (B, V, Hq, Wq) in the dtype of the values and the lse (B, Hq, Wq), no autograd.

    lse is float32, and float64 for float64 inputs, or their gradients would be no better than float32 ones.

    Memory beside inputs and results: padded copies of one batch item, and at most `BUDGET` bytes of tiles.
    """
    batch, channels, grid = theta.shape[0], values.shape[1], theta.shape[2:]
    out = values.new_empty((batch, channels, *grid))
    lse = theta.new_empty((batch, *grid), dtype=torch.promote_types(theta.dtype, torch.float32))
    dtype = _widest(theta, values)
    tiler = _Tiler(theta.shape[2:], phi.shape[2:], patch, dtype, buffers=2)
    for i in range(batch):
        queries, keys = _Side(theta[i].to(dtype), patch, 1.0 / temperature), _Side(phi[i].to(dtype), patch, 1.0)
        carried = _gapped(values[i].to(dtype), patch)
        for rows in tiler.query_rows:
            n = queries.span(rows)[1]
            maximum = keys.flat.new_full((n,), LOWEST)
            total, acc = keys.flat.new_zeros(n), keys.flat.new_zeros(channels, n)
            for key_rows in tiler.key_rows:
                o_m, m = keys.span(key_rows)
                logits = tiler.logits(queries, keys, rows, key_rows)
                raised = torch.maximum(maximum, logits.amax(dim=1))
                weights = logits.sub_(raised[:, None]).exp_()
                decay = maximum.sub_(raised).exp_()
                total.mul_(decay).add_(weights.sum(dim=1))
                acc.mul_(decay).addmm_(carried[:, o_m : o_m + m], weights.T)  # (V, m) @ (m, n)
                maximum = raised
            out[i, :, rows[0] : rows[1]] = queries.dense(acc / total)
            lse[i, rows[0] : rows[1]] = queries.dense(maximum + total.log())
    return out, lse


def warp_backward(
    theta: torch.Tensor,
    phi: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    patch: int,
    temperature: float,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of theta, phi and values, each in its dtype, from that of `out`; None where `needs` says so.

    Memory beside inputs and results: padded copies of one batch item's inputs and gradients (2 times the item's theta
    and phi), and at most `BUDGET` bytes of tiles.
    """
    grads = [torch.empty_like(x) if need else None for x, need in zip((theta, phi, values), needs, strict=True)]
    d_theta, d_phi, d_values = grads
    dtype = _widest(theta, values)
    tiler = _Tiler(theta.shape[2:], phi.shape[2:], patch, dtype, buffers=3)
    for i in range(theta.shape[0]):
        queries = _Side(theta[i].to(dtype), patch, 1.0 / temperature, with_gradient=needs[0])
        keys = _Side(phi[i].to(dtype), patch, 1.0, with_gradient=needs[1])
        carried, carried_grad = _gapped(values[i].to(dtype), patch), _gapped(grad_out[i].to(dtype), patch)
        delta = (carried_grad * _gapped(out[i].to(dtype), patch)).sum(dim=0)
        # a gap's weights are exp(logits - inf) = 0
        pivot = F.pad(lse[i].to(delta.dtype), (0, patch - 1), value=torch.inf).flatten()
        d_carried = torch.zeros_like(carried)
        for rows in tiler.query_rows:
            o_n, n = queries.span(rows)
            strip = slice(o_n, o_n + n)
            for key_rows in tiler.key_rows:
                o_m, m = keys.span(key_rows)
                columns = slice(o_m, o_m + m)
                logits = tiler.logits(queries, keys, rows, key_rows)
                weights = torch.sub(logits, pivot[strip, None], out=tiler.buffer(1, n, m)).exp_()
                if needs[2]:
                    d_carried[:, columns].addmm_(carried_grad[:, strip], weights)  # (V, n) @ (n, m)
                if needs[0] or needs[1]:
                    d_logits = torch.mm(carried_grad[:, strip].T, carried[:, columns], out=tiler.buffer(2, n, m))
                    d_logits.sub_(delta[strip, None]).mul_(weights)
                    tiler.logits_backward(queries, keys, rows, key_rows, logits, d_logits)
        if d_values is not None:
            d_values[i] = keys.dense(d_carried)
        if d_theta is not None:
            d_theta[i] = queries.feature_gradient()
        if d_phi is not None:
            d_phi[i] = keys.feature_gradient()
    return d_theta, d_phi, d_values


def _widest(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float64 if any input is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _gapped(maps: torch.Tensor, patch: int) -> torch.Tensor:
    """(X, H, W) -> (X, H * (W + patch - 1)), with a zero gap after each row."""
    return F.pad(maps, (0, patch - 1)).flatten(1)


def _box(plane: torch.Tensor, patch: int) -> torch.Tensor:
    """Sum over the patch around each position of (H, W), zeros outside; it is its own adjoint."""
    return F.avg_pool2d(plane[None], patch, 1, patch // 2, divisor_override=1)[0]


class _Side:
    """One map in the padded flat layout, with its statistics, and its gradients once there are any."""

    def __init__(self, features: torch.Tensor, patch: int, scale: float, with_gradient: bool = False) -> None:
        half = patch // 2
        self.patch = patch
        self.channels, self.height, self.width = features.shape
        self.stride = self.width + 2 * half
        self.flat = F.pad(features, (half, half, half, half)).flatten(1)  # (C, flat)
        self.length = patch * patch * self.channels
        sums, squares = (features.new_zeros(features.shape[1:], dtype=torch.float64) for _ in range(2))
        for part in torch.split(features, 16):  # sums in float64 copy their input to float64
            sums += part.sum(dim=0, dtype=torch.float64)
            squares += part.double().square().sum(dim=0)
        total, squares = _box(sums, patch), _box(squares, patch)
        self.mean64 = total / self.length
        centered = squares - total * self.mean64
        # a constant patch, whose centered norm is rounding alone, correlates with nothing
        self.proper = centered > 1e-12 * squares
        self.norm64 = centered.where(self.proper, torch.ones_like(centered)).sqrt()
        reciprocal = self.proper / (self.norm64 + sys.float_info.epsilon)
        self.reciprocal = _gapped((reciprocal * scale).to(features.dtype)[None], patch)[0]
        self.mean = _gapped(self.mean64.to(features.dtype)[None], patch)[0]
        self.d_flat = torch.zeros_like(self.flat) if with_gradient else None
        self.d_mean = torch.zeros_like(self.mean)  # sum over the other side of d_taps * its mean
        self.d_scale = torch.zeros_like(self.mean)  # sum over the other side of d_logits * logits

    def span(self, rows: tuple[int, int]) -> tuple[int, int]:
        """Where the rows begin in a gapped plane, and how many columns they span, without the last row's gap."""
        return rows[0] * self.stride, (rows[1] - rows[0]) * self.stride - (self.patch - 1)

    def padded(self, rows: tuple[int, int], of: torch.Tensor) -> torch.Tensor:
        """The padded flat columns of the rows and their halo."""
        return of[:, rows[0] * self.stride : (rows[1] + self.patch - 1) * self.stride]

    def dense(self, gapped: torch.Tensor) -> torch.Tensor:
        """(..., rows * stride), the last gap present or not -> (..., rows, width)."""
        missing = -gapped.shape[-1] % self.stride
        rows = F.pad(gapped, (0, missing))
        return rows.reshape(*rows.shape[:-1], -1, self.stride)[..., : self.width]

    def feature_gradient(self) -> torch.Tensor:
        """The gradient of the features (C, H, W): through the taps, and through means and norms."""
        half = self.patch // 2
        zero = torch.zeros_like(self.norm64)
        d_mean = -self.length * self.dense(self.d_mean).double().where(self.proper, zero)
        d_squares = -0.5 * self.dense(self.d_scale).double() / self.norm64.square()
        d_squares = d_squares.where(self.proper, zero)
        # the centered square is squares - D mean^2
        d_mean = d_mean - 2 * self.length * self.mean64 * d_squares
        through_mean, through_norm = (
            _box(d, self.patch).to(self.flat.dtype) for d in (d_mean / self.length, 2 * d_squares)
        )

        def inner(flat: torch.Tensor) -> torch.Tensor:
            return flat.reshape(len(flat), -1, self.stride)[:, half : half + self.height, half : half + self.width]

        assert self.d_flat is not None
        return inner(self.d_flat).addcmul_(inner(self.flat), through_norm).add_(through_mean)


class _Tiler:
    """The tiles of one call and their buffers: products to logits, and the gradient of logits back to features."""

    def __init__(
        self, query_map: Sequence[int], key_map: Sequence[int], patch: int, dtype: torch.dtype, *, buffers: int
    ) -> None:
        (hq, wq), (hk, wk) = query_map, key_map
        tiles = fit_tiles((hq, wq), (hk, wk), patch, BUDGET, buffers=buffers, itemsize=dtype.itemsize)
        self.patch, halo = patch, patch - 1
        size = (tiles.query_rows + halo) * (wq + halo) * (tiles.key_rows + halo) * (wk + halo)
        self.buffers = torch.empty((buffers, size), dtype=dtype)
        self.query_rows = [(top, min(top + tiles.query_rows, hq)) for top in range(0, hq, tiles.query_rows)]
        self.key_rows = [(top, min(top + tiles.key_rows, hk)) for top in range(0, hk, tiles.key_rows)]

    def buffer(self, which: int, n: int, m: int) -> torch.Tensor:
        """Buffer `which` as an (n, m) matrix."""
        return self.buffers[which, : n * m].view(n, m)

    def logits(self, queries: _Side, keys: _Side, rows: tuple[int, int], key_rows: tuple[int, int]) -> torch.Tensor:
        """Logits of a tile, (n, m) with the gaps of keys at `LOWEST`, in buffer 0; buffer 1 is overwritten."""
        left, right = queries.padded(rows, queries.flat), keys.padded(key_rows, keys.flat)
        n, m = left.shape[1], right.shape[1]
        taps = torch.mm(left.T, right, out=self.buffer(0, n, m))
        for which, (o_q, o_k) in ((1, (1, 1)), (0, (queries.stride, keys.stride))):
            taps = self._diagonal_sum(taps, o_q, o_k, which)
        (o_n, n), (o_m, m) = queries.span(rows), keys.span(key_rows)
        taps.addr_(queries.mean[o_n : o_n + n], keys.mean[o_m : o_m + m], alpha=-queries.length)
        taps.mul_(keys.reciprocal[o_m : o_m + m]).mul_(queries.reciprocal[o_n : o_n + n, None])
        for gap in range(keys.width, keys.stride):
            taps[:, gap :: keys.stride] = LOWEST
        return taps

    def _diagonal_sum(self, source: torch.Tensor, o_q: int, o_k: int, which: int) -> torch.Tensor:
        """Sum over i < patch of `source` shifted by (i * o_q, i * o_k), into buffer `which`."""
        if self.patch == 1:
            return source
        n, m = source.shape[0] - (self.patch - 1) * o_q, source.shape[1] - (self.patch - 1) * o_k
        total = self.buffer(which, n, m)
        torch.add(source[:n, :m], source[o_q : n + o_q, o_k : m + o_k], out=total)
        for i in range(2, self.patch):
            total += source[i * o_q : n + i * o_q, i * o_k : m + i * o_k]
        return total

    def logits_backward(
        self,
        queries: _Side,
        keys: _Side,
        rows: tuple[int, int],
        key_rows: tuple[int, int],
        logits: torch.Tensor,
        d_logits: torch.Tensor,
    ) -> None:
        """Add a tile's share to the gradients of both sides; `logits` in buffer 0 and `d_logits` in 2 are used up."""
        (o_n, n), (o_m, m) = queries.span(rows), keys.span(key_rows)
        strip, columns = slice(o_n, o_n + n), slice(o_m, o_m + m)
        share = logits.mul_(d_logits)
        queries.d_scale[strip] += share.sum(dim=1)
        keys.d_scale[columns] += share.sum(dim=0)
        d_taps = d_logits.mul_(keys.reciprocal[columns]).mul_(queries.reciprocal[strip, None])
        queries.d_mean[strip].addmv_(d_taps, keys.mean[columns])
        keys.d_mean[columns].addmv_(d_taps.T, queries.mean[strip])
        d_product = d_taps
        for which, (o_q, o_k) in ((0, (queries.stride, keys.stride)), (1, (1, 1))):
            d_product = self._diagonal_spread(d_product, o_q, o_k, which)
        for side, other, own, its, matrix in (
            (queries, keys, rows, key_rows, d_product.T),
            (keys, queries, key_rows, rows, d_product),
        ):
            if side.d_flat is not None:
                side.padded(own, side.d_flat).addmm_(other.padded(its, other.flat), matrix)

    def _diagonal_spread(self, source: torch.Tensor, o_q: int, o_k: int, which: int) -> torch.Tensor:
        """The adjoint of `_diagonal_sum`."""
        if self.patch == 1:
            return source
        n, m = source.shape
        total = self.buffer(which, n + (self.patch - 1) * o_q, m + (self.patch - 1) * o_k).zero_()
        for i in range(self.patch):
            total[i * o_q : n + i * o_q, i * o_k : m + i * o_k] += source
        return total
