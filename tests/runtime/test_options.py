"""`EngineOptions`: what it accepts, refuses and says, and that its lists of choices are the only ones."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flashcocos import EngineOptions, InputError, Translator
from flashcocos.runtime import options as choices
from flashcocos.runtime.gpu import store


def test_every_choice_is_accepted_somewhere() -> None:
    """And each backend's precisions are exactly those that are listed for it."""
    assert set(choices.BACKEND_PRECISIONS) == set(choices.BACKENDS)
    for backend in choices.BACKENDS:
        for precision in choices.PRECISIONS:
            if precision in choices.BACKEND_PRECISIONS[backend]:
                assert EngineOptions(backend=backend, precision=precision).precision == precision
            else:
                with pytest.raises(InputError, match=f"precision '{precision}': backend '{backend}' computes in"):
                    EngineOptions(backend=backend, precision=precision)
    for device in choices.DEVICES:
        EngineOptions(device=device)
    for warp in choices.WARPS:
        EngineOptions(warp=warp)
    assert choices.BACKEND_PRECISIONS["tensorrt"] == store.PRECISIONS


def test_edges_of_the_ranges() -> None:
    for threads in (1, 256):
        assert EngineOptions(num_threads=threads).num_threads == threads
    assert EngineOptions(exemplar_cache_mib=1, tile=64, engines=Path("engines")).tile == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"backend": "torch"},
            "unknown backend 'torch'; expected one of auto, onnxruntime, openvino, tensorrt, tensorrt-rtx",
        ),
        ({"backend": ["openvino"]}, r"unknown backend \['openvino'\]"),
        ({"device": "gpu"}, "unknown device 'gpu'; expected one of auto, cpu, cuda"),
        ({"warp": "fast"}, "unknown warp 'fast'; expected one of auto, numba, numpy, cuda"),
        ({"precision": "half"}, "unknown precision 'half'; expected one of float32, bfloat16, float16"),
        (
            {"precision": "float16"},
            "computes in float32; TensorRT engines on a GPU have float16: run `flashcocos build`",
        ),
        ({"precision": "bfloat16"}, "computes in float32; backend openvino has bfloat16"),
        ({"engines": 3}, "engines: expected the path of a folder, got 3"),
        ({"backend": "openvino", "device": "cuda"}, "'openvino' is for the CPU; choose backend onnxruntime"),
        ({"backend": "openvino", "warp": "cuda"}, "warp 'cuda': backend 'openvino' is for the CPU; choose warp numba"),
        ({"backend": "tensorrt", "device": "cpu"}, "device 'cpu': backend 'tensorrt' is for a GPU"),
        ({"backend": "tensorrt", "warp": "numpy"}, "warp 'numpy' runs on the CPU, got backend 'tensorrt' on a GPU"),
        (
            {"device": "cuda", "warp": "numba"},
            "warp 'numba' runs on the CPU, .*leave warp out, or .*device cpu",
        ),
        ({"device": "cpu", "warp": "cuda"}, "warp 'cuda' runs on a GPU, got device 'cpu'; choose warp numba"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        EngineOptions(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, 257, 100_000, 2.0, "2", True])
def test_threads_are_bounded(value: Any) -> None:
    with pytest.raises(
        InputError, match="num_threads: expected a whole number from 1 to 256, or None for one per core"
    ):
        EngineOptions(num_threads=value)


@pytest.mark.parametrize("value", [0, -1, 1.5, "64", True])
def test_the_exemplar_cache_is_a_number_of_mebibytes(value: Any) -> None:
    with pytest.raises(InputError, match="exemplar_cache_mib: expected MiB of GPU memory, from 1; got"):
        EngineOptions(exemplar_cache_mib=value)


def test_the_translator_takes_the_same_options() -> None:
    parameters = inspect.signature(Translator).parameters
    fields = {field.name: field.default for field in dataclasses.fields(EngineOptions)}
    assert {name: parameter.default for name, parameter in parameters.items() if name != "bundle"} == fields
    with pytest.raises(TypeError, match="'threads'"):
        Translator(threads=2)  # type: ignore[call-arg]


def test_the_choices_are_read_without_anything_heavy() -> None:
    code = (
        "import sys; from flashcocos.runtime.options import BACKENDS; "
        "print(sorted({'numpy', 'PIL', 'onnxruntime', 'torch', 'numba'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
