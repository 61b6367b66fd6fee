"""Denormal numbers are zero while ONNX Runtime works, in all of its threads, and nowhere else."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np
import pytest
from onnx import ModelProto, numpy_helper
from tiny_bundle import CLASSES, random_label, random_picture, write_tiny_bundle

from flashcocos.bundle import Bundle
from flashcocos.runtime import Translator
from flashcocos.runtime.cpu import denormals
from flashcocos.runtime.cpu.denormals import denormals_as_zero
from flashcocos.runtime.cpu.onnxruntime import OnnxRuntimeEngine

DENORMAL = np.float32(1e-39)
ONE_AT_A_TIME = threading.Lock()  # not every threading layer of numba bears two threads that start a loop
needs_setting = pytest.mark.skipif(denormals._library() is None, reason="knows the setting of x86-64 Linux only")


@numba.njit(parallel=True)
def halves(numbers: np.ndarray) -> np.ndarray:
    result = np.empty_like(numbers)
    for index in numba.prange(len(numbers)):
        result[index] = numbers[index] * np.float32(0.5)
    return result


def kept() -> bool:
    """Whether a denormal number's half is not 0, in numpy and in each thread of numba."""
    numbers = np.full(1000, DENORMAL)
    with ONE_AT_A_TIME:
        return bool((numbers * np.float32(0.5)).all() and halves(numbers).all())


def scale_weights(stage: str, model: ModelProto) -> None:
    """The query's weights become denormal numbers."""
    if stage == "query":
        (weights,) = (tensor for tensor in model.graph.initializer if tensor.name == "w")
        weights.CopyFrom(numpy_helper.from_array(np.full(tuple(weights.dims), DENORMAL), "w"))


@needs_setting
def test_they_are_zero_in_all_threads_of_a_session(tmp_path: Path) -> None:
    bundle = Bundle(write_tiny_bundle(tmp_path / "b", change=scale_weights))
    label = {"label": random_label(CLASSES, 512, 512)[None]}
    for threads in (1, 2):
        assert not OnnxRuntimeEngine(bundle, "query", num_threads=threads).run(label)["theta"].any()
    # alone in this thread, where the session sets nothing
    assert OnnxRuntimeEngine(bundle, "query", num_threads=1)._graph.run(["theta"], label)[0].any()


@needs_setting
def test_the_setting_ends_with_its_block() -> None:
    with pytest.raises(ZeroDivisionError), denormals_as_zero():
        assert not (np.full(8, DENORMAL) * np.float32(0.5)).any()
        raise ZeroDivisionError
    assert kept()


def test_no_thread_keeps_the_setting(tmp_path: Path) -> None:
    """Neither one that makes a translator, nor one that runs it, nor one that begins afterwards."""
    work = Translator(write_tiny_bundle(tmp_path / "b"), warp="numba", num_threads=2)
    label = random_label(CLASSES, 64, 64)

    def translate() -> bool:
        work.translate(label, work.encode_exemplar(random_picture(64, 64), label))
        return kept()

    def make() -> bool:
        Translator(tmp_path / "b", warp="numba", num_threads=1).close()
        return kept()

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(_called, [translate, make] * 3))
    assert translate()
    assert make()
    found: list[bool] = []
    late = threading.Thread(target=lambda: found.append(kept()))
    late.start()
    late.join()
    assert found == [True]


def _called(function: Callable[[], bool]) -> bool:
    return function()


@needs_setting
def test_onnxruntime_leaves_the_setting_on_when_nobody_prevents_it(tmp_path: Path) -> None:
    """Why sessions are made in threads of their own."""
    write_tiny_bundle(tmp_path / "b")
    code = (
        "import numpy as np, onnxruntime, sys; options = onnxruntime.SessionOptions(); "
        "options.add_session_config_entry('session.set_denormal_as_zero', '1'); "
        "session = onnxruntime.InferenceSession(sys.argv[1], options, providers=['CPUExecutionProvider']); "
        "print((np.full(8, 1e-39, np.float32) * np.float32(0.5)).any())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "b" / "query.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    if done.stdout.strip() == "True":
        pytest.skip("this onnxruntime does not leave it on")
    assert done.stdout.strip() == "False"
