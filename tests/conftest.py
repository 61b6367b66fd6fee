"""Fixtures shared by all tests: where the reference material lies, and a seeded generator."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it as it is imported, and any module of any test folder may import it
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    """A folder that the worker processes of one run share; the first process makes and removes it."""
    if not hasattr(config, "workerinput"):
        folder = os.environ["FLASHCOCOS_TEST_FOLDER"] = tempfile.mkdtemp(prefix="flashcocos-tests-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


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
