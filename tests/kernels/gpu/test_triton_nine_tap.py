"""The nine-tap forward: its lanes, its shifts, its skips and its splits; the rule that chooses it; its counts.

`test_triton.py` runs it as one of the forward kernels, by the rule; here it is asked for by name.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import TRITON, assert_close

from flashcocos.errors import InputError
from flashcocos.kernels import corr_match, corr_warp, reference, signatures
from flashcocos.kernels.gpu import configs

triton_warp = pytest.importorskip("flashcocos.kernels.gpu.triton_warp", reason="needs the triton package")
from flashcocos.kernels.gpu import triton_nine_tap  # noqa: E402

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32

# query map, key map, V, dtype: one pixel, one column, one row, lanes of several bands and segments, ragged everywhere
CASES = {
    "one": ((1, 1), (1, 1), 1, HALF),
    "columns": ((3, 1), (33, 2), 3, HALF),
    "rows": ((1, 9), (1, 65), 3, BRAIN),
    "bands": ((17, 3), (2, 4), 3, HALF),
    "tiles": ((2, 67), (3, 62), 17, HALF),
}


def make(query, key, values, dtype, device, batch=1, channels=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((channels, *query), (channels, *key), (values, *key))
    return [torch.randn(batch, *shape, generator=generator).to(dtype).to(device) for shape in shapes]


def check(theta, phi, values, temperature=0.01):
    with triton_warp.choose_forward("nine_tap"):
        out, lse = triton_warp.warp_forward(theta, phi, values, 3, temperature)
    expected, expected_lse = reference.warp(theta.double(), phi.double(), values.double(), 3, temperature)
    assert out.dtype == values.dtype
    assert_close("out", out, expected, TRITON["out", values.dtype])
    assert_close("lse", lse, expected_lse, TRITON["lse", SINGLE])
    return out, lse


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_shape_of_lanes(case, device):
    check(*make(*case, device))


def test_float32_values_are_written_directly(device, monkeypatch):
    monkeypatch.delattr(triton_warp, "merge_kernel")
    theta, phi, _ = make((2, 3), (3, 2), 1, HALF, device)
    check(theta, phi, make((2, 3), (3, 2), 3, SINGLE, device)[2])


def test_a_split_over_keys_changes_nothing(device, monkeypatch):
    theta, phi, values = make((2, 3), (4, 3), 3, HALF, device, batch=2)
    whole = check(theta, phi, values)
    grids, launch = [], triton_warp._launch
    monkeypatch.setattr(triton_warp, "_launch", lambda *args: (grids.append(args[-1]), launch(*args)))
    monkeypatch.setattr(triton_warp, "_splits", lambda *_: 3)
    # the last of five walks meets no key of the first row: one split has nothing for it
    parts = check(theta, phi, values)
    assert grids == [3]
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3 if a.dtype == HALF else 2e-6, atol=1e-6)


@pytest.fixture
def products(monkeypatch):
    """The columns of each product that the interpreter makes, in order."""
    if not triton_warp.INTERPRETED:
        pytest.skip("a GPU does not count its products")
    from triton.runtime.interpreter import interpreter_builder

    columns, dot = [], interpreter_builder.create_dot
    monkeypatch.setattr(
        interpreter_builder, "create_dot", lambda a, b, *rest: (columns.append(b.data.shape[1]), dot(a, b, *rest))[1]
    )
    return columns


def test_skipping_happens_and_changes_no_bit(products, device, monkeypatch):
    # a query is one of the keys that it meets early: at this temperature few later tiles can matter
    theta, phi, values = make((2, 3), (9, 3), 3, HALF, device, channels=32)
    theta.copy_(phi[:, :, :2])
    with triton_warp.choose_forward("nine_tap"):
        skipped = triton_warp.warp_forward(theta, phi, values, 3, 1e-3)
    some = products.count(configs.NINE_TAP_VALUES)
    monkeypatch.setattr(triton_nine_tap, "SKIP_BITS", triton_nine_tap.tl.constexpr(1 << 20))
    with triton_warp.choose_forward("nine_tap"):
        everything = triton_warp.warp_forward(theta, phi, values, 3, 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(skipped, everything, strict=True))
    # each of 2 rows meets each of 9 key rows in one tile
    assert products.count(configs.NINE_TAP_VALUES) - some == 2 * 9
    assert some <= 6


def test_match_finds_the_first_of_equals(device):
    # small integers, so that equal patches have equal products; the later of the two is in the tile walked first
    generator = torch.Generator().manual_seed(0)
    phi = torch.randint(-2, 3, (1, 8, 6, 70), generator=generator).to(HALF).to(device)
    theta = phi[..., :3, 64:67].clone()
    phi[..., 3:, 2:5] = theta
    with triton_warp.choose_forward("nine_tap"):
        found = corr_match(theta, phi, backend="triton")
    logits = reference.logits(theta.double(), phi.double(), 3, 0.01)
    weights = logits.softmax(-1)
    assert weights[0, 4, [1 * 70 + 65, 4 * 70 + 3]].tolist() == pytest.approx([0.5, 0.5])
    assert found.index[0, 1, 1] == 1 * 70 + 65
    assert_close("probability", found.probability.flatten(1), weights.amax(-1), TRITON["out", SINGLE])


@pytest.mark.parametrize("kernel", ["nine_tap", "straightforward"])
def test_one_launch_gives_warp_and_match(kernel, device, monkeypatch):
    """What is compiled ahead of time: bit for bit the results of two launches, given the same bands."""
    monkeypatch.setattr(configs, "SPLIT_BAND", configs.WHOLE_BAND)
    theta, phi, values = make((5, 3), (4, 6), 3, HALF, device, batch=2)
    values = values.float()
    query, key = triton_warp._side(theta, 3), triton_warp._side(phi, 3)
    blocks = configs.ARCHITECTURES[120].nine_tap if kernel == "nine_tap" else None

    def launch(packed, *, out=None, lse=None, match=False):
        empty = torch.empty(2, 15, dtype=torch.int64, device=device), torch.empty(2, 15, device=device)
        index, probability = empty if match else (None, None)
        results = out, lse, index, probability
        triton_warp._launch(query, key, packed, results, 3, 3, 0.01, blocks)
        return out, index, probability

    packed = triton_warp._pack(values, 8)
    out = launch(packed, out=torch.empty(2, 3, 15, device=device), lse=torch.empty(2, 15, device=device))[0]
    _, index, probability = launch(None, match=True)
    together = launch(packed, out=torch.empty(2, 3, 15, device=device), match=True)
    for one, other in zip(together, (out, index, probability), strict=True):
        assert torch.equal(one, other)


def test_nan_reaches_the_queries_whose_patch_holds_it_and_no_other(device):
    theta, phi, values = make((5, 5), (2, 3), 3, HALF, device)
    clean, _ = check(theta, phi, values)
    theta[0, 0, 3, 1] = math.nan
    with triton_warp.choose_forward("nine_tap"):
        out, lse = triton_warp.warp_forward(theta, phi, values, 3, 0.01)
    holds = torch.zeros(5, 5, dtype=torch.bool, device=device)
    holds[2:5, 0:3] = True
    assert torch.equal(out.isnan(), holds.expand_as(out))
    assert torch.equal(lse.isnan(), holds.expand_as(lse))
    assert torch.equal(out[..., ~holds], clean[..., ~holds])


def test_gradients_are_those_of_its_results(device):
    tensors = [x.requires_grad_() for x in make((3, 4), (4, 5), 3, HALF, device)]
    grad = make((3, 4), (3, 4), 3, HALF, device, seed=1)[2]
    with triton_warp.choose_forward("nine_tap"):
        out = corr_warp(*tensors, backend="triton")
        grads = torch.autograd.grad(out, tensors, grad)
    leaves = [x.detach().double().requires_grad_() for x in tensors]
    expected = torch.autograd.grad(reference.warp(*leaves, 3, 0.01)[0], leaves, grad.double())
    for name, got, want in zip(("theta", "phi", "values"), grads, expected, strict=True):
        assert_close(f"gradient of {name}", got, want, TRITON["grad", HALF])


def test_both_forwards_run_by_name_and_agree(device, forwards):
    tensors = make((3, 5), (4, 6), 3, HALF, device, channels=20)
    results = []
    for name in ("nine_tap", "straightforward"):
        with triton_warp.choose_forward(name):
            results.append(triton_warp.warp_forward(*tensors, 3, 0.01))
            triton_warp.match_forward(*tensors[:2], 3, 0.01)
    assert forwards == ["nine_tap", "nine_tap", "straightforward", "straightforward"]
    for a, b, kind in zip(*results, ("out", "lse"), strict=True):
        assert_close(kind, a, b.double(), TRITON[kind, a.dtype])


def test_the_rule_and_its_override(device, forwards):
    assert configs.nine_tap_blocks(80, 2, 3, 256, 1) is configs.ARCHITECTURES[80].nine_tap
    for refused in (
        (75, 2, 3, 256, 1),
        (80, 4, 3, 256, 1),
        (80, 2, 5, 256, 1),
        (80, 2, 3, 32, 1),
        (80, 2, 3, 256, 1 << 31),
    ):
        assert configs.nine_tap_blocks(*refused) is None
    # where the walks are not split: a data-center chip has too many multiprocessors for the few programs
    whole = {sm: configs.nine_tap_blocks(sm, 2, 3, 256, 1, split=False) is not None for sm in configs.ARCHITECTURES}
    assert whole == {75: False, 80: False, 86: True, 89: True, 90: False, 120: True}
    with pytest.raises(InputError, match=r"expected one of auto, nine_tap, straightforward, got 'fast'"):
        triton_warp.choose_forward("fast").__enter__()
    tensors = make((2, 3), (3, 2), 1, SINGLE, device)
    with triton_warp.choose_forward("nine_tap"), pytest.raises(InputError, match=r"takes patch 3 and .*float32"):
        triton_warp.warp_forward(*tensors, 3, 0.01)
    for channels, dtype, name in (
        (128, HALF, "nine_tap"),
        (127, HALF, "straightforward"),
        (128, SINGLE, "straightforward"),
    ):
        triton_warp.warp_forward(*make((1, 1), (1, 2), 1, dtype, device, channels=channels), 3, 0.01)
        assert forwards.pop() == name


@pytest.mark.parametrize("size", [(8, 8), (16, 24), (64, 64)])
def test_the_shifts_in_numpy(size):
    # the digits of `diagonal_taps`: addresses inside the tile, the right neighbor, no two lanes of a warp in a bank
    rows, columns = size
    i, j = (x.ravel() for x in np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"))

    def address(i, j):
        return (((i // 8) * (columns // 8) + j // 8) * 2 + j % 2) * 32 + j % 8 // 2 * 8 + i % 8

    i2, i1, j3, j2, j1 = i // 8, i % 8, j // 8, j % 8 // 2, j % 2
    row_next = np.where(i1 == 7, np.where(i2 == rows // 8 - 1, 0, 8 * columns), i1 + 1)
    row_last = np.where(i1 == 0, np.where(i2 == 0, 0, 7 - 8 * columns), i1 - 1)
    next_j = np.where(j1 == 0, 32 + 8 * j2, np.where(j2 == 3, np.where(j3 == columns // 8 - 1, 0, 64), 8 * j2 + 8))
    last_j = np.where(j1 == 1, 8 * j2, np.where(j2 == 0, np.where(j3 == 0, 24, -8), 8 * j2 + 24))
    base = i2 * 8 * columns + j3 * 64
    for addresses, step in ((base + row_next + next_j, 1), (base + row_last + last_j, -1)):
        assert addresses.min() >= 0
        assert addresses.max() < rows * columns
        inside = (i + step >= 0) & (i + step < rows) & (j + step >= 0) & (j + step < columns)
        assert np.array_equal(addresses[inside], address(i + step, j + step)[inside])
        # a warp's register holds i1 and j2 of one (i2, j3, j1)
        register = (i2 * (columns // 8) + j3) * 2 + j1
        for one in np.unique(register)[::7]:
            lanes = (register == one) & inside
            assert len(np.unique(addresses[lanes] % 32)) == lanes.sum()


def tile_products(query, key, band, queries, keys):
    """Tiles of queries x keys multiplied over the channels for one image, and their elements for each score.

    query, key: (height, width) of the maps. The second is the multiply-adds a score, in units of the channels, where
    `forward_kernel` takes 9.
    """
    tiles, rows = triton_nine_tap.key_tiles(*key, keys)
    bands = -(-query[0] // band)
    depth = -(-query[0] // bands)
    count = signatures.query_tiles(*query, band, queries) * tiles * (depth * rows + 2 * (depth + rows - 1))
    return count, count * queries * keys / (query[0] * query[1] * key[0] * key[1])


def test_the_docs_state_the_multiply_adds():
    table = re.findall(
        r"^\| (\d+) \| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$",
        (Path(__file__).parents[3] / "docs" / "kernels.md").read_text(),
        re.MULTILINE,
    )
    assert [int(row[1]) for row in table] == [configs.SPLIT_BAND, configs.WHOLE_BAND] * 4
    for side, band, programs, factor, gain in table:
        size = (int(side), int(side))
        _, expected = tile_products(size, size, int(band), 64, 64)
        assert int(programs) == signatures.query_tiles(*size, int(band), 64)
        assert (factor, gain) == (f"{expected:.2f}", f"{9 / expected:.1f}")


def test_products_counted_are_products_made(products, device):
    query, key = (3, 4), (4, 30)
    with triton_warp.choose_forward("nine_tap"):
        triton_warp.warp_forward(*make(query, key, 1, HALF, device), 3, 0.01)
    blocks = configs.ARCHITECTURES[max(configs.ARCHITECTURES)].nine_tap
    count, _ = tile_products(query, key, configs.SPLIT_BAND, blocks.queries, blocks.keys)
    assert products.count(blocks.keys) == count


def test_splits_fill_waves_and_leave_none_empty():
    assert configs.splits(17, 423, 128, 64) == 7
    assert configs.splits(1000, 423, 108, 64) == 1
    assert configs.splits(5, 94, 132, 1) == 1
    for programs in (1, 5, 17, 67):
        for walks in (1, 2, 47, 423):
            count = configs.splits(programs, walks, 132, 64)
            assert 1 <= count <= min(64, walks)
            assert (count - 1) * math.ceil(walks / count) < walks
