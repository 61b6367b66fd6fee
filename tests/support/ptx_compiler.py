"""A process that compiles Triton kernels to PTX for the tests, whose own process has Triton in interpreter mode.

It reads a request a line and answers with a line, both JSON. ptxas is left out, so a "cubin" is the PTX itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


class Compiler:
    """The process, for as long as a `with` statement lasts. folder: where Triton keeps what it compiled."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "TRITON_CACHE_DIR": str(folder), "TRITON_INTERPRET": "0"}
        command, pipe = [sys.executable, __file__], subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def compile(self, **request: Any) -> dict[str, Any]:
        """ptx, threads, shared_bytes, and how many hidden pointers follow the arguments; see `_compile`."""
        return self._ask({"compile": request})

    def compile_ahead(self, folder: Path, architecture: int, **options: Any) -> None:
        """What `aot.compile_kernels` writes into `folder`, with the PTX for cubins."""
        self._ask({"ahead": {"output": str(folder), "architectures": [architecture], **options}})

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin and self._process.stdout  # noqa: PT018
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the compiler's process ended over {request}"
        return json.loads(answer)


def _compile(
    module: str, name: str, signature: dict[str, str], constants: dict[str, Any], aligned: list[int], sm: int, **options
) -> dict[str, Any]:
    """One kernel with `constants`; aligned: the arguments that are multiples of 16; options: warps and stages."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(getattr(import_module(module), name), signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    assert metadata.global_scratch_size == 0
    hidden = ptx[: ptx.index("{\n")].count(".param") - sum(kind != "constexpr" for kind in signature.values())
    return {"ptx": ptx, "threads": metadata.num_warps * 32, "shared_bytes": metadata.shared, "hidden": hidden}


def _compile_ahead(output: str, **options: Any) -> list[str]:
    from flashcocos.kernels.gpu import aot

    aot._resources = lambda _: (0, 0)  # it would ask cuobjdump
    return [done["kernel"] for done in aot.compile_kernels(Path(output), **options)]


if __name__ == "__main__":
    from triton.backends.nvidia.compiler import CUDABackend

    CUDABackend.make_cubin = lambda self, ptx, metadata, options, capability: ptx.encode()
    for line in sys.stdin:
        ((what, request),) = json.loads(line).items()
        answer = (_compile if what == "compile" else _compile_ahead)(**request)
        print(json.dumps(answer), flush=True)
