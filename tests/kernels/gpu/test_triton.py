"""The Triton kernels against the float64 oracle: on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from tolerances import TRITON, assert_close

from flashcocos.errors import BackendError, InputError
from flashcocos.kernels import corr_match, corr_warp, reference

triton_warp = pytest.importorskip("flashcocos.kernels.gpu.triton_warp", reason="needs the triton package")

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32

# batch, C, query map, key map, V, patch, dtype: odd, prime and ragged sizes, one and several tiles along each axis
CASES = {
    "float32": (1, 20, (5, 7), (6, 11), 3, 3, SINGLE),
    "float32-batch": (3, 7, (3, 5), (4, 3), 1, 3, SINGLE),
    "float32-prime-row": (1, 16, (9, 7), (1, 61), 48, 1, SINGLE),
    "float32-patch5": (1, 6, (4, 5), (5, 4), 3, 5, SINGLE),
    "float32-wide": (1, 8, (3, 3), (4, 4), 151, 1, SINGLE),
    "float32-one": (1, 5, (1, 1), (2, 1), 3, 3, SINGLE),
    "float16-tiles": (1, 20, (13, 11), (12, 11), 48, 3, HALF),
    "float16-batch": (3, 9, (4, 3), (3, 5), 3, 3, HALF),
    "float16-wide": (1, 8, (5, 7), (7, 5), 151, 1, HALF),
    "bfloat16": (1, 20, (5, 7), (6, 11), 3, 3, BRAIN),
    "bfloat16-wide": (1, 8, (5, 7), (7, 5), 151, 1, BRAIN),
}


def make(batch, channels, query, key, values, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((channels, *query), (channels, *key), (values, *key), (values, *query))
    return [torch.randn(batch, *shape, generator=generator).to(dtype).to(device) for shape in shapes]


def oracle(tensors, grad, patch, temperature=0.01):
    """Warp, lse and gradients in float64, of the values that the tensors hold."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in tensors]
    out, lse = reference.warp(*leaves, patch, temperature)
    return out, lse, torch.autograd.grad(out, leaves, grad.double())


