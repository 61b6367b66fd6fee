"""Execute compiled Triton kernels where the project launches them, with the machine of `ptx_machine.py` for a GPU."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ptx_compiler import Compiler
from ptx_machine import Machine

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64"}
KERNELS = ("pack", "statistics", "forward", "nine_tap", "merge", "score_gradient", "fold")
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")

Grid = tuple[int, int, int]
Change = Callable[[str], str]


class Launcher:
    """Executes kernels of compute capability `sm`. changes: of the PTX, by the kernel's name, before it is executed.

    launches: what was executed, by whose name. memory: uint8 arrays by name, in which the pointers of a kernel compiled
    ahead of time lie.
    """

    def __init__(self, compiler: Compiler, sm: int, changes: Mapping[str, Change] | None = None) -> None:
        self.compiler, self.sm, self.changes = compiler, sm, changes or {}
        self.launches: list[tuple[str, Machine]] = []
        self.memory: dict[str, np.ndarray] = {}

    def patch(self, monkeypatch: Any, triton_warp: Any, multiprocessors: int) -> None:
        """Let the module `triton_warp` launch its kernels here, as on a GPU of so many multiprocessors."""
        monkeypatch.setattr(triton_warp, "INTERPRETED", True)  # it then takes tensors of the CPU
        for name in KERNELS:
            launch = functools.partial(self._launch, name, getattr(triton_warp, f"{name}_kernel"))
            monkeypatch.setattr(triton_warp, f"{name}_kernel", _Kernel(launch))
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            monkeypatch.setattr(owner, name, _garbage(getattr(owner, name)))
        monkeypatch.setattr(triton_warp, "_capability", lambda _: self.sm)
        monkeypatch.setattr(triton_warp, "_multiprocessors", lambda _: multiprocessors)

    def load(self, code: bytes, entry: str, formats: str, threads: int, shared_bytes: int) -> Callable[..., None]:
        """`Device.load` for the "cubins" of `Compiler.compile_ahead`."""
        name = entry.removesuffix("_kernel")
        return lambda grid, arguments: self._execute(
            name, grid, arguments, self.memory, code.decode(), threads, shared_bytes
        )

    def _execute(
        self,
        name: str,
        grid: Grid,
        arguments: Sequence[float],
        memory: Mapping[str, np.ndarray],
        ptx: str,
        threads: int,
        shared_bytes: int,
    ) -> None:
        machine = Machine(self.changes.get(name, str)(ptx), threads, shared_bytes)
        machine.run(grid, arguments, memory)
        self.launches.append((name, machine))

    def _launch(self, name: str, kernel: Any, grid: tuple[int, ...], *positional: Any, **named: Any) -> None:
        """`kernel[grid](*positional, **named)`, specialized as Triton does it."""
        options = {option: named.pop(option) for option in OPTIONS}
        constants, signature, aligned, memory, arguments = dict(named), {}, [], {}, []
        for i, argument in enumerate(kernel.arg_names):
            value = named[argument] if argument in named else positional[i]
            if argument in named or value is None or (isinstance(value, int) and value == 1):
                constants[argument], signature[argument] = value, "constexpr"
                continue
            signature[argument] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, torch.Tensor):
                signature[argument], memory[argument] = TYPES[value.dtype], memory_of(value)
                value = value.data_ptr()
            if isinstance(value, int) and value % 16 == 0:
                aligned.append(i)
            arguments.append(value)
        where = {"module": kernel.fn.__module__, "name": kernel.fn.__name__, "sm": self.sm}
        compiled = self.compiler.compile(**where, signature=signature, constants=constants, aligned=aligned, **options)
        arguments += [0] * compiled.pop("hidden")
        self._execute(name, (*grid, 1, 1)[:3], arguments, memory, **compiled)


class _Kernel:
    """In place of a kernel: `kernel[grid](...)` is `launch(grid, ...)`."""

    def __init__(self, launch: Callable[..., None]) -> None:
        self.launch = launch

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self.launch, grid)


def _garbage(empty: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Like `empty`, with NaN in what it gives, so that what no kernel writes is seen."""

    def make(*arguments: Any, **options: Any) -> torch.Tensor:
        tensor = empty(*arguments, **options)
        memory_of(tensor)[:] = 0xFF
        return tensor

    return make


def memory_of(array: torch.Tensor | np.ndarray) -> np.ndarray:
    """The bytes from the first to the last element, and no more."""
    if isinstance(array, torch.Tensor):
        elements = 1 + sum((size - 1) * stride for size, stride in zip(array.shape, array.stride(), strict=True))
        pointer, size = array.data_ptr(), elements * array.element_size()
    else:
        pointer, size = array.ctypes.data, array.nbytes
    return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_uint8)), (size,))
