"""`flashcocos build`: the graphs of a bundle become TensorRT engines, with the warp's kernels for the same GPUs beside.

One builder for both variants, whose Python API is the same where it is used here:

    tensorrt-rtx    TensorRT for RTX: consumer GPUs; builds for any architecture it knows on a machine with no GPU
    tensorrt        TensorRT proper: data-center and consumer GPUs; builds for the GPU at hand

Networks are strongly typed: `graphs.py` declares every tensor's type and the builder keeps it, int8 included in a
bundle of `flashcocos quantize` (`int8.py`). Each stage is built for every profile, static by
default. What has been built is kept under a key of all that decides it (`runtime.gpu.store`) and not built again.

Engines have been built with tensorrt-rtx 1.7 for sm 86, 89 and 120. The calls of the variant tensorrt are checked
against its type stubs alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from tqdm import tqdm

from ...bundle import STAGES, Bundle, TensorSpec
from ...bundle.stages import axis_sizes, check_stages, concrete_shape, signature, stage_tensors
from ...errors import BackendError, InputError
from ...files import atomic_path
from ...runtime.engine import one_line
from ...runtime.gpu.cubins import FOLDER
from ...runtime.gpu.engine import device_tensors
from ...runtime.gpu.store import (
    PRECISIONS,
    EngineKey,
    EngineRecord,
    Profile,
    default_folder,
    import_variant,
    list_engines,
    read_engine,
    write_engine,
)
from ...runtime.options import check_tile
from ..bundle import compiled_kernels
from .graphs import bundle_graph
from .int8 import int8_convolutions

if TYPE_CHECKING:
    import tensorrt  # its stubs, for both variants

_FIGURES = ("Total Activation Memory", "Total Weights Memory")


@dataclasses.dataclass(frozen=True)
class Built:
    """One engine: its record, its file, and whether it was kept."""

    record: EngineRecord
    path: Path
    kept: bool


def build(
    bundle: str | os.PathLike[str],
    *,
    targets: Sequence[int] = (),
    precision: str = "float16",
    variant: str = "tensorrt-rtx",
    profiles: Sequence[Profile] = (),
    output: str | os.PathLike[str] | None = None,
    tile: int | None = None,
) -> Iterator[Built]:
    """Build the TensorRT engines of a bundle that are missing in a folder.

    Args:
        bundle: Model bundle, a folder or a zip file.
        targets: Compute capabilities, 89 for 8.9; all go into one engine, which shares their weights. The variant
            "tensorrt" takes only that of the GPU at hand, which is the default.
        precision: "float32" or "float16", of all but the convolutions that a bundle of `quantize` has in int8.
        variant: "tensorrt-rtx" or "tensorrt".
        profiles: Shapes to build for, by default one picture of the model's own size.
        output: Folder of the engines, by default beside the bundle.
        tile: Side in pixels of the fine stage's tiles, as for `Translator`; None builds it for whole pictures.

    Yields:
        Every engine, stage by stage and profile by profile, once it is stored.

    Raises:
        InputError: Options that do not fit.
        BundleError: The bundle cannot be used.
        BackendError: The variant is missing, does not know a target, or fails, for example for lack of memory.
    """
    opened = Bundle(bundle)
    check_stages(opened.manifest)
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r} is unknown; expected one of {', '.join(PRECISIONS)}")
    check_tile(tile)
    trt = import_variant(variant)
    architectures = tuple(sorted(set(targets))) or (current_architecture(),)
    _check_targets(trt, variant, architectures)
    side = opened.manifest.config.image_size
    profiles = list(profiles) or [Profile((1, 1, 1), (side, side, side), (side, side, side))]
    folder = Path(output) if output is not None else default_folder(bundle)
    known = {record.key: record for record in list_engines(folder)}
    for stage in STAGES:
        graph = None
        for picture_profile in profiles:
            profile = picture_profile.tiled(tile) if stage == "fine" else picture_profile
            sha256 = opened.manifest.graph_file(stage).sha256
            key = EngineKey(stage, sha256, variant, str(trt.__version__), architectures, precision, profile)
            path = folder / f"{key.stem}.engine"
            kept = key in known and _intact(folder, known[key])
            if not kept:
                graph = graph or bundle_graph(opened, stage, precision)
                record, engine = _build_one(trt, graph, opened, key, folder)
                known[key] = write_engine(folder, record, engine)
            yield Built(known[key], path, kept)


def parse_profile(size: str, batch: str) -> Profile:
    """`size` as "512", "512x768" (height first) or least:optimal:most of either, `batch` as "1" or "1:4:8".

    Raises `InputError` for anything else.
    """

    def axis(texts: Sequence[str], what: str) -> tuple[int, int, int]:
        try:
            sides = [int(text) for text in texts]
        except ValueError:
            sides = []
        if len(sides) == 1:
            sides *= 3
        if len(sides) != 3 or not 1 <= sides[0] <= sides[1] <= sides[2]:
            raise InputError(f"{what}: expected one number or least:optimal:most, got {':'.join(texts)!r}")
        return sides[0], sides[1], sides[2]

    parts = [part.split("x") for part in size.lower().split(":")]
    if any(len(part) > 2 for part in parts):
        raise InputError(f"size {size!r}: expected SIDE or HEIGHTxWIDTH, or least:optimal:most of them")
    height, width = axis([part[0] for part in parts], "size"), axis([part[-1] for part in parts], "size")
    for side in {*height, *width}:
        if side % 32 or not 64 <= side <= 8192:
            raise InputError(f"size {size!r}: expected multiples of 32 from 64 to 8192, got {side}")
    return Profile(axis(batch.split(":"), "batch"), height, width)


def stage_shapes(bundle: Bundle, stage: str, profile: Profile, which: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a stage's inputs at the profile's least (0), optimal (1) or largest (2) size."""
    config = bundle.manifest.config
    sizes = axis_sizes(config, profile.batch[which], profile.height[which], profile.width[which])
    return {tensor.name: concrete_shape(tensor, sizes) for tensor in stage_tensors(config)[stage][0]}


