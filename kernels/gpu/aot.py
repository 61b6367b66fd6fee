"""Compile the Triton forward ahead of time, without a GPU: a cubin and a JSON description per kernel and architecture.

`kernels/signatures.py` says what a torch-free runtime launches, and with which arguments and grids. The warp is
`nine_tap_kernel` where `configs.nine_tap_blocks` chooses it for walks that are not split over the keys, with smaller
bands of queries for it, else `forward_kernel`. Strides and sizes are in elements. Shared memory is dynamic: from 48 KiB
on the function's limit has to be raised first. `cuda` in a description is the version of the ptxas that made the cubin,
which a driver for an older major version of CUDA refuses.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import BackendError, InputError
from ...files import atomic_path
from .. import signatures
from . import configs

TARGETS = tuple(sorted((*configs.ARCHITECTURES, *configs.OTHER_TARGETS)))


@dataclasses.dataclass(frozen=True)
class _Job:
    """One kernel to compile. types: of the arguments that are not constants."""

    name: str
    kernel: Any
    blocks: configs.BlockSizes
    types: dict[str, str]
    constants: dict[str, Any]


def compile_kernels(
    output: Path,
    architectures: Sequence[int] = tuple(configs.ARCHITECTURES),
    *,
    values: Sequence[int] = (3, 48),
    patch: int = 3,
    channels: int = 256,
    dtypes: Sequence[str] = ("float16",),
) -> Iterator[dict[str, Any]]:
    """Compile, write `<name>.cubin` and `<name>.json` into `output`, and yield each description once it is written.

    architectures: of `TARGETS`; values: V of each warp, 1 to 256; patch: 1, 3 or 5; channels: C; dtypes: of `ELEMENTS`.
    Raises `InputError` for another architecture or one without a dtype, `BackendError` where Triton is missing or
    interpreted, or where a kernel needs more shared memory than its architecture has.
    """
    for sm in architectures:
        if sm not in TARGETS:
            raise InputError(
                f"architecture {sm} is not one of {', '.join(map(str, TARGETS))}; below 90, cubins also run on later "
                "chips of the same major version"
            )
    jobs = []
    for sm in architectures:
        for dtype in dtypes:
            if dtype == "bfloat16" and not configs.architecture(sm).bfloat16:
                raise InputError(f"architecture {sm} has no bfloat16; use float16 or float32")
            jobs += [(sm, dtype, job) for job in _jobs(sm, dtype, values, patch, channels)]
    for sm, dtype, job in jobs:
        yield _compile(output, sm, dtype, job)


def _jobs(sm: int, dtype: str, values: Sequence[int], patch: int, channels: int) -> Iterator[_Job]:
    try:
        import triton
    except ModuleNotFoundError as error:
        raise BackendError("compiling the kernels needs the triton package: pip install triton") from error
    from .triton_kernels import forward_kernel, pack_kernel, statistics_kernel
    from .triton_nine_tap import nine_tap_kernel

    if not isinstance(forward_kernel, triton.JITFunction):
        raise BackendError("TRITON_INTERPRET is set, so Triton interprets and cannot compile; unset it")
    types = {name: signatures.arguments(name, dtype) for name in signatures.KERNELS}
    blocks, feature = configs.PACK, f"p{patch}_c{channels}"
    constants: dict[str, int | None] = {"BN": blocks.queries, "BC": blocks.channels}
    yield _Job(f"pack_{dtype}", pack_kernel, blocks, types["pack"], constants)
    blocks = configs.STATISTICS
    constants = {"C": channels, "PATCH": patch, "BN": blocks.queries, "BC": blocks.channels}
    yield _Job(f"statistics_{feature}_{dtype}", statistics_kernel, blocks, types["statistics"], constants)
    itemsize = 4 if dtype == "float32" else 2
    # of unknown size, and taken to have less than 2^31 elements
    nine_tap = configs.nine_tap_blocks(sm, itemsize, patch, channels, 0, split=False)
    for count in values:
        blocks = nine_tap or configs.forward_blocks(sm, itemsize, count, match=True)
        kernel, band = (nine_tap_kernel, configs.WHOLE_BAND) if nine_tap else (forward_kernel, None)
        constants = {"lse": None, **configs.warp_constants(patch, channels, count, blocks, band)}
        yield _Job(f"warp_{feature}_v{count}_{dtype}", kernel, blocks, types["warp"], constants)


def _compile(output: Path, sm: int, dtype: str, job: _Job) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    names = job.kernel.arg_names
    arguments = [{"name": name, "type": job.types[name]} for name in names if name in job.types]
    signature = {name: job.types.get(name, "constexpr") for name in names}
    # every pointer is the start of an allocation, so wide loads are safe
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    compiled = triton.compile(
        ASTSource(job.kernel, signature, job.constants, aligned),
        target=GPUTarget("cuda", sm, 32),
        options={"num_warps": job.blocks.warps, "num_stages": job.blocks.stages, "enable_fp_fusion": True},
    )
    parameters = re.search(r"\.entry\s+\w+\s*\((.*?)\)", compiled.asm["ptx"], re.DOTALL)
    hidden = (parameters[1].count(".param") if parameters else 0) - len(arguments)
    if not 0 <= hidden <= len(signatures.HIDDEN) or compiled.metadata.global_scratch_size:
        raise BackendError(f"Triton {triton.__version__} passes {hidden} unknown arguments; use 3.6 to 3.9")
    limit = configs.architecture(sm).shared_kib * 1024
    if compiled.metadata.shared > limit:
        raise BackendError(
            f"{job.name} takes {compiled.metadata.shared} bytes of shared memory, sm {sm} has {limit}; "
            "choose smaller blocks in kernels/gpu/configs.py"
        )
    cubin, stem = compiled.asm["cubin"], f"{job.name}_sm{sm}"
    with atomic_path(output / f"{stem}.cubin") as path:
        path.write_bytes(cubin)
        registers, spilled = _resources(path)
    description = {
        "revision": signatures.REVISION,
        "kernel": job.name,
        "cubin": f"{stem}.cubin",
        "sha256": hashlib.sha256(cubin).hexdigest(),
        "architecture": sm,
        "dtype": dtype,
        "entry": compiled.metadata.name,
        "threads": compiled.metadata.num_warps * 32,
        "shared_bytes": compiled.metadata.shared,
        "registers": registers,
        "spilled_bytes": spilled,
        "arguments": arguments + [{"name": name, "type": "null"} for name in signatures.HIDDEN[:hidden]],
        "pointer_alignment": 16,
        "constants": {name: value for name, value in job.constants.items() if value is not None},
        "cuda": get_ptxas(sm).version,
        "triton": triton.__version__,
    }
    with atomic_path(output / f"{stem}.json") as path:
        path.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return description


def _resources(cubin: Path) -> tuple[int, int]:
    """Registers and bytes of stack (spills) a thread of the only function in `cubin`, by Triton's own cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    try:
        report = subprocess.run(
            [tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BackendError(f"{tool} cannot inspect {cubin.name}: {error}; reinstall triton") from error
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    if usage is None:
        raise BackendError(f"{tool} reported no registers for {cubin.name}; its output was {report!r}")
    return int(usage[1]), int(usage[2]) + int(usage[3])
