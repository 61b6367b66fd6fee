"""Execute compiled Triton kernels where the project launches them, with the machine of `ptx_machine.py` for a GPU."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from ptx_compiler import Compiler
from ptx_machine import Machine

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64"}
KERNELS = ("pack", "statistics", "forward", "nine_tap", "merge", "score_gradient", "fold")
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")

Grid = tuple[int, int, int]
Change = Callable[[str], str]


class Launch(NamedTuple):
    """What was executed, and what the machine noticed."""

    kernel: str
    grid: Grid
    problems: Mapping[str, int]
    instructions: int
    seconds: float


class Launcher:
    """Executes kernels of compute capability `sm`. changes: of the PTX, by the kernel's name, before it is executed.

    memory: uint8 arrays by name, in which the pointers of a kernel compiled ahead of time lie.
    """

    def __init__(self, compiler: Compiler, sm: int, changes: Mapping[str, Change] | None = None) -> None:
        self.compiler, self.sm, self.changes = compiler, sm, changes or {}
        self.launches: list[Launch] = []
        self.memory: dict[str, np.ndarray] = {}

    def patch(self, monkeypatch: Any, triton_warp: Any, multiprocessors: int) -> None:
        """Let the module `triton_warp` launch its kernels here, as on a GPU of so many multiprocessors."""
        for name in KERNELS:
            kernel = getattr(triton_warp, f"{name}_kernel")
            monkeypatch.setattr(triton_warp, f"{name}_kernel", _Kernel(self, name, kernel))
        monkeypatch.setattr(triton_warp, "_capability", lambda _: self.sm)
        monkeypatch.setattr(triton_warp, "_multiprocessors", lambda _: multiprocessors)

    def load(self, code: bytes, entry: str, formats: str, threads: int, shared_bytes: int) -> Callable[..., None]:
        """`Device.load` for the "cubins" of `Compiler.compile_ahead`."""
        name, ptx = entry.removesuffix("_kernel"), code.decode()
        return lambda grid, arguments: self.execute(name, ptx, threads, shared_bytes, grid, arguments, self.memory)

    def execute(
        self,
        name: str,
        ptx: str,
        threads: int,
        shared_bytes: int,
        grid: Grid,
        arguments: Sequence[int | float],
        memory: Mapping[str, np.ndarray],
    ) -> None:
        """One launch."""
        start = time.perf_counter()
        machine = Machine(self.changes.get(name, str)(ptx), threads, shared_bytes)
        machine.run(grid, arguments, memory)
        seconds = time.perf_counter() - start
        self.launches.append(Launch(name, grid, machine.problems, machine.instructions, seconds))


class _Kernel:
    """In place of a kernel: `kernel[grid](*arguments, **constants and options)`, specialized as Triton does it."""

    def __init__(self, launcher: Launcher, name: str, kernel: Any) -> None:
        self.launcher, self.name, self.kernel = launcher, name, kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, (*grid, 1, 1)[:3])

    def _launch(self, grid: Grid, *positional: Any, **named: Any) -> None:
        options = {name: named.pop(name) for name in OPTIONS}
        constants, signature, aligned, memory, arguments = dict(named), {}, [], {}, []
        for i, name in enumerate(self.kernel.arg_names):
            value = named[name] if name in named else positional[i]
            if name in named or value is None or (isinstance(value, int) and value == 1):
                constants[name], signature[name] = value, "constexpr"
                continue
            if isinstance(value, torch.Tensor):
                signature[name], memory[name], value = TYPES[value.dtype], memory_of(value), value.data_ptr()
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                aligned.append(i)
            arguments.append(value)
        function = self.kernel.fn
        compiled = self.launcher.compiler.compile(
            module=function.__module__,
            name=function.__name__,
            signature=signature,
            constants=constants,
            aligned=aligned,
            sm=self.launcher.sm,
            **options,
        )
        arguments += [0] * compiled.pop("hidden")
        self.launcher.execute(self.name, grid=grid, arguments=arguments, memory=memory, **compiled)


def memory_of(array: torch.Tensor | np.ndarray) -> np.ndarray:
    """The bytes from the first to the last element, and no more."""
    if isinstance(array, torch.Tensor):
        elements = 1 + sum((size - 1) * stride for size, stride in zip(array.shape, array.stride(), strict=True))
        pointer, size = array.data_ptr(), elements * array.element_size()
    else:
        pointer, size = array.ctypes.data, array.nbytes
    return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_uint8)), (size,))
