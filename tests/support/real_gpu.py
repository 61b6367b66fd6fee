"""The machine's own GPU, for tests that skip without one: never run so far."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_gpu import DYNAMIC
from fake_tensorrt import profile

from flashcocos.errors import BackendError
from flashcocos.runtime import Translator
from flashcocos.runtime.cpu.onnxruntime import has_provider
from flashcocos.runtime.gpu.device import Device
from flashcocos.runtime.gpu.store import default_folder
from flashcocos.runtime.options import VARIANTS


def require_gpu() -> Device:
    """The GPU; skips with the reason where it cannot be used."""
    try:
        return Device()
    except BackendError as error:
        pytest.skip(f"needs a GPU: {error}")


def compile_kernels(bundle: Path, capability: int) -> Path:
    """The folder of the bundle's float32 kernels, by the real compiler in a process of its own."""
    pytest.importorskip("triton", reason="compiling the kernels needs the triton package")
    code = (
        "import sys; from pathlib import Path; from flashcocos.export.tensorrt.build import build_kernels; "
        "build_kernels(sys.argv[1], Path(sys.argv[2]), [int(sys.argv[3])], 'float32')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folder = default_folder(bundle)
    subprocess.run([sys.executable, "-c", code, bundle, folder, str(capability)], check=True, env=environment)
    return folder / "kernels"


def real_translator(bundle: Path, backend: str, *, tile: int | None = None) -> Translator:
    """`bundle` on the GPU by `backend`, in tiles of `tile`, all built here; skips where it is not installed."""
    device = require_gpu()
    capability = device.capability
    device.close()
    if backend == "onnxruntime":
        if not has_provider("cuda"):
            pytest.skip("needs onnxruntime-gpu")
        compile_kernels(bundle, capability)
        return Translator(bundle, device="cuda", precision="float32", tile=tile)
    if importlib.util.find_spec(backend.replace("-", "_")) is None:
        pytest.skip(f"needs the extra {VARIANTS[backend]}")
    from flashcocos.export.tensorrt.build import build

    list(build(bundle, targets=[capability], precision="float32", variant=backend, profiles=[profile(), DYNAMIC]))
    compile_kernels(bundle, capability)
    return Translator(bundle, backend=backend, tile=tile)
