"""How close TensorRT's graphs stay to the bundle's own: both run on the CPU, end to end, before a build.

ONNX Runtime rounds what is declared float16 as TensorRT does, if not in the same order, and features are rounded as the
warp's kernels pack them, so what float16 costs is known on a machine without a GPU. The pictures are compared: PSNR
over the 256 levels of uint8.

What int8 costs is no part of it: `flashcocos quantize` has measured that, on pictures of the kind that it was
calibrated for, which random ones are not. Neither form of such a bundle rounds activations to int8 here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from ...bundle import Bundle
from ...bundle.graph_check import refuse_external_data
from ...errors import BackendError
from ...preprocess.images import psnr, to_uint8
from ...runtime.cpu.onnxruntime import OnnxRuntimeEngine
from ..verify import random_inputs, run_stages
from .graphs import bundle_graph
from .int8 import unrounded

Arrays = dict[str, npt.NDArray[Any]]
_PACKED = {"theta", "phi", "values"}  # outputs that the warp reads in the kernels' dtype

# dB; measured with float16: 59 on full-size ade20k with seeded weights at 256 px, 65 on avatars-128 at 128 px; of the
# int8 bundles of both 62 and 67
MIN_PSNR = {"float32": 75.0, "float16": 45.0}


def agreement(bundle: Bundle, precision: str, size: int) -> float:
    """PSNR in dB of a translation of seeded random inputs, `size` pixels a side, against the bundle's own graphs.

    Infinite where no level differs. Raises `BackendError` where the graphs give NaN in this precision.
    """
    config = bundle.manifest.config
    inputs = random_inputs(config, (size, size), 1)

    def rewritten(stage: str, feeds: Arrays) -> Arrays:
        outputs = _run(unrounded(bundle_graph(bundle, stage, precision)), feeds)
        if precision == "float16":
            with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, and the picture NaN
                packed = {name: outputs[name].astype(np.float16).astype(np.float32) for name in _PACKED & set(outputs)}
            outputs |= packed
        return outputs

    expected = run_stages(config, lambda stage, feeds: _run_own(bundle, stage, feeds), inputs)
    outputs = run_stages(config, rewritten, inputs)
    if outputs["invalid"]:
        raise BackendError(f"{bundle.path}: gives NaN in {precision}: weights or features overflow; use float32")
    return psnr(outputs["image"][0], to_uint8(expected["image"][0]))


def require_agreement(bundle: Bundle, precision: str, size: int) -> float:
    """`agreement`, or `BackendError` where it is below `MIN_PSNR`."""
    decibels = agreement(bundle, precision, size)
    if decibels < MIN_PSNR[precision]:
        raise BackendError(
            f"{bundle.path}: {precision} gives {decibels:.1f} dB against the bundle's own graphs at {size} px, "
            f"expected {MIN_PSNR[precision]:g} or more; use precision float32"
        )
    return decibels


def _run_own(bundle: Bundle, stage: str, feeds: Arrays) -> Arrays:
    if bundle.manifest.precision != "int8":
        return OnnxRuntimeEngine(bundle, stage).run(feeds)
    graph = bundle.read_stage(stage)
    refuse_external_data(graph, f"{bundle.path}: stage {stage}")
    return _run(unrounded(onnx.load_model_from_string(graph)), feeds)


def _run(graph: onnx.ModelProto, feeds: Arrays) -> Arrays:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))
