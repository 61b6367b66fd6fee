"""`flashcocos quantize`: a bundle whose generator computes in int8, calibrated on the user's own labels and exemplars.

Convolutions of the synthesis get explicit QuantizeLinear and DequantizeLinear around them: symmetric int8, a scale for
each output channel of a weight and one for each activation, from the least and largest values that calibration saw.
Four parts stay in float32: the query and exemplar stages, whose features are compared at temperature 0.01; the last
convolution, which is the picture (worth 6 dB on avatars-128); the self-attention, with which ONNX Runtime 1.32 aborts;
and the convolutions over label planes, whose weights a run chooses.

Quantization is ONNX Runtime's (`onnxruntime.quantization`); here are the choice of operators and the check of the
result, on pairs that calibration did not see.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from tqdm import tqdm

from ..bundle import Bundle, write_bundle
from ..bundle.stages import check_stages, stage_inputs
from ..config import ModelConfig
from ..errors import BackendError, InputError
from ..files import require_distinct
from ..preprocess.images import load_image, psnr, to_uint8
from ..preprocess.labels import load_label, resize_nearest
from ..runtime.cpu.onnxruntime import OnnxRuntimeEngine
from ..runtime.jobs import Job
from .graphs import check_graph, clean, fold_constants
from .verify import run_stages

_log = logging.getLogger("flashcocos.export")

MIN_PSNR = 32.0  # dB, of a held-out picture against the float one; less is refused unless asked for
ENOUGH_HELD_OUT = 8  # pairs; the least PSNR of fewer says little about the next picture
Arrays = dict[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A quantized bundle.

    path: where it was written. psnr: dB of each held-out pair. quantized, convolutions: how many convolutions are in
    int8, of how many.
    """

    path: Path
    psnr: list[float]
    quantized: int
    convolutions: int


