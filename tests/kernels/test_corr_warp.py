"""The public functions: what they refuse, which implementation they choose, what they load, what memory they need."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import flashcocos.kernels
from flashcocos.errors import BackendError, InputError
from flashcocos.kernels import corr_match, corr_row, corr_warp
from flashcocos.kernels.corr_warp import warp_arrays


def arrays(dtype=np.float32):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(dtype) for shape in ((2, 4, 3, 5), (2, 4, 6, 2), (2, 3, 6, 2))]


def tensors():
    return [torch.from_numpy(x) for x in arrays()]


BAD = {
    "axes": (lambda t, p, v: (t[0], p, v), {}, "theta: expected 4 axes"),
    "batch": (lambda t, p, v: (t, p[:1], v), {}, "phi: expected theta's batch of 2, got 1"),
    "values-batch": (lambda t, p, v: (t, p, v[:1]), {}, "values: expected theta's batch of 2, got 1"),
    "channels": (lambda t, p, v: (t, p[:, :3], v), {}, "equal channels, got 4 and 3"),
    "values-map": (lambda t, p, v: (t, p, v[:, :, :5]), {}, r"expected phi's map \(6, 2\), got \(5, 2\)"),
    "empty": (lambda t, p, v: (t[:, :, :0], p, v), {}, "theta: expected no empty axis"),
    "no-values": (lambda t, p, v: (t, p, v[:, :0]), {}, "values: expected no empty axis"),
    "empty-keys": (lambda t, p, v: (t, p[..., :0], v[..., :0]), {}, "phi: expected no empty axis"),
    "patch": (lambda *x: x, {"patch": 2}, r"patch: expected one of \(1, 3, 5\), got 2"),
    "temperature": (lambda *x: x, {"temperature": 0.0}, "temperature: expected a positive finite number, got 0.0"),
    "temperature-nan": (lambda *x: x, {"temperature": float("nan")}, "temperature: .* got nan"),
    "backend": (lambda *x: x, {"backend": "magic"}, "backend for .* got 'magic'"),
    "mixed": (lambda t, p, v: (t, p.tolist(), v), {}, "phi: expected a .* like theta, got list"),
}


@pytest.mark.parametrize("kind", [arrays, tensors])
@pytest.mark.parametrize("name", list(BAD))
def test_refuses(name, kind):
    change, options, message = BAD[name]
    with pytest.raises(InputError, match=message):
        corr_warp(*change(*kind()), **options)


def test_refuses_dtypes():
    theta, phi, values = arrays()
    with pytest.raises(InputError, match=r"theta: expected float32 or float16, got float64; convert"):
        corr_warp(*arrays(np.float64))
    with pytest.raises(InputError, match="expected one dtype, got float32 and float16"):
        corr_warp(theta, phi.astype(np.float16), values)
    with pytest.raises(InputError, match=r"theta: expected a floating dtype, got torch\.int64"):
        corr_warp(*(x.long() for x in tensors()))
    with pytest.raises(InputError, match="phi: expected a Tensor like theta, got ndarray"):
        corr_warp(torch.from_numpy(theta), phi, values)


def test_refuses_what_is_neither_array_nor_tensor():
    with pytest.raises(InputError, match="theta: expected a numpy array or torch tensor, got list"):
        corr_warp([[1.0]], *arrays()[1:])


def test_row_takes_parameters():
    theta, phi, _ = tensors()
    assert torch.equal(corr_row(torch.nn.Parameter(theta), phi, (1, 2)), corr_row(theta, phi, (1, 2)))


@pytest.mark.parametrize("position", [(3, 0), (0, 5), (-1, 0)])
def test_row_refuses_positions_outside(position):
    with pytest.raises(InputError, match=r"position: expected 0 <= y < 3 and 0 <= x < 5"):
        corr_row(*arrays()[:2], position)


def test_tensors_elsewhere_need_another_backend():
    meta = [x.to("meta") for x in tensors()]
    with pytest.raises(BackendError, match="backend 'numba' needs tensors on the CPU, got meta"):
        corr_warp(*meta)
    with pytest.raises(BackendError, match="needs tensors on the CPU, got meta"):
        corr_match(*meta[:2])
    with pytest.raises(InputError, match="phi: expected theta's device cpu, got meta"):
        corr_warp(tensors()[0], *meta[1:])


def test_numba_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(BackendError, match=r"pip install 'flashcocos\[cpu\]', or use backend='numpy'"):
        corr_warp(*arrays(), backend="numba")
    with pytest.raises(BackendError, match=r"pip install 'flashcocos\[cpu\]', or use backend='reference'"):
        corr_warp(*tensors())
    assert warp_arrays(*arrays()).backend == "numpy"


def test_the_backend_that_runs(monkeypatch):
    ran = []
    for path, function in (
        ("cpu.numba_warp", "warp_forward"),
        ("cpu.numpy_warp", "warp_forward"),
        ("cpu.numpy_warp", "softmax_row"),
        ("reference", "warp"),
    ):
        module = importlib.import_module(f"flashcocos.kernels.{path}")
        spied = getattr(module, function)
        monkeypatch.setattr(
            module,
            function,
            lambda *args, spied=spied, path=path, **options: (ran.append(path), spied(*args, **options))[1],
        )
    assert warp_arrays(*arrays()).backend == "numba"
    assert warp_arrays(*arrays(), backend="numpy").backend == "numpy"
    corr_match(*tensors()[:2])
    corr_match(*arrays()[:2], backend="numpy")
    corr_row(*arrays()[:2], (0, 0))
    corr_warp(*tensors())
    corr_warp(*tensors(), backend="reference")
    kinds = ["cpu.numba_warp", "cpu.numpy_warp", "cpu.numba_warp", "cpu.numpy_warp", *["cpu.numpy_warp"] * 2]
    assert ran == [*kinds, "cpu.numba_warp", "reference"]


def test_results_have_the_kind_of_the_inputs():
    out, lse = corr_warp(*arrays(np.float16), return_lse=True)
    assert (out.dtype, lse.dtype, out.shape, lse.shape) == (np.float16, np.float32, (2, 3, 3, 5), (2, 3, 5))
    theta, phi, values = tensors()
    out = corr_warp(theta.half(), phi.half(), values)
    assert out.dtype == torch.float32  # the values'
    match = corr_match(theta, phi)
    assert (match.index.dtype, match.probability.dtype) == (torch.int64, torch.float32)
    assert warp_arrays(*arrays()).match is None


def test_threads_do_not_disturb_each_other():
    inputs = arrays()
    expected = corr_warp(*inputs)
    failures = []

    def work():
        for _ in range(20):
            if not np.array_equal(corr_warp(*inputs), expected):
                failures.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_public_names():
    assert flashcocos.kernels.__all__ == ["corr_match", "corr_row", "corr_warp"]
    importlib.import_module("flashcocos.kernels.corr_warp")  # the module must not take the function's place
    assert flashcocos.kernels.corr_warp is corr_warp


def python(code):
    """Run code in a fresh interpreter; its last line of output, as JSON."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_loads_only_what_runs():
    loaded = python(
        "import json, sys, numpy as np\n"
        "from flashcocos.kernels import corr_warp\n"
        "stages = [sorted({'torch', 'numba', 'triton'} & set(sys.modules))]\n"
        "x = np.ones((1, 2, 3, 3), 'float32')\n"
        "for backend in ('numpy', 'numba'):\n"
        "    corr_warp(x, x, x, backend=backend)\n"
        "    stages.append(sorted({'torch', 'numba', 'triton'} & set(sys.modules)))\n"
        "print(json.dumps(stages))"
    )
    assert loaded == [[], [], ["numba"]]


