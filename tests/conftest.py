"""Fixtures shared by all tests: where the reference material lies, and a seeded generator."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

# what `make test-fast` leaves out; these files start first, longest first, so that no process is left alone at the end.
# export/test_graphs.py is earlier still: it makes the exports, and a file that needs one meanwhile would wait for it
SLOW = (
    "train/test_loss_parity.py",
    "export/test_graphs.py",
    "train/test_parity.py",
    "kernels/gpu/test_aot.py",
    "train/test_memory_estimate.py",
    "runtime/test_contract.py",
    "serve/test_server.py",
    "train/test_trainer.py",
    "export/tensorrt/test_int8.py",
    "kernels/gpu/test_executed.py",
    "kernels/gpu/test_triton.py",
    "export/tensorrt/test_build.py",
    "runtime/gpu/test_pipeline.py",
    "benchmarks/test_cases.py",
    "kernels/gpu/test_triton_nine_tap.py",
    "kernels/test_corr_warp.py",
    "serve/test_page.py",
    "kernels/cpu/test_cpu.py",
    "export/test_quantize.py",
    "train/test_distributed.py",
    "kernels/test_op.py",
    "export/test_triton_live.py",
    "export/test_verify.py",
    "export/tensorrt/test_graphs.py",
    "export/test_single.py",
    "runtime/test_end_to_end.py",
    "bundle/test_model_file.py",
    "export/test_bundle.py",
    "export/test_bundle_kernels.py",
    "export/test_inference.py",
    "bundle/test_default_model.py",
    "benchmarks/quality/test_evaluate.py",
    "runtime/test_tiles.py",
    "train/test_avatars.py",
    "benchmarks/test_gpu.py",
    "benchmarks/test_runner.py",
    "benchmarks/speed/test_bundle.py",
    "test_wheel.py",
)

if not torch.cuda.is_available():
    # Triton reads it as it is imported, and any module of any test folder may import it
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    """A folder that the worker processes of one run share; the first process makes and removes it."""
    if not hasattr(config, "workerinput"):
        folder = os.environ["FLASHCOCOS_TEST_FOLDER"] = tempfile.mkdtemp(prefix="flashcocos-tests-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the files of `SLOW` and put them first."""
    tests = Path(__file__).parent
    places = {tests / name: place for place, name in enumerate(SLOW)}
    if missing := [str(path) for path in places if not path.is_file()]:
        raise pytest.UsageError(f"SLOW in tests/conftest.py names files that are not there: {', '.join(missing)}")
    for item in items:
        if item.path in places:
            item.add_marker("slow")
        if hasattr(item.config, "workerinput") and item.get_closest_marker("cluster"):
            item.add_marker(pytest.mark.skip("runs in a process of its own: make test-cluster"))
    items.sort(key=lambda item: places.get(item.path, len(SLOW)))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference material beside the checkout; tests that need it skip where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the reference material ../shared (sample pictures under research licenses)")
    return folder


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
