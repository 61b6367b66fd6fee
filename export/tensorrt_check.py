"""How near the graphs that TensorRT is given stay to the bundle's own: both run on the CPU, end to end, before a build.

ONNX Runtime rounds what is declared float16 as TensorRT does, if not in the same order, so what float16 costs is known
on a machine without a GPU. The picture that leaves is compared: PSNR over the 256 levels of uint8.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from ..bundle import Bundle
from ..errors import BackendError
from ..preprocess.images import to_uint8
from ..runtime.engine import OnnxRuntimeEngine
from .tensorrt_graphs import bundle_graph
from .verify import random_inputs, run_stages

# dB; measured with float16: 59 on full-size ade20k with seeded weights at 256 px, 65 on avatars-128 at 128 px
MIN_PSNR = {"float32": 75.0, "float16": 45.0}


def agreement(bundle: Bundle, precision: str, size: int) -> float:
    """PSNR in dB of a translation of seeded random inputs, `size` pixels a side, against the bundle's own graphs.

    Infinite where no level differs. Raises `BackendError` where the graphs give NaN in this precision.
    """
    config = bundle.manifest.config
    inputs = random_inputs(config, (size, size), 1)

    expected = run_stages(config, lambda stage, feeds: OnnxRuntimeEngine(bundle, stage).run(feeds), inputs)
    found = run_stages(config, lambda stage, feeds: _run(bundle, stage, precision, feeds), inputs)
    if found["invalid"]:
        raise BackendError(f"{bundle.path}: gives NaN in {precision}: its weights overflow; use precision float32")
    difference = found["image"][0].astype(np.float64) - to_uint8(expected["image"][0])
    mean_square = float(np.mean(np.square(difference)))
    return 10 * math.log10(255**2 / mean_square) if mean_square else math.inf


def require_agreement(bundle: Bundle, precision: str, size: int) -> float:
    """`agreement`, or `BackendError` where it is below `MIN_PSNR`."""
    found = agreement(bundle, precision, size)
    if found < MIN_PSNR[precision]:
        raise BackendError(
            f"{bundle.path}: {precision} gives {found:.1f} dB against the bundle's own graphs at {size} px, "
            f"expected {MIN_PSNR[precision]:g} or more; use precision float32"
        )
    return found


def _run(bundle: Bundle, stage: str, precision: str, feeds: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    graph = bundle_graph(bundle, stage, precision).SerializeToString()
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))
