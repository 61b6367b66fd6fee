"""`EngineOptions`: what runs a model, where, and in which arithmetic. The lists of choices are here, and only here.

The command line reads these lists for its help, so that this file imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import os

from ..config import MIN_SIDE, SIZE_MULTIPLE, is_side
from ..errors import InputError

VARIANTS = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}  # backends on TensorRT -> the extra that installs them
# those that run on a CPU, the fastest in float32 first: full-size ade20k at 256 px took 4.75 s and 5.96 s on an AMD
# EPYC with AVX2, 2.27 s and 2.61 s on an Intel Xeon with AVX-512, 2 cores each; onnxruntime also runs on a GPU
CPU_BACKENDS = ("onnxruntime", "openvino")
BACKENDS = ("auto", *CPU_BACKENDS, *VARIANTS)
DEVICES = ("auto", "cpu", "cuda")
CPU_WARPS = ("numba", "numpy")
WARPS = ("auto", *CPU_WARPS, "cuda")
PRECISIONS = ("float32", "bfloat16", "float16")
BACKEND_PRECISIONS = {
    "auto": ("float32",),
    "onnxruntime": ("float32",),
    "openvino": ("float32", "bfloat16"),
    **dict.fromkeys(VARIANTS, ("float32", "float16")),
}
_PRECISION_OWNERS = {
    "float16": "TensorRT engines on a GPU have float16: run `flashcocos build`, then choose backend tensorrt-rtx",
    "bfloat16": "backend openvino has bfloat16, on CPUs with AVX-512 BF16 or AMX",
}
EXEMPLAR_CACHE_MIB = 512  # unless an option says otherwise
MAX_THREADS = 256  # each is a thread of the operating system, and tens of thousands bring a machine down


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """What runs a model: the keyword arguments of `Translator`, checked, to hand on as one object.

    `Translator(bundle, **vars(options))` opens a bundle with them.

    Args:
        backend: "auto": the fastest in float32 that is installed, which is logged where there was a choice. Or
            "onnxruntime", "openvino" (CPU only), or on a GPU "tensorrt" or "tensorrt-rtx", whose engines
            `flashcocos build` makes.
        device: "cpu", "cuda", or "auto": CUDA where it starts, else the CPU; the choice is logged.
        precision: "float32", "bfloat16" (openvino, on a CPU that has it) or "float16" (TensorRT). None: float32 on a
            CPU, tf32 or float32 in ONNX Runtime on a GPU, and the fastest that was built with TensorRT.
        warp: "numba" or "numpy" on the CPU, "cuda" on the GPU, or "auto": where the graphs run, and on the CPU numba
            where it is installed. On a GPU nothing leaves it between label and picture.
        num_threads: CPU threads of each graph, 1 to 256; None for one per core. The warp's threads are set by
            `NUMBA_NUM_THREADS`.
        engines: folder of the TensorRT engines and compiled kernels that `flashcocos build` wrote; None for the one
            beside the bundle, NAME.engines.
        exemplar_cache_mib: MiB of GPU memory for encoded exemplars; None for 512.
        tile: side in pixels, a multiple of 32 from 64, of the tiles in which the second half of the synthesis makes
            larger pictures: less memory, the same picture, some work twice. None makes pictures whole.

    Raises:
        InputError: an option is unknown or out of range, or two of them exclude each other.
    """

    backend: str = "auto"
    device: str = "auto"
    precision: str | None = None
    warp: str = "auto"
    num_threads: int | None = None
    engines: str | os.PathLike[str] | None = None
    exemplar_cache_mib: int | None = None
    tile: int | None = None

    def __post_init__(self) -> None:
        _check_choice("backend", self.backend, BACKENDS)
        _check_choice("device", self.device, DEVICES)
        _check_choice("warp", self.warp, WARPS)
        if self.precision is not None:
            _check_choice("precision", self.precision, PRECISIONS)
        threads, cache = self.num_threads, self.exemplar_cache_mib
        if threads is not None and (type(threads) is not int or not 1 <= threads <= MAX_THREADS):
            raise InputError(
                f"num_threads: expected a whole number from 1 to {MAX_THREADS}, or None for one per core; "
                f"got {threads!r}"
            )
        if self.engines is not None and not isinstance(self.engines, str | os.PathLike):
            raise InputError(f"engines: expected the path of a folder, got {self.engines!r}")
        if cache is not None and (type(cache) is not int or cache < 1):
            raise InputError(f"exemplar_cache_mib: expected MiB of GPU memory, from 1; got {cache!r}")
        check_tile(self.tile)
        self._check_combination()

    def _check_combination(self) -> None:
        known = BACKEND_PRECISIONS[self.backend]
        if self.precision is not None and self.precision not in known:
            raise InputError(
                f"precision {self.precision!r}: backend {self.backend!r} computes in {' or '.join(known)}; "
                f"{_PRECISION_OWNERS[self.precision]}"
            )
        if self.backend == "openvino" and self.device == "cuda":
            raise InputError("device 'cuda': backend 'openvino' is for the CPU; choose backend onnxruntime")
        if self.backend == "openvino" and self.warp == "cuda":
            raise InputError(
                "warp 'cuda': backend 'openvino' is for the CPU; choose warp numba, or backend onnxruntime"
            )
        if self.backend in VARIANTS and self.device == "cpu":
            raise InputError(f"device 'cpu': backend {self.backend!r} is for a GPU; choose backend onnxruntime")
        if self.warp in CPU_WARPS and (self.backend in VARIANTS or self.device == "cuda"):
            raise InputError(
                f"warp {self.warp!r} runs on the CPU, got backend {self.backend!r} on a GPU, where the warp runs, too; "
                "leave warp out, or choose backend onnxruntime on device cpu"
            )
        if self.device == "cpu" and self.warp == "cuda":
            raise InputError("warp 'cuda' runs on a GPU, got device 'cpu'; choose warp numba, or leave device out")


def check_tile(tile: object) -> None:
    """Raise `InputError` unless `tile` is None or the side of a tile in pixels."""
    if tile is not None and not is_side(tile):
        raise InputError(
            f"tile: expected a side in pixels, a multiple of {SIZE_MULTIPLE} from {MIN_SIDE}, or None; got {tile!r}"
        )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"unknown {name} {value!r}; expected one of {', '.join(choices)}")