def quantize_bundle(
    bundle: str | os.PathLike[str],
    output: str | os.PathLike[str],
    pairs: Sequence[Job],
    *,
    min_psnr: float = MIN_PSNR,
) -> Quantized:
    """Write a bundle again with its generator in int8.

    Args:
        bundle: Model bundle in float32 or float16, a folder or a zip file.
        output: Bundle to write, a zip file if it ends in ".zip", else a folder.
        pairs: Labels, exemplars and their labels, read at the model's own size. At least two, of which a quarter is
            held out to measure; a few dozen of the kind that will be translated are enough.
        min_psnr: Least PSNR in dB of a held-out picture against the float one.

    Returns:
        The bundle written and the PSNR of every held-out pair.

    Raises:
        InputError: Too few pairs, files that cannot be read, or an output that is the input.
        BundleError: The bundle cannot be used.
        BackendError: A held-out picture is below `min_psnr`; nothing is written.
    """
    require_distinct(output, bundle)
    opened = Bundle(bundle)
    config = opened.manifest.config
    check_stages(opened.manifest)
    if opened.manifest.precision == "int8":
        raise InputError(f"{bundle}: its generator is int8 already")
    if len(pairs) < 2:
        raise InputError(f"{len(pairs)} pairs: expected at least 2, of which a quarter is held out to measure")
    held_out = max(1, len(pairs) // 4)
    engines = {stage: OnnxRuntimeEngine(opened, stage) for stage in opened.manifest.stages}
    with tqdm(desc="calibrate", total=len(pairs), unit="pair", disable=None) as progress:
        feeds = []
        for pair in pairs:
            feeds.append(run_stages(config, lambda stage, inputs: engines[stage].run(inputs), _inputs(config, pair)))
            progress.update()
    files = {name: opened.read(name) for name in opened.manifest.files}
    convolutions = quantized = 0
    for stage in ("coarse", "fine"):
        calibration = [stage_inputs(config, stage, arrays) for arrays in feeds[held_out:]]
        graph, counts = _quantize_stage(opened, stage, calibration)
        files[opened.manifest.stages[stage].file] = graph.SerializeToString(deterministic=True)
        quantized, convolutions = quantized + counts[0], convolutions + counts[1]
    manifest = msgspec.structs.replace(opened.manifest, precision="int8")
    with tempfile.TemporaryDirectory() as folder:
        # measured as it will be read
        trial = Bundle(write_bundle(Path(folder) / "trial", manifest, files))
        decibels = [
            psnr(to_uint8(_synthesize(trial, arrays)[0]), to_uint8(arrays["image"][0])) for arrays in feeds[:held_out]
        ]
    if held_out < ENOUGH_HELD_OUT:
        _log.warning(
            "measured on %d held-out pairs: %.1f dB means little; give %d pairs or more",
            held_out,
            min(decibels),
            4 * ENOUGH_HELD_OUT,
        )
    if min(decibels) < min_psnr:
        raise BackendError(
            f"{bundle}: int8 gives {min(decibels):.1f} dB on a held-out pair, expected {min_psnr:g} or more; calibrate "
            "on more pairs of the kind that will be translated, or keep the float bundle"
        )
    path = write_bundle(output, manifest, files)
    return Quantized(path, decibels, quantized, convolutions)


def _quantize_stage(bundle: Bundle, stage: str, feeds: Sequence[Arrays]) -> tuple[onnx.ModelProto, tuple[int, int]]:
    """A stage in int8, calibrated on `feeds`, and how many of its convolutions are, of how many."""
    model = ir.from_proto(onnx.load_model_from_string(bundle.read_stage(stage)))
    fold_constants(model)  # weights that are stored in float16, and those that are made of others
    graph = ir.to_proto(model)
    convolutions = [node for node in graph.graph.node if node.op_type == "Conv"]
    kept = {node.name for node in convolutions if not _quantizable(graph.graph, node)}
    if stage == "fine":
        kept.add(convolutions[-1].name)
    small = _quantize(graph, feeds, sorted(kept))
    spec = bundle.manifest.stages[stage]
    clean(small, stage, spec.inputs, spec.outputs)
    check_graph(small, stage, spec.inputs, spec.outputs)
    return small, (len(convolutions) - len(kept), len(convolutions))


def _synthesize(bundle: Bundle, arrays: Arrays) -> npt.NDArray[Any]:
    """The picture of `bundle` for what the stages before have given."""
    for stage in ("coarse", "fine"):
        arrays = arrays | OnnxRuntimeEngine(bundle, stage).run(stage_inputs(bundle.manifest.config, stage, arrays))
    return arrays["image"]


def _quantizable(graph: onnx.GraphProto, node: onnx.NodeProto) -> bool:
    """Whether a convolution's weight is a constant, and none of the self-attention's."""
    return node.input[1] in {tensor.name for tensor in graph.initializer} and ".attention." not in node.input[1]


def _quantize(graph: onnx.ModelProto, feeds: Sequence[Arrays], kept: Sequence[str]) -> onnx.ModelProto:
    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self._feeds: Iterator[Arrays] = iter(feeds)

        def get_next(self) -> Arrays | None:
            return next(self._feeds, None)

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(graph, source)
        logging.disable(logging.WARNING)  # it recommends steps that these graphs have behind them
        try:
            quantize_static(
                source,
                target,
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv"],
                nodes_to_exclude=list(kept),
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
            )
        finally:
            logging.disable(logging.NOTSET)
        small = onnx.load(target)
    used = {node.domain for node in small.graph.node}
    opsets = [entry for entry in small.opset_import if entry.domain in used]
    del small.opset_import[:]
    small.opset_import.extend(opsets)
    return small


def _inputs(config: ModelConfig, pair: Job) -> Arrays:
    """The inputs of all stages for a pair, by their names in `stage_inputs`."""
    size = (config.image_size, config.image_size)

    def label(path: Path) -> npt.NDArray[Any]:
        return resize_nearest(load_label(config, path), size)[None]

    inputs: Arrays = {"label": label(pair.label), "image": load_image(pair.exemplar, size)[None]}
    if config.condition_on_label:
        if pair.exemplar_label is None:
            raise InputError(f"{pair.exemplar}: a model for {config.task} needs the exemplar's label")
        inputs["exemplar_label"] = label(pair.exemplar_label)
    return inputs
