"""Where the Triton kernels run in this folder: on the GPU if there is one, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so it is set before any test module loads


@pytest.fixture(scope="session")
def device() -> str:
    pytest.importorskip("triton", reason="the Triton kernels need the triton package, which this platform has not")
    if torch.cuda.is_available():
        return "cuda"
    from flashcocos.kernels import triton_warp

    assert triton_warp.INTERPRETED, "triton was imported before tests/kernels/conftest.py could set TRITON_INTERPRET"
    return "cpu"
