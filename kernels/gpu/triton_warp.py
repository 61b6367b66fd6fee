"""The warp in Triton on the host side: what is launched, in which order, and the gradient that is assembled from it.

Forward: pack theta and phi channels last and the values likewise (`pack_kernel`, skipped for a channels-last tensor),
patch statistics (`statistics_kernel`), then by the rule of `configs.nine_tap_blocks` either `nine_tap_kernel`, split
over the keys where the queries do not fill the GPU, with `merge_kernel` after it; or one launch of `forward_kernel`.
`choose_forward` overrides the rule. Memory beside inputs and outputs, at 128 x 128 maps, C = 256, V = 3, float16:
0.25 MiB of statistics, 0.25 MiB of packed values, 0.25 MiB for each split, and 8 MiB for each of theta and phi that
does not come in torch's channels_last memory format.

Precision: theta and phi are multiplied as they come, float16 and bfloat16 on tensor cores (from compute capability 80
on), float32 by FMA (no tf32), and summed in float32; statistics, logits and softmax are float32. Weights meet the
values in the values' dtype, summed in float32; so half maps may carry float32 values, at the cost of FMA there.
Centering is algebraic: a map whose mean is r times its spread loses about r * r float32 roundings.

Backward, with G = d loss / d (patch dot product), the reference's notation, and sums over the patch offsets k:
    d_theta(x) = sum over y of (sum over k of G(x - k, y - k)) phi(y) + theta(x) box(e)(x) - box(e mu + sum_j G nu)(x),
    e = -a^2 sum over j of d_logits logits,
and the same for phi with the roles exchanged. The diagonal sum comes before the product, so nothing is unfolded. G is
formed a chunk at a time (`score_gradient_kernel`) in a scratch buffer, and each chunk is folded into the gradients
(`fold_kernel`) before the next is formed. No atomics: every run gives the same bits. Memory beside inputs and
gradients, in units of theta + phi: 1 if they must be packed, 2 for float32 sums of float16 gradients (0 for float32),
scratch of one half but at least 8 MiB, and a few floats a position: 3.6 at 128 x 128, C = 256, float16.

Tested in Triton's interpreter; the forward compiles for every line of `configs.ARCHITECTURES`.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton

from ...errors import BackendError, InputError
from .. import signatures
from ..signatures import padded_values, query_tiles
from . import configs
from .triton_kernels import fold_kernel, forward_kernel, pack_kernel, score_gradient_kernel, statistics_kernel
from .triton_nine_tap import merge_kernel, nine_tap_kernel, walks

INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
SCRATCH_BYTES = 8 << 20  # least and most scratch of the backward; between, half the bytes of theta + phi
MAX_SCRATCH_BYTES = 64 << 20
FORWARDS = ("auto", "nine_tap", "straightforward")

_choice = contextvars.ContextVar("choice of the forward kernel", default="auto")

Needs = tuple[bool, bool, bool]
# out, lse, index, probability: None for what is not wanted
_Results = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class _Side(NamedTuple):
    """One packed map: pixels (B, H * W, C), mean and inverse norm (B, H * W) of its patches, and its size."""

    pixels: torch.Tensor
    mean: torch.Tensor
    inverse: torch.Tensor
    height: int
    width: int

    @property
    def positions(self) -> int:
        return self.height * self.width


@contextlib.contextmanager
def choose_forward(name: str) -> Iterator[None]:
    """Within it, the forward runs "nine_tap" (or raises `InputError` where it cannot), "straightforward" or "auto"."""
    if name not in FORWARDS:
        raise InputError(f"forward kernel: expected one of {', '.join(FORWARDS)}, got {name!r}")
    token = _choice.set(name)
    try:
        yield
    finally:
        _choice.reset(token)


def require_runnable(theta: torch.Tensor, phi: torch.Tensor, values: torch.Tensor | None = None) -> None:
    """Raise `BackendError` or `InputError` unless the kernels can run on these tensors, on this machine."""
    tensors = [theta, phi] if values is None else [theta, phi, values]
    if theta.shape[:2] != phi.shape[:2] or (values is not None and values[:, :1].shape != phi[:, :1].shape):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise InputError(f"expected theta (B, C, Hq, Wq), phi (B, C, Hk, Wk), values (B, V, Hk, Wk); got {shapes}")
    if theta.dtype != phi.dtype:
        raise InputError(f"theta is {theta.dtype}, phi is {phi.dtype}; convert one, the product has a single dtype")
    for name, tensor in zip(("theta", "phi", "values"), tensors, strict=False):
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise InputError(
                f"{name} is {tensor.dtype}; the Triton kernels take float32, float16 and bfloat16: "
                'convert it, or use backend="reference"'
            )
        if tensor.device != theta.device:
            raise InputError(f"theta is on {theta.device}, {name} on {tensor.device}; move them to one device")
    if INTERPRETED:
        return
    if theta.device.type != "cuda":
        raise BackendError(
            f'backend="triton" needs CUDA tensors, got {theta.device.type}; move them to a GPU, use backend="numba", '
            "or set TRITON_INTERPRET=1 before Python starts to run the kernels slowly on the CPU"
        )
    line = configs.architecture(_capability(theta))
    if not line.bfloat16 and any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        raise BackendError("bfloat16 needs compute capability 80 or newer; use float16 or float32 on this GPU")


def warp_forward(
    theta: torch.Tensor, phi: torch.Tensor, values: torch.Tensor, patch: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The warp (B, V, Hq, Wq) in the values' dtype and its lse (B, Hq, Wq) float32; no autograd.

    theta (B, C, Hq, Wq) and phi (B, C, Hk, Wk) of one dtype, values (B, V, Hk, Wk); float32, float16 or bfloat16, any
    strides. More than 256 value channels are warped in several passes. Raises as `require_runnable` does.
    """
    require_runnable(theta, phi, values)
    with torch.cuda.device_of(theta):
        query, key = _side(theta, patch), _side(phi, patch)
        parts = [
            _forward(query, key, part, patch, temperature) for part in torch.split(values, configs.MAX_VALUES, dim=1)
        ]
    out = parts[0][0] if len(parts) == 1 else torch.cat([out for out, _ in parts], dim=1)
    return out, parts[0][1]


