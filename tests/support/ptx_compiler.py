"""Compile Triton kernels to PTX for the tests, in a process of its own: theirs has Triton in interpreter mode."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any


def start(folder: Path) -> ProcessPoolExecutor:
    """The process; submit it the functions below. folder: where Triton keeps what it compiled."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare, (str(folder),))


def compile_kernel(
    kernel: tuple[str, str],
    types: dict[str, str],
    constants: dict[str, Any],
    aligned: list[str],
    sm: int,
    **options: Any,
) -> tuple[str, int, int]:
    """The PTX of a module's kernel, and how many threads and bytes of shared memory it takes.

    types: of the arguments, by name; aligned: those that are multiples of 16; options: warps and stages.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes = {(list(types).index(argument),): [["tt.divisibility", 16]] for argument in aligned}
    source = ASTSource(getattr(import_module(kernel[0]), kernel[1]), types, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    return compiled.asm["ptx"], compiled.metadata.num_warps * 32, compiled.metadata.shared


def compile_ahead(folder: Path, architecture: int, **options: Any) -> None:
    """What `aot.compile_kernels` writes into `folder`, with the PTX for cubins."""
    from flashcocos.kernels.gpu import aot

    aot._resources = lambda _: (0, 0)  # it would ask cuobjdump
    list(aot.compile_kernels(folder, [architecture], **options))


def _prepare(folder: str) -> None:
    """Leave ptxas out, so that a "cubin" is the PTX itself."""
    os.environ.update(TRITON_CACHE_DIR=folder, TRITON_INTERPRET="0")
    from triton.backends.nvidia.compiler import CUDABackend

    CUDABackend.make_cubin = lambda self, ptx, metadata, options, capability: ptx.encode()
