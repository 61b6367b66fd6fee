"""Where the Triton kernels run in this folder: on a GPU if there is one, else in the interpreter."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    pytest.importorskip("triton", reason="the Triton kernels need the triton package, which this platform has not")
    if torch.cuda.is_available():
        return "cuda"
    from flashcocos.kernels.gpu import triton_warp

    assert triton_warp.INTERPRETED, "triton was imported before tests/conftest.py could set TRITON_INTERPRET"
    return "cpu"


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The forward kernels that were launched since the test began, by name."""
    triton_warp = pytest.importorskip("flashcocos.kernels.gpu.triton_warp")
    names: list[str] = []

    launch = triton_warp._launch

    def spy(*arguments: object) -> None:
        nine_tap = arguments[7]
        names.append("nine_tap" if nine_tap else "straightforward")
        launch(*arguments)

    monkeypatch.setattr(triton_warp, "_launch", spy)
    return names