def match_forward(
    theta: torch.Tensor, phi: torch.Tensor, patch: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each query its most probable key and that key's probability, each (B, Hq, Wq).

    The key is int64 y * Wk + x, the first of equals; the probability float32. Inputs and errors as for `warp_forward`.
    """
    require_runnable(theta, phi)
    with torch.cuda.device_of(theta):
        query, key = _side(theta, patch), _side(phi, patch)
        shape = (theta.shape[0], query.height, query.width)
        index = torch.empty(shape, dtype=torch.int64, device=theta.device)
        probability = torch.empty(shape, dtype=torch.float32, device=theta.device)
        nine_tap = _nine_tap_blocks(query, key, 1, patch, split=False)
        _launch(query, key, None, (None, None, index, probability), 1, patch, temperature, nine_tap)
    return index, probability


def warp_backward(
    theta: torch.Tensor,
    phi: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    patch: int,
    temperature: float,
    needs: Needs = (True, True, True),
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of `warp_forward`'s warp with respect to theta, phi and values, each in its dtype; None if not needed.

    `out` and `lse` are those of the forward, `grad_out` (B, V, Hq, Wq) any strides. d_theta and d_phi come in torch's
    channels_last memory format. A constant patch has no direction, and gets no gradient through its norm.
    """
    require_runnable(theta, phi, values)
    needs_theta, needs_phi, needs_values = needs
    with torch.cuda.device_of(theta):
        query, key = _side(theta, patch), _side(phi, patch)
        grad_out = grad_out.to(values.dtype).flatten(2).contiguous()
        delta = (out.flatten(2).float() * grad_out.float()).sum(1)
        flat_values = values.flatten(2).contiguous()
        d_theta = _zeros(query.pixels) if needs_theta else None
        d_phi = _zeros(key.pixels) if needs_phi else None
        d_values = _zeros(flat_values) if needs_values else None
        scratch = _scratch_bytes(theta, phi)
        for i in range(theta.shape[0]):
            sums_q, sums_k = _backward_one(
                _Side(query.pixels[i], query.mean[i], query.inverse[i], query.height, query.width),
                _Side(key.pixels[i], key.mean[i], key.inverse[i], key.height, key.width),
                (flat_values[i], grad_out[i], lse[i].flatten(), delta[i]),
                [None if d is None else d[i] for d in (d_theta, d_phi, d_values)],
                (patch, temperature, scratch),
            )
            if d_theta is not None:
                _add_statistics_gradient(d_theta[i], query, i, sums_q, patch)
            if d_phi is not None:
                _add_statistics_gradient(d_phi[i], key, i, sums_k, patch)
    return (
        None if d_theta is None else _unpack(d_theta, theta),
        None if d_phi is None else _unpack(d_phi, phi),
        None if d_values is None else d_values.to(values.dtype).view(values.shape),
    )


def _side(features: torch.Tensor, patch: int) -> _Side:
    batch, channels, height, width = features.shape
    pixels = _pack(features, channels)
    mean = torch.empty((batch, height * width), dtype=torch.float32, device=features.device)
    inverse = torch.empty_like(mean)
    constants = {"C": channels, "PATCH": patch, "BN": configs.STATISTICS.queries, "BC": configs.STATISTICS.channels}
    grid = signatures.grid("statistics", constants, {"height": height, "width": width}, batch)
    statistics_kernel[grid](pixels, mean, inverse, height, width, **constants, **_options(configs.STATISTICS))
    return _Side(pixels, mean, inverse, height, width)


def _pack(planes: torch.Tensor, padded: int) -> torch.Tensor:
    """(B, C, H, W), any strides -> (B, H * W, padded) contiguous, zeros past C; a view where it already is that."""
    batch, channels, height, width = planes.shape
    last = planes.permute(0, 2, 3, 1)
    if padded == channels and last.is_contiguous():
        return last.view(batch, height * width, channels)
    packed = torch.empty((batch, height * width, padded), dtype=planes.dtype, device=planes.device)
    constants = {"BN": configs.PACK.queries, "BC": configs.PACK.channels}
    sizes = {"width": width, "positions": height * width, "channels": channels, "padded": padded}
    grid = signatures.grid("pack", constants, sizes, batch)
    pack_kernel[grid](planes, packed, *sizes.values(), *planes.stride(), **constants, **_options(configs.PACK))
    return packed


def _forward(
    query: _Side, key: _Side, values: torch.Tensor, patch: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, channels = values.shape[:2]
    out = torch.empty((batch, channels, query.height, query.width), dtype=values.dtype, device=values.device)
    lse = torch.empty((batch, query.height, query.width), dtype=torch.float32, device=values.device)
    packed = _pack(values, padded_values(channels))
    nine_tap = _nine_tap_blocks(query, key, channels, patch)
    count = 1 if nine_tap is None else _splits(query, key, channels, nine_tap)
    if nine_tap is None or (count == 1 and out.dtype == torch.float32):
        _launch(query, key, packed, (out, lse, None, None), channels, patch, temperature, nine_tap)
        return out, lse
    parts = torch.empty((count, *out.shape), dtype=torch.float32, device=out.device)
    part_lse = torch.empty((count, *lse.shape), dtype=torch.float32, device=out.device)
    results = parts, part_lse, None, None
    _launch(query, key, packed, results, channels, patch, temperature, nine_tap, count)
    merge = configs.MERGE
    grid = (triton.cdiv(query.positions, merge.queries), batch, triton.cdiv(channels, merge.channels))
    sizes = {"V": channels, "BN": merge.queries, "BV": merge.channels}
    merge_kernel[grid](parts, part_lse, out, lse, query.positions, count, **sizes, **_options(merge))
    return out, lse


def _nine_tap_blocks(
    query: _Side, key: _Side, channels: int, patch: int, *, split: bool = True
) -> configs.BlockSizes | None:
    """The block sizes of the nine-tap kernel if it is to run, for `channels` value channels."""
    if _choice.get() == "straightforward":
        return None
    pixels, forced = query.pixels, _choice.get() == "nine_tap"
    maps = max(query.positions, key.positions) * max(pixels.shape[-1], padded_values(channels))
    least = 1 if forced else configs.NINE_TAP_CHANNELS
    blocks = configs.nine_tap_blocks(
        _capability(pixels), pixels.element_size(), patch, pixels.shape[-1], maps, least=least, split=split or forced
    )
    if blocks is None and forced:
        raise InputError(
            "the nine-tap kernel takes patch 3 and float16 or bfloat16 maps of less than 2^31 elements on compute "
            f"capability 80 or newer, got patch {patch}, {pixels.dtype} and {maps} elements on "
            f'{_capability(pixels)}; choose "auto"'
        )
    return blocks


def _splits(query: _Side, key: _Side, channels: int, blocks: configs.BlockSizes) -> int:
    programs = query.pixels.shape[0] * query_tiles(query.height, query.width, configs.SPLIT_BAND, blocks.queries)
    count = walks(query.height, key.height, key.width, configs.SPLIT_BAND, blocks.keys)
    part = 4 * query.pixels.shape[0] * query.positions * (channels + 1)
    # together as large as the two packed maps, at the most
    most = max(1, (query.pixels.nbytes + key.pixels.nbytes) // part)
    return configs.splits(programs, count, _multiprocessors(query.pixels), most)


def _launch(
    query: _Side,
    key: _Side,
    values: torch.Tensor | None,
    results: _Results,
    value_channels: int,
    patch: int,
    temperature: float,
    nine_tap: configs.BlockSizes | None,
    splits: int = 1,
) -> None:
    """One launch of `nine_tap_kernel` with these block sizes, or of `forward_kernel` where they are None."""
    pixels, channels = query.pixels, query.pixels.shape[-1]
    kernel, band = forward_kernel, None
    blocks = nine_tap or configs.forward_blocks(_capability(pixels), pixels.element_size(), value_channels)
    if nine_tap:
        kernel, band = nine_tap_kernel, configs.WHOLE_BAND if values is None else configs.SPLIT_BAND
    constants = configs.warp_constants(patch, channels, value_channels, blocks, band)
    sizes = {"height_q": query.height, "width_q": query.width}
    tiles, batch, _ = signatures.grid("warp", constants, sizes, len(pixels))
    kernel[(tiles, batch, splits)](
        pixels,
        key.pixels,
        values,
        query.mean,
        query.inverse,
        key.mean,
        key.inverse,
        *results,
        query.height,
        query.width,
        key.height,
        key.width,
        math.log2(math.e) / temperature,
        **constants,
        **_options(blocks),
    )


def _backward_one(
    query: _Side,
    key: _Side,
    forward: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    targets: list[torch.Tensor | None],
    settings: tuple[int, float, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold every chunk of one batch element into `targets` (d_theta, d_phi, d_values; float32).

    forward: values (V, M), grad_out (V, N), lse (N), delta (N). Returns the sums over keys (2, N) and over queries
    (2, M) of G times the other side's mean, and of d_logits * logits.
    """
    values, grad_out, lse, delta = forward
    d_theta, d_phi, d_values = targets
    patch, temperature, scratch_bytes = settings
    blocks = configs.backward_blocks(_capability(query.pixels), query.pixels.element_size())
    buffers = 1 if d_values is None else 2
    chunk_q, chunk_k = chunk_size(query.positions, key.positions, scratch_bytes // (4 * buffers))
    scratch = query.mean.new_empty((buffers, chunk_q * chunk_k))
    sums_q, sums_k = query.mean.new_zeros((2, query.positions)), query.mean.new_zeros((2, key.positions))
    for first_q in range(0, query.positions, chunk_q):
        for first_k in range(0, key.positions, chunk_k):
            count_q, count_k = min(chunk_q, query.positions - first_q), min(chunk_k, key.positions - first_k)
            grid = (triton.cdiv(count_q, blocks.queries), triton.cdiv(count_k, blocks.keys))
            row_sums, column_sums = scratch.new_empty((2, grid[1], count_q)), scratch.new_empty((2, grid[0], count_k))
            score_gradient_kernel[grid](
                query.pixels,
                key.pixels,
                values,
                grad_out,
                query.mean,
                query.inverse,
                key.mean,
                key.inverse,
                lse,
                delta,
                scratch[0],
                scratch[-1],
                row_sums,
                column_sums,
                first_q,
                count_q,
                first_k,
                count_k,
                query.height,
                query.width,
                key.height,
                key.width,
                math.log2(math.e) / temperature,
                1.0 / temperature,
                C=query.pixels.shape[-1],
                V=values.shape[0],
                PATCH=patch,
                BN=blocks.queries,
                BM=blocks.keys,
                BC=blocks.channels,
                BV=16,
                STORE_WEIGHT=d_values is not None,
                **_options(blocks),
            )
            sums_q[:, first_q : first_q + count_q] += row_sums.sum(1)
            sums_k[:, first_k : first_k + count_k] += column_sums.sum(1)
            rows, columns = (query, first_q, count_q, count_k), (key, first_k, count_k, 1)
            if d_theta is not None:
                _fold(scratch[0], rows, columns, key.pixels, d_theta, patch)
            if d_phi is not None:
                _fold(scratch[0], columns, rows, query.pixels, d_phi, patch)
            if d_values is not None:
                _fold(scratch[1], columns, rows, grad_out.T, d_values.T, 1)
    return sums_q, sums_k


def _fold(
    chunk: torch.Tensor,
    rows: tuple[_Side, int, int, int],
    columns: tuple[_Side, int, int, int],
    source: torch.Tensor,
    target: torch.Tensor,
    patch: int,
) -> None:
    """target (positions of rows, C) += diagonal sum of `chunk` @ source (positions of columns, C).

    rows, columns: the map, the chunk's first position and count along it, and the chunk's stride along it.
    """
    (side_x, first_i, count_i, stride_i), (side_y, first_j, count_j, stride_j) = rows, columns
    first_x, end_x = _reach(side_x, first_i, count_i, patch)
    first_y, end_y = _reach(side_y, first_j, count_j, patch)
    channels, half = target.shape[1], source.element_size() == 2
    blocks = configs.fold_blocks(source.element_size(), channels)
    tf32 = half and configs.architecture(_capability(source)).tf32
    fold_kernel[(triton.cdiv(end_x - first_x, blocks.queries), triton.cdiv(channels, blocks.channels))](
        chunk,
        source,
        target,
        first_i,
        count_i,
        first_j,
        count_j,
        stride_i,
        stride_j,
        *source.stride(),
        *target.stride(),
        first_x,
        end_x,
        first_y,
        end_y,
        side_x.height,
        side_x.width,
        side_y.height,
        side_y.width,
        C=channels,
        PATCH=patch,
        BX=blocks.queries,
        BY=blocks.keys,
        BC=blocks.channels,
        # G has no bounded scale, so it stays float32: tf32 keeps as many bits of it as float16 would, and its range
        PRECISION="tf32" if tf32 else "ieee",
        **_options(blocks),
    )


def _add_statistics_gradient(target: torch.Tensor, side: _Side, i: int, sums: torch.Tensor, patch: int) -> None:
    """Add the terms through the means and norms of batch element `i` to `target` (H * W, C) float32, in place."""
    mean, inverse, pixels = side.mean[i], side.inverse[i], side.pixels[i]
    through_norm = -(inverse**2) * sums[1]
    vectors = torch.stack([through_norm, -sums[0] - through_norm * mean]).view(1, 2, side.height, side.width)
    # a sum over the window around each position: its own transpose
    boxed = F.avg_pool2d(vectors, patch, stride=1, padding=patch // 2, divisor_override=1).view(2, -1, 1)
    target.addcmul_(pixels, boxed[0]).add_(boxed[1])


def chunk_size(queries: int, keys: int, elements: int) -> tuple[int, int]:
    """Queries and keys of one chunk of at most about `elements` scores: near square, in steps of 64, at least 64."""
    side = max(64, math.isqrt(elements) // 64 * 64)
    chunk_q, chunk_k = min(side, queries), min(side, keys)
    # a short side leaves room along the other
    chunk_q = min(queries, max(chunk_q, elements // chunk_k // 64 * 64))
    chunk_k = min(keys, max(chunk_k, elements // chunk_q // 64 * 64))
    return chunk_q, chunk_k


def _reach(side: _Side, first: int, count: int, patch: int) -> tuple[int, int]:
    """First and one past last position whose patch window meets positions first .. first + count."""
    halo = patch // 2 * (side.width + 1)
    return max(0, first - halo), min(side.positions, first + count + halo)


def _scratch_bytes(theta: torch.Tensor, phi: torch.Tensor) -> int:
    half = (theta.nbytes + phi.nbytes) // 2
    return min(max(half, SCRATCH_BYTES), MAX_SCRATCH_BYTES)


def _zeros(like: torch.Tensor) -> torch.Tensor:
    return torch.zeros(like.shape, dtype=torch.float32, device=like.device)


def _unpack(gradient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    batch, channels, height, width = like.shape
    return gradient.to(like.dtype).view(batch, height, width, channels).permute(0, 3, 1, 2)


def _capability(tensor: torch.Tensor) -> int:
    if tensor.device.type != "cuda":
        return max(configs.ARCHITECTURES)  # the interpreter: any line will do
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return major * 10 + minor


def _multiprocessors(tensor: torch.Tensor) -> int:
    if tensor.device.type != "cuda":
        return 1  # the interpreter, which runs programs one by one
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def _options(blocks: configs.BlockSizes) -> dict[str, int]:
    # contraction to FMA is named because Triton's default for it changes with its version
    return {"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True}
