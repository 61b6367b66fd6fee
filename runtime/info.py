"""What `flashcocos info` prints: the versions and providers here, and what a model bundle says of itself."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import msgspec

from ..bundle import STAGES, Bundle
from ..bundle.default_model import MODEL, PAIRS
from ..bundle.stages import check_stages
from ..errors import BackendError, BundleError, InputError, printable
from ..preprocess.palette import hexadecimal, legend
from .cpu.onnxruntime import available_providers
from .cpu.openvino import cpu_precisions
from .gpu.cubins import FOLDER, available_kernels
from .gpu.device import Device, mebibytes
from .gpu.memory_estimate import estimate_memory
from .gpu.store import EngineRecord, default_folder, list_engines
from .options import check_tile
from .translator import resolve_size

Line = tuple[str, str]  # a name and a text
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
_WIDTH = 2 + max(map(len, PACKAGES))  # of the names' column


def describe_bundle(
    path: str | os.PathLike[str] | None = None,
    engines: str | os.PathLike[str] | None = None,
    size: tuple[int, int] | None = None,
    tile: int | None = None,
) -> str:
    """What there is on this machine and, where `path` is given, in that bundle, whose hashes are checked.

    Args:
        path: a bundle, or None.
        engines: folder of the bundle's TensorRT engines and kernels; None for the one beside it.
        size: height and width in pixels, for which the engines' device memory is estimated.
        tile: side of tiles, as for `Translator`.

    Returns:
        Lines of a name and a text, without control characters. A file that does not match its hash is in the line
        "hashes".

    Raises:
        InputError: there is no bundle at `path`, or size and tile do not go with the rest.
        BundleError: the bundle cannot be read at all.
    """
    check_tile(tile)
    if tile is not None and size is None:
        raise InputError(f"tile {tile}: it changes the memory at a size; give the size too")
    if size is not None and path is None:
        raise InputError(f"size {size[0]} x {size[1]}: it is for the engines of a bundle; give the bundle too")
    lines = _machine_lines()
    if path is not None:
        bundle = Bundle(path)
        folder = default_folder(path) if engines is None else Path(engines)
        lines += [("", ""), *_bundle_lines(bundle)]
        try:
            records = list_engines(folder)
        except BackendError as error:
            lines.append(("engines", str(error)))
        else:
            lines += _engine_lines(bundle, folder, records)
            if size is not None:
                lines += _memory_lines(bundle, folder, records, resolve_size(bundle.manifest.config, size, size), tile)
        lines.append(("hashes", _hashes(bundle)))
    return "\n".join(printable(f"{name:<{_WIDTH}}{text}".rstrip()) for name, text in lines)


def _machine_lines() -> list[Line]:
    lines = [("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    lines += [(name, _version(name) or "not installed") for name in ("flashcocos", *PACKAGES)]
    try:
        lines.append(("providers", ", ".join(available_providers())))
    except BackendError as error:
        lines.append(("providers", f"none: {error}"))
    if _version("openvino"):
        lines.append(("arithmetic", f"{', '.join(cpu_precisions())} with openvino on this CPU"))
    return [*lines, ("gpu", _gpu()), ("default model", str(MODEL)), ("demo inputs", str(PAIRS.parent))]


def _bundle_lines(bundle: Bundle) -> list[Line]:
    manifest = bundle.manifest
    check_stages(manifest)
    megabytes = sum(spec.bytes for spec in manifest.files.values()) / 1e6
    lines = [
        ("bundle", f"{bundle.path} ({megabytes:.1f} MB)"),
        ("task", manifest.config.task),
        ("precision", manifest.precision),
        ("opset", str(manifest.opset)),
        ("license", manifest.license or "not stated"),
        ("config", ", ".join(f"{key}={value}" for key, value in msgspec.structs.asdict(manifest.config).items())),
    ]
    for name, stage in manifest.stages.items():
        inputs = ", ".join(f"{t.name} {t.dtype}{_shape(t.shape)}" for t in stage.inputs)
        outputs = ", ".join(f"{t.name} {t.dtype}{_shape(t.shape)}" for t in stage.outputs)
        lines.append((name, f"{stage.file}: {inputs} -> {outputs}"))
    names, colors = legend(manifest.config)
    described = zip(manifest.class_names or names, manifest.palette or colors, strict=bool(names))
    lines += [(f"class {number}", f"{hexadecimal(color)} {name}") for number, (name, color) in enumerate(described)]
    return [*lines, *_tree("provenance", manifest.provenance)]


def _tree(name: str, value: object, depth: int = 0) -> Iterator[Line]:
    """JSON as lines of "key: value", what is in an object indented; deeper than eight levels on one line."""
    indent = "  " * depth
    if isinstance(value, dict) and value and depth < 8:
        yield f"{indent}{name}:", ""
        for key, item in value.items():
            yield from _tree(key, item, depth + 1)
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        yield f"{indent}{name}: {text}", ""


def _graphs(bundle: Bundle) -> set[str]:
    return {bundle.manifest.graph_file(stage).sha256 for stage in STAGES}


def _engine_lines(bundle: Bundle, folder: Path, records: Sequence[EngineRecord]) -> list[Line]:
    """The engines in `folder` and the warp's compiled kernels there and in the bundle."""
    graphs = _graphs(bundle)
    lines = (
        [] if records else [("engines", f"none in {folder}; flashcocos build makes them where TensorRT is installed")]
    )
    for record in records:
        key = record.key
        chips = " + ".join(f"sm_{architecture}" for architecture in key.architectures)
        text = (
            f"{key.stage} in {record.arithmetic}, {key.profile}, {chips}, {key.variant} {key.version}: "
            f"{mebibytes(record.weight_bytes)} weights, {mebibytes(record.activation_bytes)} working memory"
        )
        lines.append(("engine", text if key.graph_sha256 in graphs else f"{text}; of another bundle"))
    kernels = available_kernels((folder / FOLDER, bundle), bundle.manifest.config)
    text = "; ".join(f"{dtype} for {', '.join(f'sm_{sm}' for sm in chips)}" for dtype, chips in kernels.items())
    return [*lines, ("kernels", text or "none; flashcocos export --aot makes them where triton is installed")]


def _memory_lines(
    bundle: Bundle, folder: Path, records: Sequence[EngineRecord], size: tuple[int, int], tile: int | None
) -> list[Line]:
    """What a picture of `size` takes with each set of engines in `folder`."""
    graphs = _graphs(bundle)
    sets: dict[tuple[str, str, tuple[int, ...], str], list[EngineRecord]] = {}
    for record in records:
        key = record.key
        if key.graph_sha256 in graphs:
            sets.setdefault((key.variant, key.version, key.architectures, key.precision), []).append(record)
    if not sets:
        return [("memory", f"not known: there are no engines of this bundle in {folder}, which it depends on")]
    lines = []
    for (variant, version, _, precision), engines in sorted(sets.items()):
        try:
            memory = str(estimate_memory(bundle.manifest.config, engines, *size, tile=tile))
        except BackendError as error:
            memory = str(error)
        lines.append(("memory", f"{variant} {version} in {precision}: {memory}"))
    return lines


def _hashes(bundle: Bundle) -> str:
    try:
        bundle.verify()
        return f"ok ({len(bundle.manifest.files)} files)"
    except BundleError as error:
        return f"WRONG: {error}"


def _gpu() -> str:
    try:
        device = Device()
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
