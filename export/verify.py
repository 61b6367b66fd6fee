"""`flashcocos verify`: is a bundle whole, valid, and equal to the model it was exported from?

Without a checkpoint: hashes, the ONNX checker, inputs and outputs, finite results, two runs bit for bit equal, a batch
equal to its items. With it: ONNX Runtime against PyTorch, stage by stage on the same inputs and end to end.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import torch
from tqdm import tqdm

from ..bundle import STAGES, Bundle
from ..bundle.graph_check import refuse_external_data
from ..bundle.stages import check_stages, stage_inputs
from ..config import MIN_SIDE, SIZE_MULTIPLE, ModelConfig, is_side
from ..errors import BundleError, InputError
from ..kernels.corr_warp import warp_arrays
from ..runtime.cpu.onnxruntime import OnnxRuntimeEngine
from ..runtime.engine import Engine
from ..train.checkpoint import load_model
from ..train.networks import CoCosNet
from .graphs import check_graph

Arrays = dict[str, npt.NDArray[Any]]
Size = tuple[int, int]
BLOCK = 16  # pixels of the blocks that the random labels and images are made of


class Bound(NamedTuple):
    """What an output must keep: the greatest error over the reference's range, and PSNR in dB over that range."""

    error: float
    psnr: float


# measured in full-size ade20k with seeded weights: at least 116 dB with float32 weights, 68 dB with float16 ones; the
# rest is margin for other weights, processors and versions. Temperature 0.01 amplifies the rounding of theta and phi a
# hundredfold on its way to a pixel, so end to end the PSNR alone is bounded, and lower.
BOUNDS = {
    "float32": {"stage": Bound(3e-5, 100.0), "end to end": Bound(math.inf, 80.0)},
    "float16": {"stage": Bound(1e-2, 55.0), "end to end": Bound(math.inf, 45.0)},
    # random labels and pictures are not what it was calibrated on
    "int8": {"stage": Bound(math.inf, 25.0), "end to end": Bound(math.inf, 25.0)},
}


class Check(NamedTuple):
    """One yes-or-no finding."""

    name: str
    ok: bool
    detail: str


class Comparison(NamedTuple):
    """One output against its reference. error and psnr as in `Bound`; max_abs_error in the output's own unit."""

    size: Size
    batch: int
    scope: str  # "stage": on equal inputs, or "end to end"
    output: str
    max_abs_error: float
    error: float
    psnr: float
    bound: Bound

    @property
    def ok(self) -> bool:
        return self.error <= self.bound.error and self.psnr >= self.bound.psnr  # false for nan


@dataclasses.dataclass
class Report:
    """The findings of `verify`; `ok` only if every one is."""

    title: str
    checks: list[Check] = dataclasses.field(default_factory=list)
    comparisons: list[Comparison] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks) and all(comparison.ok for comparison in self.comparisons)

    def add(self, name: str, ok: bool, detail: str = "") -> bool:
        """Add a check; returns `ok`."""
        self.checks.append(Check(name, bool(ok), detail))
        return bool(ok)

    def table(self) -> str:
        """Everything found, as text to print."""
        lines = [self.title]
        lines += [f"{_word(c.ok)}  {c.name}{f': {c.detail}' if c.detail else ''}" for c in self.checks]
        if self.comparisons:
            heading = "size, batch, scope, output, max abs error, of range, PSNR dB, bounds of the last two"
            lines.append(_row("    ", *heading.split(", ")))
        for c in self.comparisons:
            size, bounds = f"{c.size[0]}x{c.size[1]}", f"{c.bound.error:g}, {c.bound.psnr:g} dB"
            numbers = (f"{c.max_abs_error:.2e}", f"{c.error:.1e}", f"{c.psnr:.1f}")
            lines.append(_row(_word(c.ok), size, str(c.batch), c.scope, c.output, *numbers, bounds))
        return "\n".join([*lines, "verified" if self.ok else "NOT verified"])


