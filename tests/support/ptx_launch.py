"""Execute compiled Triton kernels where the project launches them, with the machine of `ptx_machine.py` for a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
import torch
from ptx_compiler import compile_kernel
from ptx_machine import Machine

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64"}
TYPES |= {int: "i32", float: "fp32", type(None): "constexpr"}


class Launcher:
    """Executes kernels of compute capability `sm`. changes: of the PTX, by the kernel's name, before it is executed.

    launches: what was executed, by whose name. memory: uint8 arrays by name, in which a kernel's pointers lie.
    """

    def __init__(self, compiler: Executor, sm: int, changes: Mapping[str, Callable[[str], str]] | None = None) -> None:
        self.compiler, self.sm, self.changes = compiler, sm, changes or {}
        self.launches: list[tuple[str, Machine]] = []
        self.memory: dict[str, np.ndarray] = {}

    def patch(self, monkeypatch: Any, triton_warp: Any, multiprocessors: int) -> None:
        """Let the module `triton_warp` launch its kernels here, as on a GPU of so many multiprocessors."""
        monkeypatch.setattr(triton_warp, "INTERPRETED", True)  # it then takes tensors of the CPU
        launch = lambda kernel, grid: functools.partial(self._launch, kernel, grid)  # noqa: E731
        monkeypatch.setattr(type(triton_warp.forward_kernel), "__getitem__", launch)
        monkeypatch.setattr(triton_warp, "_capability", lambda _: self.sm)
        monkeypatch.setattr(triton_warp, "_multiprocessors", lambda _: multiprocessors)

    def load(self, code: bytes, entry: str, formats: str, threads: int, shared_bytes: int) -> Callable[..., None]:
        """`Device.load`: a function of the grid and the arguments."""
        name = entry.removesuffix("_kernel")

        def launch(grid: tuple[int, int, int], arguments: Sequence[float]) -> None:
            machine = Machine(self.changes.get(name, str)(code.decode()), threads, shared_bytes)
            machine.run(grid, arguments, self.memory)
            self.launches.append((name, machine))

        return launch

    def _launch(self, kernel: Any, grid: tuple[int, ...], *positional: Any, **named: Any) -> None:
        """`kernel[grid](*positional, **named)`, specialized as Triton does it."""
        options = {option: named.pop(option) for option in ("num_warps", "num_stages", "enable_fp_fusion")}
        values = dict(zip(kernel.arg_names, positional, strict=False)) | named
        types = {}
        for name in kernel.arg_names:
            known = name in named or (isinstance(values[name], int) and values[name] == 1)
            types[name] = "constexpr" if known else TYPES[getattr(values[name], "dtype", type(values[name]))]
        constants = {name: values.pop(name) for name, kind in types.items() if kind == "constexpr"}
        self.memory = {name: memory_of(value) for name, value in values.items() if isinstance(value, torch.Tensor)}
        values |= {name: values[name].data_ptr() for name in self.memory}
        aligned = [name for name, value in values.items() if types[name] != "fp32" and value % 16 == 0]
        where = kernel.fn.__module__, kernel.fn.__name__
        compiled = self.compiler.submit(compile_kernel, where, types, constants, aligned, self.sm, **options)
        ptx, threads, shared_bytes = compiled.result()
        self.load(ptx.encode(), where[1], "", threads, shared_bytes)((*grid, 1, 1)[:3], [*values.values()])


def memory_of(tensor: torch.Tensor) -> np.ndarray:
    """The bytes from the first to the last element, and no more."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach().as_strided((elements,), (1,)).view(torch.uint8).numpy()
