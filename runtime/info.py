"""What `flashcocos info` prints: the versions and providers here, and what a model bundle says of itself."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from importlib import metadata

from ..bundle import Bundle
from ..errors import BackendError, BundleError
from .engine import available_providers
from .openvino_engine import cpu_precisions
from .stages import check_stages

# what flashcocos can use, and nothing is imported to learn a version
PACKAGES = (
    "numpy",
    "pillow",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "numba",
    "opencv-python-headless",
    "scikit-image",
    "torch",
    "triton",
    "onnx",
)


def describe_bundle(path: str | os.PathLike[str] | None = None) -> str:
    """Lines on this machine's packages and providers and, where `path` is given, on that bundle; hashes are checked.

    Raises `InputError` where there is no bundle at `path` and `BundleError` where it cannot be read at all; a file that
    does not match its hash is told in the text, line "hashes".
    """
    lines = [f"python      {platform.python_version()} on {platform.system()} {platform.machine()}"]
    lines += [f"{name:<11} {_version(name) or 'not installed'}" for name in ("flashcocos", *PACKAGES)]
    try:
        lines.append(f"providers   {', '.join(available_providers())}")
    except BackendError as error:
        lines.append(f"providers   none: {error}")
    if _version("openvino"):
        lines.append(f"arithmetic  {', '.join(cpu_precisions())} with openvino on this CPU")
    if path is not None:
        lines += ["", *_bundle_lines(Bundle(path))]
    return "\n".join(lines)


def _bundle_lines(bundle: Bundle) -> list[str]:
    manifest = bundle.manifest
    check_stages(manifest)
    megabytes = sum(spec.bytes for spec in manifest.files.values()) / 1e6
    lines = [
        f"bundle      {bundle.path} ({megabytes:.1f} MB)",
        f"task        {manifest.config.task}",
        f"precision   {manifest.precision}",
        f"opset       {manifest.opset}",
        f"license     {json.dumps(manifest.license) if manifest.license else 'not stated'}",
        "config      " + ", ".join(f"{key}={value}" for key, value in dataclasses.asdict(manifest.config).items()),
    ]
    for name, stage in manifest.stages.items():
        inputs = ", ".join(f"{t.name} {t.dtype}{_shape(t.shape)}" for t in stage.inputs)
        outputs = ", ".join(f"{t.name} {t.dtype}{_shape(t.shape)}" for t in stage.outputs)
        lines.append(f"{name:<11} {stage.file}: {inputs} -> {outputs}")
    lines += [f"{json.dumps(key)[1:-1]:<11} {json.dumps(value)}" for key, value in manifest.provenance.items()]
    try:
        bundle.verify()
        lines.append(f"hashes      ok ({len(manifest.files)} files)")
    except BundleError as error:
        lines.append(f"hashes      WRONG: {error}")
    return lines


def _shape(shape: tuple[int | str, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
