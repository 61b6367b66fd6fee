"""An onnxruntime that claims CUDA: its sessions run on the CPU, on a fake device's memory and after its queue."""

from __future__ import annotations

from typing import Any

import onnxruntime
from fake_cuda import FakeCuda


class FakeCudaRuntime:
    """The module; `starts` is whether CUDA does, else it falls back to the CPU as the real one."""

    SessionOptions, RunOptions = onnxruntime.SessionOptions, onnxruntime.RunOptions
    __version__ = "0-fake"

    def __init__(self, device: FakeCuda | None = None, starts: bool = True) -> None:
        self.device, self.starts, self.options, self.preloaded = device, starts, [], 0

    def preload_dlls(self) -> None:
        self.preloaded += 1

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def InferenceSession(self, model: bytes, options: Any, providers: list[Any], enable_fallback: int) -> Any:
        name, chosen = providers[0] if isinstance(providers[0], tuple) else (providers[0], {})
        self.options.append(chosen)
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return FakeCudaSession(session, self.device, name if self.starts else "CPUExecutionProvider")


class FakeCudaSession:
    def __init__(self, session: Any, device: FakeCuda | None, provider: str) -> None:
        self._session, self._device, self._provider = session, device, provider
        self.get_inputs, self.get_outputs, self.run = session.get_inputs, session.get_outputs, session.run

    def get_providers(self) -> list[str]:
        return [self._provider]

    def io_binding(self) -> FakeBinding:
        return FakeBinding(self._session.io_binding())

    def run_with_iobinding(self, binding: FakeBinding, options: Any) -> None:
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        assert not self._device.capturing, "its graphs cannot be captured"
        self._device.flush()
        self._session.run_with_iobinding(binding.real)


class FakeBinding:
    def __init__(self, real: Any) -> None:
        self.real = real

    def bind_input(self, *arguments: Any) -> None:
        self._bind(self.real.bind_input, *arguments)

    def bind_output(self, *arguments: Any) -> None:
        self._bind(self.real.bind_output, *arguments)

    def _bind(self, bind: Any, name: str, kind: str, ordinal: int, *where: Any) -> None:
        assert (kind, ordinal) == ("cuda", 0)
        bind(name, "cpu", 0, *where)
