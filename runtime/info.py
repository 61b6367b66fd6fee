"""What `flashcocos info` prints: the versions and providers here, and what a model bundle says of itself."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path

import msgspec

from ..bundle import Bundle
from ..bundle.stages import check_stages
from ..errors import BackendError, BundleError, InputError
from .cpu.onnxruntime import available_providers
from .cpu.openvino import cpu_precisions
from .gpu.cubins import FOLDER, BundleKernels, KernelFolder, available_kernels
from .gpu.device import mebibytes
from .gpu.memory_estimate import estimate_memory
from .gpu.pycuda import PycudaDevice
from .gpu.store import EngineRecord, default_folder, list_engines
from .options import check_tile

# what flashcocos can use, and nothing is imported to learn a version
PACKAGES = (
    "numpy",
    "pillow",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
    "pycuda",
    "numba",
    "opencv-python-headless",
    "scikit-image",
    "torch",
    "triton",
    "onnx",
)


def describe_bundle(
    path: str | os.PathLike[str] | None = None,
    engines: str | os.PathLike[str] | None = None,
    size: tuple[int, int] | None = None,
    tile: int | None = None,
) -> str:
    """Lines on this machine's packages and GPU and, where `path` is given, on that bundle, whose hashes are checked.

    engines: folder of the bundle's TensorRT engines and kernels; None for the one beside it.
    size: height and width in pixels, for which the device memory that the engines take is planned. tile: side of
        tiles, as for `Translator`.
    Raises `InputError` where there is no bundle at `path` and `BundleError` where it cannot be read at all; a file that
    does not match its hash is told in the text, line "hashes".
    """
    check_tile(tile)
    if tile is not None and size is None:
        raise InputError(f"tile {tile}: it plans memory for a size; give the size too")
    lines = [f"python      {platform.python_version()} on {platform.system()} {platform.machine()}"]
    lines += [f"{name:<11} {_version(name) or 'not installed'}" for name in ("flashcocos", *PACKAGES)]
    try:
        lines.append(f"providers   {', '.join(available_providers())}")
    except BackendError as error:
        lines.append(f"providers   none: {error}")
    if _version("openvino"):
        lines.append(f"arithmetic  {', '.join(cpu_precisions())} with openvino on this CPU")
    lines.append(f"gpu         {_gpu()}")
    if path is not None:
        bundle = Bundle(path)
        folder = default_folder(path) if engines is None else Path(engines)
        lines += ["", *_bundle_lines(bundle), *_engine_lines(bundle, folder)]
        lines += _memory_lines(bundle, folder, size, tile) if size else []
        lines.append(_hashes(bundle))
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
        "config      " + ", ".join(f"{key}={value}" for key, value in msgspec.structs.asdict(manifest.config).items()),
    ]
    for name, stage in manifest.stages.items():
        inputs = ", ".join(f"{t.name} {t.dtype}{_shape(t.shape)}" for t in stage.inputs)
        outputs = ", ".join(f"{t.name} {t.dtype}{_shape(t.shape)}" for t in stage.outputs)
        lines.append(f"{name:<11} {stage.file}: {inputs} -> {outputs}")
    lines += [f"{json.dumps(key)[1:-1]:<11} {json.dumps(value)}" for key, value in manifest.provenance.items()]
    return lines


def _engine_lines(bundle: Bundle, folder: Path) -> list[str]:
    """The engines in `folder` and the warp's compiled kernels there and in the bundle."""
    manifest = bundle.manifest
    graphs = {manifest.files[stage.file].sha256 for stage in manifest.stages.values()}
    try:
        records = list_engines(folder)
    except BackendError as error:
        return [f"engines     {error}"]
    lines = [] if records else [f"engines     none in {folder}; flashcocos build makes them"]
    for record in records:
        key = record.key
        chips = " + ".join(f"sm_{architecture}" for architecture in key.architectures)
        lines.append(
            f"engine      {key.stage} in {record.arithmetic}, {key.profile}, {chips}, {key.variant} {key.version}: "
            f"{mebibytes(record.weight_bytes)} weights, {mebibytes(record.activation_bytes)} working memory"
            + ("" if key.graph_sha256 in graphs else "; of another bundle")
        )
    kernels = available_kernels((KernelFolder(folder / FOLDER), BundleKernels(bundle)), manifest.config)
    text = "; ".join(f"{dtype} for {', '.join(f'sm_{sm}' for sm in chips)}" for dtype, chips in kernels.items())
    return [*lines, f"kernels     {text or 'none; flashcocos build, or flashcocos export --aot, makes them'}"]


def _memory_lines(bundle: Bundle, folder: Path, size: tuple[int, int], tile: int | None) -> list[str]:
    """What a picture of `size` takes with each set of engines in `folder`."""
    manifest = bundle.manifest
    sets: dict[tuple[str, str, tuple[int, ...], str], list[EngineRecord]] = {}
    graphs = {manifest.files[stage.file].sha256 for stage in manifest.stages.values()}
    try:
        for record in list_engines(folder):
            key = record.key
            if key.graph_sha256 in graphs:
                alike = key.variant, key.version, key.architectures, key.precision
                sets.setdefault(alike, []).append(record)
    except BackendError:
        return []  # said before
    lines = []
    for (variant, version, _, precision), records in sorted(sets.items()):
        records.sort(key=lambda record: not record.key.profile.static)
        try:
            plan = str(estimate_memory(manifest.config, records, *size, tile=tile))
        except BackendError as error:
            plan = str(error)
        lines.append(f"memory      {variant} {version} in {precision}: {plan}")
    return lines


def _hashes(bundle: Bundle) -> str:
    try:
        bundle.verify()
        return f"hashes      ok ({len(bundle.manifest.files)} files)"
    except BundleError as error:
        return f"hashes      WRONG: {error}"


def _gpu() -> str:
    try:
        device = PycudaDevice()
        with device.active():
            free, total = device.memory()
        device.close()
    except BackendError as error:
        return f"none: {error}"
    memory = f"{mebibytes(free)} of {mebibytes(total)} free"
    return f"{device.name}, sm_{device.capability}, driver for CUDA {device.driver}, {memory}"


def _shape(shape: tuple[int | str, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