def check(tensors, grad, patch, temperature=0.01):
    """The kernels' warp, lse and gradients against the oracle's."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out, lse = corr_warp(*leaves, patch=patch, temperature=temperature, backend="triton", return_lse=True)
    grads = torch.autograd.grad(out, leaves, grad)
    expected, expected_lse, expected_grads = oracle(tensors, grad, patch, temperature)
    assert out.dtype == tensors[2].dtype
    assert lse.dtype == SINGLE
    assert_close("out", out, expected, TRITON["out", out.dtype])
    assert_close("lse", lse, expected_lse, TRITON["lse", SINGLE])
    for name, leaf, got, want in zip(("theta", "phi", "values"), leaves, grads, expected_grads, strict=True):
        assert got.dtype == leaf.dtype
        assert_close(f"gradient of {name}", got, want, TRITON["grad", leaf.dtype])
    return out, grads


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_forward_and_gradients(case, device):
    *sizes, patch, dtype = case
    *tensors, grad = make(*sizes, dtype, device)
    check(tensors, grad, patch)


def test_every_output_is_written(device, monkeypatch):
    *tensors, grad = make(1, 8, (5, 7), (6, 11), 3, SINGLE, device)
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poison(tensor):
        return tensor.fill_(math.nan if tensor.is_floating_point() else -(2**40))

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(
        torch, "empty_like", lambda like, **kwargs: poison(empty(like.shape, dtype=like.dtype, device=like.device))
    )
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: poison(new_empty(*args, **kwargs)))
    out, lse = triton_warp.warp_forward(*tensors, 3, 0.01)
    grads = triton_warp.warp_backward(*tensors, out, lse, grad, 3, 0.01)
    index, probability = triton_warp.match_forward(*tensors[:2], 3, 0.01)
    assert all(t.isfinite().all() for t in (out, lse, *grads, probability))
    assert index.min() >= 0


def test_strided_inputs_and_gradient(device):
    theta, phi, values, grad = make(2, 8, (4, 6), (6, 5), 3, SINGLE, device)
    tensors = [theta.transpose(2, 3), phi.to(memory_format=torch.channels_last), values[:, [0, 1, 2]].flip(1)[:, ::2]]
    assert not tensors[0].is_contiguous()
    assert not tensors[1].is_contiguous()
    check(tensors, grad[:, :2].transpose(2, 3), 3)


def test_backward_in_chunks(device, monkeypatch):
    *tensors, grad = make(1, 6, (9, 8), (10, 7), 3, HALF, device)
    monkeypatch.setattr(triton_warp, "SCRATCH_BYTES", 0)
    monkeypatch.setattr(triton_warp, "MAX_SCRATCH_BYTES", 0)
    chunks, fold = [], triton_warp._fold
    monkeypatch.setattr(triton_warp, "_fold", lambda *args: (chunks.append((args[1][1:3], args[2][1:3])), fold(*args)))
    check(tensors, grad, 3)
    rows, columns = ((0, 64), (64, 8)), ((0, 64), (64, 6))
    assert chunks[::3] == [(row, column) for row in rows for column in columns]


@pytest.mark.parametrize(
    ("queries", "keys", "elements"), [(16384, 16384, 2 << 20), (65536, 4096, 16 << 20), (9, 7, 1), (65536, 64, 2 << 20)]
)
def test_chunks_fill_the_scratch_and_no_more(queries, keys, elements):
    chunk_q, chunk_k = triton_warp.chunk_size(queries, keys, elements)
    assert chunk_q <= queries
    assert chunk_k <= keys
    assert chunk_q * chunk_k <= max(elements, 64 * 64)
    assert chunk_q * chunk_k >= min(elements // 2, queries * keys)


def test_scratch_is_half_of_the_maps_within_bounds():
    maps = [torch.empty(1, 256, side, side, dtype=HALF, device="meta") for side in (16, 128, 256, 1024)]
    assert [triton_warp._scratch_bytes(m, m) >> 20 for m in maps] == [8, 8, 32, 64]


def test_gradients_only_where_needed(device):
    theta, phi, values, grad = make(1, 8, (3, 4), (4, 3), 3, SINGLE, device)
    out, lse = triton_warp.warp_forward(theta, phi, values, 3, 0.01)
    everything = triton_warp.warp_backward(theta, phi, values, out, lse, grad, 3, 0.01)
    for i in range(3):
        needs = tuple(i == j for j in range(3))
        grads = triton_warp.warp_backward(theta, phi, values, out, lse, grad, 3, 0.01, needs)
        assert [g is not None for g in grads] == list(needs)
        assert torch.equal(grads[i], everything[i])


def test_values_beyond_one_launch(device, monkeypatch):
    tensors = make(1, 8, (3, 4), (4, 3), 5, SINGLE, device)[:3]
    whole = triton_warp.warp_forward(*tensors, 3, 0.01)
    monkeypatch.setattr(triton_warp.configs, "MAX_VALUES", 2)
    parts = triton_warp.warp_forward(*tensors, 3, 0.01)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_half_maps_with_float32_values(device):
    theta, phi, _, _ = make(1, 8, (3, 4), (4, 3), 3, HALF, device)
    values, grad = make(1, 8, (3, 4), (4, 3), 3, SINGLE, device)[2:]
    out, _ = triton_warp.warp_forward(theta, phi, values, 3, 0.01)
    assert_close("out", out, oracle([theta, phi, values], grad, 3)[0], TRITON["out", SINGLE])


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
def test_ones_warp_to_ones(dtype, device):
    theta, phi, _, _ = make(1, 8, (5, 7), (6, 11), 1, dtype, device)
    out, _ = triton_warp.warp_forward(theta, phi, torch.ones_like(phi[:, :3]), 3, 0.01)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-6 if dtype == SINGLE else 5e-4)


def test_identical_features_copy(device):
    theta, _, values, _ = make(1, 32, (6, 7), (6, 7), 3, SINGLE, device)
    out, _ = triton_warp.warp_forward(theta, theta, values, 3, 1e-3)
    torch.testing.assert_close(out, values, rtol=0, atol=1e-6)


def test_permuted_keys_change_nothing(device):
    theta, phi, values, _ = make(1, 16, (4, 5), (5, 7), 3, SINGLE, device)
    order = torch.randperm(35, generator=torch.Generator().manual_seed(0)).to(device)
    moved = [x.flatten(2)[..., order].view_as(x) for x in (phi, values)]
    first = triton_warp.warp_forward(theta, phi, values, 1, 0.01)[0]
    second = triton_warp.warp_forward(theta, *moved, 1, 0.01)[0]
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


def test_constant_patches_match_everything_alike(device):
    theta, phi, values, grad = make(1, 8, (3, 4), (4, 5), 3, SINGLE, device)
    theta = torch.full_like(theta, 0.1)
    out, lse = triton_warp.warp_forward(theta, phi, values, 1, 0.01)
    torch.testing.assert_close(out, values.mean((2, 3), keepdim=True).expand_as(out), rtol=0, atol=1e-6)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(20)))
    grads = triton_warp.warp_backward(theta, phi, values, out, lse, grad, 1, 0.01)
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0].any()


def test_means_far_from_zero_keep_float32_accuracy(device):
    *tensors, grad = make(1, 20, (5, 7), (6, 11), 3, SINGLE, device)
    check([tensors[0] + 1, tensors[1] - 1, tensors[2]], grad, 1)


@pytest.mark.parametrize("dtype", [SINGLE, HALF, BRAIN], ids=str)
def test_match(dtype, device):
    theta, phi, _, _ = make(2, 16, (5, 7), (12, 11), 1, dtype, device)
    found = corr_match(theta, phi, backend="triton")
    logits = reference.logits(theta.double(), phi.double(), 3, 0.01)
    weights = logits.softmax(-1)
    assert found.index.dtype == torch.int64
    assert torch.equal(found.index.flatten(1), logits.argmax(-1))
    assert_close("probability", found.probability.flatten(1), weights.amax(-1), TRITON["out", SINGLE])


def test_match_of_equal_keys_is_the_first(device):
    theta, phi, _, _ = make(1, 8, (3, 3), (10, 10), 1, SINGLE, device)
    found = corr_match(theta, torch.ones_like(phi), patch=1, backend="triton")
    assert not found.index.any()
    torch.testing.assert_close(found.probability, torch.full_like(found.probability, 0.01))


def test_unusable_inputs_are_refused(device, monkeypatch):
    theta, phi, values, _ = make(1, 8, (3, 4), (4, 3), 3, SINGLE, device)
    with pytest.raises(InputError, match=r"float64.*backend=\"reference\""):
        triton_warp.warp_forward(theta.double(), phi.double(), values, 3, 0.01)
    with pytest.raises(InputError, match=r"theta is torch\.float16, phi is torch\.float32"):
        triton_warp.warp_forward(theta.half(), phi, values, 3, 0.01)
    with pytest.raises(InputError, match=r"expected theta .* got .*1, 3, 2, 3"):
        triton_warp.warp_forward(theta, phi, values[:, :, :2], 3, 0.01)
    monkeypatch.setattr(triton_warp, "INTERPRETED", False)
    with pytest.raises(BackendError, match=r"needs CUDA tensors, got cpu.*TRITON_INTERPRET=1"):
        triton_warp.warp_forward(theta.cpu(), phi.cpu(), values.cpu(), 3, 0.01)


def test_old_gpus_are_refused(monkeypatch):
    meta = torch.empty(1, 8, 4, 4, device="meta", dtype=BRAIN)
    fake = type("Fake", (), {"type": "cuda"})()
    monkeypatch.setattr(triton_warp, "INTERPRETED", False)
    monkeypatch.setattr(torch.Tensor, "device", property(lambda _: fake))
    for capability, message in (((7, 0), "75 or newer, got 70"), ((7, 5), "bfloat16 needs compute capability 80")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        with pytest.raises(BackendError, match=message):
            triton_warp.require_runnable(meta, meta)


def test_missing_triton_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("flashcocos.kernels.gpu.triton_")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    theta, phi, values, _ = make(1, 4, (2, 2), (2, 2), 1, SINGLE, "cpu")
    with pytest.raises(BackendError, match=r'needs the triton package.*backend="numba"'):
        corr_warp(theta, phi, values, backend="triton")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="races and memory show only on a GPU, and none is here")
class TestOnGpu:
    def test_fifty_repeats_are_bit_equal(self, forwards):
        *tensors, grad = make(1, 128, (37, 41), (40, 33), 48, HALF, "cuda")
        first = triton_warp.warp_forward(*tensors, 3, 0.01)
        assert forwards == ["nine_tap" if torch.cuda.get_device_capability() >= (8, 0) else "straightforward"]
        grads = triton_warp.warp_backward(*tensors, *first, grad, 3, 0.01)
        for _ in range(50):
            again = triton_warp.warp_forward(*tensors, 3, 0.01)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            again = triton_warp.warp_backward(*tensors, *first, grad, 3, 0.01)
            assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))

    @pytest.mark.parametrize("packed", [False, True])
    def test_memory_at_128(self, packed):
        *tensors, grad = make(1, 256, (128, 128), (128, 128), 3, HALF, "cuda")
        if packed:
            tensors[:2] = [x.contiguous(memory_format=torch.channels_last) for x in tensors[:2]]
        maps = tensors[0].nbytes + tensors[1].nbytes

        def extra(function, *args):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            result = function(*args)
            torch.cuda.synchronize()
            return result, torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in result)

        forward, used = extra(triton_warp.warp_forward, *tensors, 3, 0.01)
        # statistics and packed values, and at most 16 outputs of splits with their lse
        assert used <= (0 if packed else maps) + (1 << 20) + 16 * 4 * 4 * 128 * 128
        _, used = extra(triton_warp.warp_backward, *tensors, *forward, grad, 3, 0.01)
        assert used <= 4 * maps
