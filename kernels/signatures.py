"""The kernels that a runtime without torch launches: their arguments and their grids, once.

In this order, all on one stream:

    pack        theta, phi (padded = C) and values (padded = `padded_values(V)`): (B, C, H, W) -> rows of channels
    statistics  mean and inverse norm of the patches, once for theta and once for phi
    warp        for each query the mean of the values, its most probable key, and that key's probability

The compiler ahead of time, the runtime, the launcher from Python and the tests' twins read these tables. A compiled
kernel's description states `REVISION`; a runtime takes no other, so names and order may change with it.
"""

from __future__ import annotations

from collections.abc import Mapping

REVISION = 2  # 1: warp and match were two kernels, which gave entropy and lse as well
ELEMENTS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
HIDDEN = ("global_scratch", "profile_scratch")  # pointers that Triton appends; these kernels use neither: pass null
QUERY_BAND = "BAND"  # the constant that only `nine_tap_kernel` has

_STRIDES = ("stride_b", "stride_c", "stride_y", "stride_x")
_ARGUMENTS: dict[str, dict[str, str]] = {
    "pack": {
        "source": "*fp32",
        "target": "*element",
        **dict.fromkeys(("width", "positions", "channels", "padded", *_STRIDES), "i32"),
    },
    "statistics": {"packed": "*element", "mean": "*fp32", "inverse": "*fp32", "height": "i32", "width": "i32"},
    "warp": {
        **dict.fromkeys(("theta", "phi", "values"), "*element"),
        **dict.fromkeys(("mu", "a", "nu", "b", "out"), "*fp32"),
        "index": "*i64",
        "probability": "*fp32",
        **dict.fromkeys(("height_q", "width_q", "height_k", "width_k"), "i32"),
        "scale": "fp32",  # log2(e) / temperature
    },
}
KERNELS = tuple(_ARGUMENTS)


def arguments(kernel: str, dtype: str) -> dict[str, str]:
    """name -> type of the arguments of "pack", "statistics" or "warp" in order: "*..." for a pointer, "i32", "fp32".

    dtype: of packed maps and values, a key of `ELEMENTS`.
    """
    return {name: kind.replace("element", ELEMENTS[dtype]) for name, kind in _ARGUMENTS[kernel].items()}


def grid(kernel: str, constants: Mapping[str, int], sizes: Mapping[str, int], batch: int) -> tuple[int, int, int]:
    """Blocks along the three axes. constants: those that the kernel was compiled with; sizes: its integer arguments."""
    queries = constants["BN"]
    if kernel == "pack":
        return blocks(sizes["positions"], queries), blocks(sizes["padded"], constants["BC"]), batch
    if kernel == "statistics":
        return blocks(sizes["height"] * sizes["width"], queries), batch, 1
    height, width = sizes["height_q"], sizes["width_q"]
    if QUERY_BAND in constants:
        return query_tiles(height, width, constants[QUERY_BAND], queries), batch, 1
    return blocks(height * width, queries), batch, 1


def query_tiles(height: int, width: int, band: int, lanes: int) -> int:
    """Tiles of query lanes of `nine_tap_kernel`: a lane is a column of a band; the outermost two only feed others."""
    return blocks(blocks(height, band) * width, lanes - 2)


def padded_values(values: int) -> int:
    """Value channels of a packed row: a multiple of 8, so that float16 rows can be loaded 16 bytes at a time."""
    return -(-values // 8) * 8


def blocks(count: int, size: int) -> int:
    """How many blocks of `size` hold `count`."""
    return -(-count // size)