def build_kernels(bundle: str | os.PathLike[str], folder: Path, targets: Sequence[int], precision: str) -> list[str]:
    """Compile the warp of `bundle` for `targets` into `folder`/kernels; returns the cubins' names."""
    files = compiled_kernels(Bundle(bundle).manifest.config, targets, [precision])
    for name, content in files.items():
        with atomic_path(folder / FOLDER / name) as temporary:
            temporary.write_bytes(content)
    return sorted(name.removesuffix(".cubin") for name in files if name.endswith(".cubin"))


def _build_one(
    trt: Any, graph: onnx.ModelProto, bundle: Bundle, key: EngineKey, folder: Path
) -> tuple[EngineRecord, bytes]:
    logger = _logger(trt)
    builder: tensorrt.Builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser: tensorrt.OnnxParser = trt.OnnxParser(network, logger)
    what = f"{key.variant} {key.version}: {key.stage} at {key.profile}"
    if not parser.parse(graph.SerializeToString()):
        reasons = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise BackendError(f"{what}: the graph cannot be read: {one_line(reasons)}")
    config = builder.create_builder_config()
    _set_flags(trt, config)
    profile: Any = builder.create_optimization_profile()  # the stubs know no tuples for shapes
    shapes = [stage_shapes(bundle, key.stage, key.profile, which) for which in range(3)]
    for name in shapes[0]:
        profile.set_shape(name, *(shape[name] for shape in shapes))
    config.add_optimization_profile(profile)
    if key.variant == "tensorrt-rtx":
        _set_architectures(trt, config, key.architectures)
    inputs, outputs = device_tensors(bundle.manifest.config, key.stage, uint8_output=True)
    _check_network(trt, network, what, inputs, outputs)
    with (
        _timing_cache(config, key, folder),
        tqdm(desc=f"build {key.stage}", total=0, unit="step", disable=None) as progress,
    ):
        monitor = _monitor(trt, progress)
        config.progress_monitor = monitor
        engine = builder.build_serialized_network(network, config)
    if engine is None:
        _clear(trt, key)
        raise BackendError(f"{what} for {_sms(key.architectures)}: {_failure(logger.errors)}")
    if missing := [figure for figure in _FIGURES if figure not in logger.figures]:
        raise BackendError(
            f"{what}: TensorRT did not log its {missing[0]}, by which memory is planned; use another version"
        )
    activation, weights = (logger.figures[figure] for figure in _FIGURES)
    record = EngineRecord(key, weights, activation, 0, "", int8_convolutions(graph))
    return record, bytes(engine)


def _clear(trt: Any, key: EngineKey) -> None:
    """Build next to nothing, for tensorrt-rtx 1.7 compiles as for sm_75 what follows a failed build for that."""
    if key.variant != "tensorrt-rtx":
        return
    builder = trt.Builder(_logger(trt))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    layer = network.add_identity(network.add_input("input", trt.float32, (1,)))
    network.mark_output(layer.get_output(0))
    config = builder.create_builder_config()
    _set_architectures(trt, config, key.architectures)
    builder.build_serialized_network(network, config)


