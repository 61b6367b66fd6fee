"""`flashcocos export`: a model file becomes a model bundle."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from tqdm import tqdm

from .. import __version__
from ..bundle import PRECISIONS, STAGES, Manifest, StageSpec, write_bundle
from ..bundle.stages import stage_tensors
from ..config import ModelConfig
from ..errors import InputError
from ..files import file_hash, require_distinct
from ..preprocess.palette import legend
from ..train.checkpoint import load_model, read_metadata
from .graphs import OPSET, check_graph, export_stage, replace, store_float16
from .windows import share_windows
from .winograd import winograd


def export_bundle(
    model_path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    precision: str = "float32",
    license: str = "",
    targets: Sequence[int] = (),
    plain: bool = False,
) -> Path:
    """Export a model file to a bundle.

    The same model file gives the same content again under the same versions of torch and onnx.

    Args:
        model_path: Model file (.safetensors) of `flashcocos train` or `convert`.
        output: Bundle to write, a zip file if it ends in ".zip", else a folder.
        precision: How the weights are stored, "float32" or "float16" (half the size; arithmetic stays float32).
        license: License of the weights, free text for the manifest.
        targets: Compute capabilities, 89 for 8.9, for which the warp's kernels are compiled into the bundle; this
            needs triton.
        plain: Whether to leave out the forms that `winograd` and `windows` give convolutions of the query and exemplar
            stages, faster in ONNX Runtime on a CPU. TensorRT and OpenVINO get plain convolutions all the same.

    Returns:
        Path of the bundle, `output`.

    Raises:
        InputError: A bad option, weights that do not fit float16, or an output that is the input.
        CheckpointError: A bad model file.
        BackendError: Kernels are to be compiled, and triton is missing.
    """
    check_precision(precision)
    require_distinct(output, model_path)
    model = load_model(model_path)
    files, stages = {}, {}
    with tqdm(desc="export", total=len(STAGES), unit="graph", disable=None) as progress:
        for stage in STAGES:
            graph = export_stage(model, stage)
            if not plain and stage in ("query", "exemplar"):
                replace(graph.graph, *winograd(graph.graph))
                replace(graph.graph, *share_windows(graph.graph))
            check_graph(graph, stage, *stage_tensors(model.config)[stage])
            if precision == "float16":
                store_float16(graph)
            files[f"{stage}.onnx"] = graph.SerializeToString(deterministic=True)
            stages[stage] = StageSpec(f"{stage}.onnx", *stage_tensors(model.config)[stage])
            progress.update()
    if targets:
        files |= compiled_kernels(model.config, targets)
    class_names, palette = legend(model.config)
    manifest = Manifest(
        model.config, precision, OPSET, stages, {}, license, provenance(model_path), class_names, palette
    )
    return write_bundle(output, manifest, files)


def compiled_kernels(
    config: ModelConfig, targets: Sequence[int], dtypes: Sequence[str] = ("float16", "float32")
) -> dict[str, bytes]:
    """Compile the warp of a network of `config` for the compute capabilities `targets`, with `kernels.gpu.aot`.

    Returns file name -> content, a cubin and its JSON description for each kernel, architecture and dtype. Raises
    `InputError` for an unknown target, `BackendError` where triton is missing.
    """
    from ..kernels.gpu.aot import compile_kernels

    with tempfile.TemporaryDirectory() as folder, tqdm(desc="kernels", unit="kernel", disable=None) as progress:
        for _ in compile_kernels(
            Path(folder),
            sorted(set(targets)),
            values=[config.warped_channels],
            patch=config.patch,
            channels=config.feature_channels,
            dtypes=dtypes,
        ):
            progress.update()
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def provenance(model_path: str | os.PathLike[str]) -> dict[str, Any]:
    """Where an export came from: the model file's hash and its own provenance, and the versions that exported it."""
    return {
        "model_sha256": file_hash(model_path),
        "model": read_metadata(model_path)[1],
        "flashcocos": __version__,
        "torch": str(torch.__version__),  # a class of torch's own
        "onnx": onnx.__version__,
    }


def check_precision(precision: str) -> None:
    """Raise `InputError` unless `precision` is one that an export stores weights in."""
    if precision == "int8":
        raise InputError("precision 'int8' needs pictures to calibrate on: export in float32, then flashcocos quantize")
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r} is unknown; expected one of {', '.join(PRECISIONS[:2])}")