def verify(
    bundle_path: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    sizes: Sequence[Size] = ((256, 256), (192, 320)),
    batches: Sequence[int] = (1, 2),
) -> Report:
    """Check a bundle, and compare it with the model that it was exported from.

    Args:
        bundle_path: Model bundle, a folder or a zip file.
        checkpoint: Model file to compare with; None checks the bundle alone.
        sizes: (height, width) of labels; the exemplars have the two exchanged.
        batches: Images at once; every batch runs at every size.

    Returns:
        The checks and comparisons. Its `ok` is true if all passed, and `table()` is text to print.

    Raises:
        InputError: Bad options or a missing file.
        BundleError: The file is no bundle. Whatever else is wrong with a bundle is in the report.
        CheckpointError: A bad model file.
    """
    for height, width in sizes:
        if not (is_side(height) and is_side(width)):
            raise InputError(f"size {(height, width)}: expected multiples of {SIZE_MULTIPLE}, {MIN_SIDE} at least")
    if not sizes or not batches or min(batches) < 1:
        raise InputError(f"sizes {sizes} and batches {batches}: expected at least one of each, and batches from 1")
    bundle = Bundle(bundle_path)
    config, precision = bundle.manifest.config, bundle.manifest.precision
    report = Report(f"{bundle.path}: task {config.task}, {precision} weights")
    engines = _open(report, bundle)
    if engines is None:
        return report
    opened = engines

    def run(stage: str, feeds: Arrays) -> Arrays:
        return opened[stage].run(feeds)

    model = None
    if checkpoint is not None:
        model = load_model(checkpoint)
        if not report.add("configuration equals the checkpoint's", model.config == config):
            return report
    cases = [(size, batch) for size in sizes for batch in sorted(set(batches))]
    seen: dict[Size, Arrays] = {}
    with tqdm(desc="verify", total=len(cases), unit="case", disable=None) as progress:
        for size, batch in cases:
            inputs = random_inputs(config, size, batch)
            outputs = run_stages(config, run, inputs)
            report.add(f"finite results at {size}, batch {batch}", _finite(outputs))
            if not seen:
                again = run_stages(config, run, inputs)
                equal = all(np.array_equal(outputs[name], again[name]) for name in outputs)
                report.add("two runs give the same bits", equal)
            if size in seen:
                _compare_items(report, precision, size, batch, seen[size], outputs)
            else:
                seen[size] = outputs
            if model is not None:
                _compare_model(report, model, run, precision, size, inputs, outputs)
            progress.update()
    return report