def _set_flags(trt: Any, config: Any) -> None:
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 is to mean float32
    # NaN reaches `invalid`; and no run allocates, which the capture as a CUDA graph depends on (tensorrt-rtx)
    for flag in ("STRICT_NANS", "REQUIRE_USER_ALLOCATION"):
        if hasattr(trt.BuilderFlag, flag):
            config.set_flag(getattr(trt.BuilderFlag, flag))


def _set_architectures(trt: Any, config: Any, architectures: Sequence[int]) -> None:
    # of the variant tensorrt-rtx alone, and not in the stubs
    config.num_compute_capabilities = len(architectures)
    for index, architecture in enumerate(architectures):
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{architecture}"), index)


@contextlib.contextmanager
def _timing_cache(config: tensorrt.IBuilderConfig, key: EngineKey, folder: Path) -> Iterator[None]:
    """Keep how fast each kernel was for the next build on the same GPU; tensorrt-rtx times nothing when it builds."""
    if key.variant != "tensorrt":
        yield
        return
    path = folder / f"timing-{key.version}-sm{key.architectures[0]}.cache"
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        raise BackendError(f"{path}: the timing cache does not fit this GPU; remove it")
    yield
    with atomic_path(path) as temporary:
        temporary.write_bytes(bytes(cache.serialize()))


def _check_network(
    trt: Any, network: Any, what: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> None:
    types = {trt.DataType.FLOAT: "float32", trt.DataType.UINT8: "uint8"}

    def tensors(count: int, get: Callable[[int], Any]) -> list[TensorSpec]:
        found = [get(index) for index in range(count)]
        return [
            TensorSpec(t.name, types.get(t.dtype, str(t.dtype)), tuple("?" if side < 0 else side for side in t.shape))
            for t in found
        ]

    for side, expected, found in (
        ("inputs", inputs, tensors(network.num_inputs, network.get_input)),
        ("outputs", outputs, tensors(network.num_outputs, network.get_output)),
    ):
        if signature(expected) != signature(found):
            raise BackendError(f"{what}: expected the {side} {signature(expected)}, TensorRT sees {signature(found)}")


def _logger(trt: Any) -> Any:
    """A logger that keeps errors and the figures of memory, and prints nothing."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # of either variant's module, which has no type
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.figures: dict[str, int] = {}

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif found := re.match(r"(Total \w+ Memory): (\d+)(?: bytes)?\s*$", message):
                self.figures[found[1]] = int(found[2])

    return Logger()


def _monitor(trt: Any, progress: tqdm) -> Any:
    """The builder's progress monitor: counts the steps of all its phases, which become known one by one."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # as above
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            progress.total += num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress.update()
            return True

        def phase_finish(self, phase_name: str) -> None:
            return

    return Monitor()


def _failure(errors: Sequence[str]) -> str:
    text = " ".join(errors)
    if "OutOfMemory" in text or "out of memory" in text:
        size = re.search(r"Requested size was (\d+) bytes", text)
        needed = f" ({int(size[1]) / 2**30:.1f} GiB)" if size else ""
        return f"the build ran out of memory{needed}; lower the size or the batch, or use precision float16"
    return f"the build failed: {one_line(text) or 'TensorRT gave no reason'}"


def current_architecture() -> int:
    """Compute capability of the GPU at hand; `BackendError` where there is none."""
    from ...runtime.gpu.device import Device

    try:
        with contextlib.closing(Device()) as device:
            return device.capability
    except BackendError as error:
        raise BackendError(f"the GPU at hand is unknown ({error}); name a target: sm_89") from error


def _check_targets(trt: Any, variant: str, architectures: Sequence[int]) -> None:
    if variant == "tensorrt-rtx":
        known = sorted(int(name[2:]) for name in dir(trt.ComputeCapability) if re.fullmatch(r"SM\d+", name))
        for architecture in architectures:
            if architecture not in known:
                raise BackendError(
                    f"{variant} {trt.__version__} builds for {_sms(known)}, not for sm_{architecture}; "
                    "use variant tensorrt on such a GPU"
                )
    elif tuple(architectures) != (installed := (current_architecture(),)):
        raise BackendError(
            f"tensorrt builds for the GPU at hand alone, {_sms(installed)}, not for {_sms(architectures)}; "
            "use variant tensorrt-rtx, or build on the GPU that is to run it"
        )


def _intact(folder: Path, record: EngineRecord) -> bool:
    try:
        read_engine(folder, record)
        return True
    except BackendError:
        return False


def _sms(architectures: Sequence[int]) -> str:
    return ", ".join(f"sm_{architecture}" for architecture in architectures)