def test_numba_without_a_cache_folder():
    found = python(
        "import json, numpy as np\n"
        "from numba.core import caching\n"
        "caching.CompileResultCacheImpl._locator_classes = []  # as where no folder can be written\n"
        "from flashcocos.kernels.cpu.numba_warp import pack_queries, warp_task\n"  # to compile the others takes long
        "x, packed, sums = np.ones((2, 3, 3), 'float32'), np.zeros((3, 3, 2), 'float32'), np.zeros((2, 3, 3))\n"
        "pack_queries(x, packed, *sums, 0, 3, 0)\n"
        "print(json.dumps([sums.sum(), type(pack_queries._cache).__name__, type(warp_task._cache).__name__]))"
    )
    assert found == [36, "NullCache", "NullCache"]


MEMORY = """
import json, re, numpy as np
{setup}
def status(field):  # not ru_maxrss, which starts from the parent's
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
rng = np.random.default_rng(0)
def maps(side, channels):
    return rng.standard_normal((1, channels, side, side), dtype=np.float32)
run(maps(16, 256), maps(16, 256), maps(16, 3))  # libraries and compiled code
inputs = [maps({side}, 256), maps({side}, 256), maps({side}, 3)]
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
run(*inputs)
print(json.dumps(status("VmHWM") - before))
"""
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@LINUX
@pytest.mark.parametrize(("backend", "side"), [("numba", 128), ("numpy", 96)])
def test_memory_of_the_forward(backend, side):
    setup = f"from flashcocos.kernels import corr_warp\ndef run(*x): return corr_warp(*x, backend={backend!r})"
    extra = python(MEMORY.format(setup=setup, side=side))
    assert 16 < extra <= 64  # MiB; at 128 theta and phi are 16 each, and the matrix would be 1024


@LINUX
def test_memory_of_the_backward():
    side = 64
    setup = (
        "import torch\nfrom flashcocos.kernels import corr_warp\n"
        "torch.set_num_threads(1)\n"  # perhaps a busy machine: threads would wait for each other
        "def run(*x):\n"
        "    leaves = [torch.from_numpy(y).requires_grad_() for y in x]\n"
        "    corr_warp(*leaves, backend='numba').sum().backward()\n"
    )
    features = 2 * 256 * side * side * 4 / 2**20  # MiB of theta and phi: 8; the matrix would be 64
    extra = python(MEMORY.format(setup=setup, side=side)) - features  # beside the gradients
    assert features < extra <= 4 * features