def random_inputs(config: ModelConfig, size: Size, batch: int) -> Arrays:
    """label, image and exemplar_label of the stages: seeded blocks, so that an item is the same in every batch."""
    height, width = size

    def blocks(rng: np.random.Generator, *shape: int) -> npt.NDArray[np.float32]:
        small = rng.random((*shape[:-2], shape[-2] // BLOCK, shape[-1] // BLOCK), np.float32)
        return small.repeat(BLOCK, -2).repeat(BLOCK, -1)

    def label(rng: np.random.Generator, *shape: int) -> npt.NDArray[Any]:
        if config.label_kind == "channels":
            return blocks(rng, config.label_channels, *shape)
        return (blocks(rng, *shape) * config.label_channels).astype(np.uint8)

    items = []
    for item in range(batch):
        rng = np.random.default_rng([item, height, width])
        image = 2 * blocks(rng, 3, width, height) - 1
        image = np.clip(image + 0.1 * rng.standard_normal(image.shape, np.float32), -1, 1)
        items.append((label(rng, height, width), image, label(rng, width, height)))
    return dict(zip(("label", "image", "exemplar_label"), map(np.stack, zip(*items, strict=True)), strict=True))


def _open(report: Report, bundle: Bundle) -> dict[str, Engine] | None:
    """An engine for each stage, on the CPU, after every check that needs no run; None where one has failed."""
    manifest = bundle.manifest
    size = sum(spec.bytes for spec in manifest.files.values())
    engines: dict[str, Engine] = {}
    name = "files match their size and SHA-256"
    try:
        bundle.verify()
        report.add(name, True, f"{len(manifest.files)} files, {size / 1e6:.1f} MB")
        name = "stages are those of the configuration"
        check_stages(manifest)
        report.add(name, True)
        for stage in STAGES:
            name = f"{stage}: valid ONNX with the stated inputs and outputs"
            opset = _check_stage(bundle, stage)
            engines[stage] = OnnxRuntimeEngine(bundle, stage)
            info = engines[stage].describe()
            report.add(name, True, f"opset {opset}, runs in {info.backend} on {info.provider}")
    except BundleError as error:
        report.add(name, False, str(error))
        return None
    return engines


def _check_stage(bundle: Bundle, stage: str) -> int:
    spec, precision = bundle.manifest.stages[stage], bundle.manifest.precision
    content = bundle.read_stage(stage)
    refuse_external_data(content, stage)
    try:
        onnx.checker.check_model(content)  # parses the bytes itself, so that what follows can
    except onnx.checker.ValidationError as error:
        raise BundleError(f"{stage}: not a valid ONNX model: {error}") from error
    graph = onnx.load_model_from_string(content)
    check_graph(graph, stage, spec.inputs, spec.outputs)
    halves = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.graph.initializer)
    if precision != "int8" and halves != (precision == "float16"):  # its float stages may be either
        raise BundleError(f"{stage}: the manifest states {precision} weights, the graph has others")
    return int(graph.opset_import[0].version)


def run_stages(config: ModelConfig, run: Callable[[str, Arrays], Arrays], inputs: Arrays) -> Arrays:
    """`random_inputs` and what `run(stage, feeds)` makes of them: every output of all stages, and "warped"."""
    arrays = dict(inputs)
    for stage in STAGES:
        if stage == "coarse":
            features = (arrays["theta"], arrays["phi"], arrays["values"])
            arrays["warped"] = warp_arrays(*features, patch=config.patch, temperature=config.temperature).out
        arrays |= run(stage, stage_inputs(config, stage, arrays))
    return arrays


def _compare_model(
    report: Report,
    model: CoCosNet,
    run: Callable[[str, Arrays], Arrays],
    precision: str,
    size: Size,
    inputs: Arrays,
    outputs: Arrays,
) -> None:
    """ONNX Runtime's `outputs` against PyTorch's, and the synthesis once more on PyTorch's own warp."""
    config, batch = model.config, len(inputs["label"])
    label, image, exemplar_label = (torch.from_numpy(inputs[name]) for name in ("label", "image", "exemplar_label"))
    with torch.inference_mode():
        theta = model.encode_query(label)
        phi, values = model.encode_exemplar(image, exemplar_label if config.condition_on_label else None)
        features = (tensor.numpy() for tensor in (theta, phi, values))
        # of numpy, for the runtime's is likely numba's
        plain = warp_arrays(*features, patch=config.patch, temperature=config.temperature, backend="numpy")
        warped = torch.from_numpy(plain.out)
        result, warped_image = model.synthesize(warped, label)
    expected = {"theta": theta, "phi": phi, "values": values, "image": result, "warped_image": warped_image}
    references = {name: tensor.numpy() for name, tensor in expected.items()}
    synthesis = inputs | {"warped": warped.numpy()}
    for stage in ("coarse", "fine"):
        synthesis |= run(stage, stage_inputs(config, stage, synthesis))
    for scope, found in (("stage", outputs | synthesis), ("end to end", outputs)):
        names = references if scope == "stage" else ("image", "warped_image")
        for name in names:
            report.comparisons.append(
                compare(size, batch, scope, name, found[name], references[name], BOUNDS[precision][scope])
            )


def _compare_items(report: Report, precision: str, size: Size, batch: int, few: Arrays, many: Arrays) -> None:
    """The first items of a batch against the same items in a smaller one; only the order of sums may differ."""
    count = len(few["image"])
    bounds = BOUNDS["int8" if precision == "int8" else "float32"]
    scopes = {"theta": "stage", "phi": "stage", "image": "end to end"}
    for name, scope in scopes.items():
        comparison = compare(size, batch, scope, name, many[name][:count], few[name], bounds[scope])
        report.add(
            f"{name} at {size} in batches of {batch} and {count} agrees",
            comparison.ok,
            f"PSNR {comparison.psnr:.1f} dB",
        )


def compare(
    size: Size, batch: int, scope: str, output: str, found: npt.NDArray[Any], reference: npt.NDArray[Any], bound: Bound
) -> Comparison:
    """`found` against `reference`, of equal shape; a different shape is an infinite error."""
    if found.shape != reference.shape:
        return Comparison(size, batch, scope, output, math.inf, math.inf, -math.inf, bound)
    difference = found.astype(np.float64) - reference
    span = float(np.ptp(reference)) or 1.0
    largest = float(np.abs(difference).max())
    rms = float(np.sqrt(np.mean(np.square(difference))))
    psnr = 20 * math.log10(span / rms) if rms else math.inf
    return Comparison(size, batch, scope, output, largest, largest / span, psnr, bound)


def _finite(outputs: Arrays) -> bool:
    return all(bool(np.isfinite(array).all()) for array in outputs.values())


def _row(word: str, *cells: str) -> str:
    widths = (8, 6, 11, 13, 14, 9, 8, 0)
    return f"{word}  {' '.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))}"


def _word(ok: bool) -> str:
    return "ok  " if ok else "FAIL"
