"""`flashcocos export`: a model file becomes a model bundle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import onnx
import torch

from .. import __version__
from ..bundle import PRECISIONS, STAGES, Manifest, StageSpec, write_bundle
from ..errors import InputError
from ..files import sha256
from ..progress import Progress
from ..runtime.stages import stage_tensors
from ..train.checkpoint import load_model, read_metadata
from .graphs import OPSET, export_stage, store_float16


def export_bundle(
    model_path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    precision: str = "float32",
    license: str = "",
) -> Path:
    """Export the model file `model_path` to the bundle `output`, a zip file if it ends in ".zip", else a folder.

    precision: how the weights are stored, "float32" or "float16" (half the size; arithmetic stays float32).
    license: of the weights, free text for the manifest.
    Returns `output`. Raises `InputError` for a bad option or weights that do not fit float16, `CheckpointError` for a
    bad model file. The same model file gives the same content again under the same versions of torch and onnx.
    """
    check_precision(precision)
    model = load_model(model_path)
    files, stages = {}, {}
    with Progress("export", len(STAGES), unit="graph") as progress:
        for stage in STAGES:
            graph = export_stage(model, stage)
            if precision == "float16":
                store_float16(graph)
            files[f"{stage}.onnx"] = graph.SerializeToString(deterministic=True)
            stages[stage] = StageSpec(f"{stage}.onnx", *stage_tensors(model.config)[stage])
            progress.advance()
    manifest = Manifest(model.config, precision, OPSET, stages, {}, license, provenance(model_path))
    return write_bundle(output, manifest, files)


def provenance(model_path: str | os.PathLike[str]) -> dict[str, Any]:
    """Where an export came from: the model file's hash and own provenance, and the versions that exported it."""
    return {
        "model_sha256": sha256(model_path),
        "model": read_metadata(model_path)[1],
        "flashcocos": __version__,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
    }


def check_precision(precision: str) -> None:
    """Raise `InputError` unless `precision` is one that weights can be stored in."""
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r} is unknown; expected one of {', '.join(PRECISIONS)}")
