"""Model bundles small enough to make in a test: a few ONNX operators a stage, no trained weights, no torch.

theta is a fixed 1x1 convolution of the label averaged over the pixels of each position and phi the same of the
exemplar's label (of its picture, where the label is not mixed in), so that equal labels match; the synthesis enlarges
the warped colors and adds a little of the label around and of features made of the colors.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from flashcocos.bundle import STAGES, Manifest, StageSpec, write_bundle
from flashcocos.bundle.stages import stage_tensors
from flashcocos.config import ModelConfig

CLASSES = ModelConfig.preset("tiny", warp_upsampling="nearest")
CHANNELS = ModelConfig.preset("tiny-channels")
FINE = ModelConfig.preset("tiny", warp_upsampling="nearest", warp_stride=2)
_TYPES = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8}


def write_tiny_bundle(
    path: Path, config: ModelConfig = CLASSES, change: Callable[[str, ModelProto], None] | None = None, *, seed: int = 0
) -> Path:
    """A valid bundle at `path`; `change(stage, model)` may damage a graph before it is written."""
    tensors = stage_tensors(config)
    files, stages = {}, {}
    for stage in STAGES:
        model = _graph(stage, config, seed)
        if change is not None:
            change(stage, model)
        files[f"{stage}.onnx"] = model.SerializeToString()
        stages[stage] = StageSpec(f"{stage}.onnx", *tensors[stage])
    return write_bundle(path, Manifest(config, "float32", 20, stages, {}), files)


def random_label(config: ModelConfig, height: int, width: int, seed: int = 0) -> np.ndarray:
    """A prepared label of blocks of 8 pixels: ids (H, W) uint8, or planes (channels, H, W) uint8."""
    generator = np.random.default_rng(seed)
    blocks = (-(-height // 8), -(-width // 8))
    if config.label_kind == "classes":
        coarse = generator.integers(0, config.label_channels, blocks, np.uint8)
    else:
        coarse = generator.integers(0, 256, (config.label_channels, *blocks), np.uint8)
    return coarse.repeat(8, -1).repeat(8, -2)[..., :height, :width]


def random_picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Colored blocks of 4 pixels, (H, W, 3) uint8."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (-(-height // 4), -(-width // 4), 3), np.uint8)
    return coarse.repeat(4, 0).repeat(4, 1)[:height, :width]


def _graph(stage: str, config: ModelConfig, seed: int) -> ModelProto:
    generator = np.random.default_rng(seed)
    source = config.label_channels if stage == "query" or config.condition_on_label else 3
    features = generator.standard_normal((config.feature_channels, source, 1, 1)).astype(np.float32)
    constants: dict[str, np.ndarray] = {}
    stride = config.warp_stride
    if stage == "query":
        nodes = [
            *_planes(config, constants),
            _pool("planes", "coarse", stride),
            _node("Conv", ["coarse", "w"], "theta"),
        ]
        constants["w"] = features
    elif stage == "exemplar":
        nodes = [_values(config)]
        nodes += (
            [*_planes(config, constants), _pool("planes", "c", stride)]
            if config.condition_on_label
            else [_pool("image", "c", stride)]
        )
        nodes += [_node("Conv", ["c", "w"], "phi")]
        constants["w"] = features
    elif stage == "coarse":
        constants["scales"] = np.array([1, 1, stride / 2, stride / 2], np.float32)
        wide = 4 * config.ngf
        constants["w"] = generator.standard_normal((wide, config.warped_channels, 1, 1)).astype(np.float32)
        constants["mix"] = generator.standard_normal((wide, config.label_channels, 1, 1)).astype(np.float32)
        nodes = [
            *_planes(config, constants),
            _node("Resize", ["warped", "", "scales"], "larger", mode="nearest"),
            _node("Conv", ["larger", "w"], "colors"),
            _node("Conv", ["planes", "mix"], "places", strides=[2, 2]),
            _node("Add", ["colors", "places"], "features"),
        ]
    else:
        constants["twice"] = np.array([1, 1, 2, 2], np.float32)
        if config.warp_upsampling == "pixel_shuffle":
            nodes = [_node("DepthToSpace", ["warped"], "warped_image", blocksize=stride, mode="DCR")]
        else:
            constants["scales"] = np.array([1, 1, stride, stride], np.float32)
            nodes = [_node("Resize", ["warped", "", "scales"], "warped_image", mode="nearest")]
        constants["mix"] = 0.1 * generator.standard_normal((3, config.label_channels, 1, 1)).astype(np.float32)
        constants["shade"] = 0.02 * generator.standard_normal((3, 4 * config.ngf, 1, 1)).astype(np.float32)
        nodes += [
            *_planes(config, constants),
            _node("Conv", ["planes", "mix"], "tint"),
            # the neighbors count, as they do in the network: a tile that is cut too close differs
            _node("AveragePool", ["tint"], "rows", kernel_shape=[25, 1], pads=[12, 0, 12, 0]),
            _node("AveragePool", ["rows"], "soft", kernel_shape=[1, 25], pads=[0, 12, 0, 12]),
            _node("Conv", ["features", "shade"], "shades"),
            _node("Resize", ["shades", "", "twice"], "shadow", mode="nearest"),
            _node("Sum", ["warped_image", "soft", "shadow"], "sum"),
            _node("Tanh", ["sum"], "image"),
        ]
    inputs, outputs = (
        [helper.make_tensor_value_info(t.name, _TYPES[t.dtype], list(t.shape)) for t in tensors]
        for tensors in stage_tensors(config)[stage]
    )
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, stage, inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _planes(config: ModelConfig, constants: dict[str, np.ndarray]) -> list[NodeProto]:
    if config.label_kind == "channels":
        return [_node("Identity", ["label"], "planes")]
    constants["ids"] = np.arange(config.label_channels, dtype=np.int32).reshape(1, -1, 1, 1)
    constants["one"] = np.array([1], np.int64)
    return [
        _node("Unsqueeze", ["label", "one"], "stacked"),
        _node("Cast", ["stacked"], "wide", to=TensorProto.INT32),  # the standard's Equal takes no uint8
        _node("Equal", ["wide", "ids"], "is_class"),
        _node("Cast", ["is_class"], "planes", to=TensorProto.FLOAT),
    ]


def _values(config: ModelConfig) -> NodeProto:
    if config.warp_upsampling == "pixel_shuffle":
        return _node("SpaceToDepth", ["image"], "values", blocksize=config.warp_stride)
    return _pool("image", "values", config.warp_stride)


def _pool(source: str, target: str, stride: int) -> NodeProto:
    return _node("AveragePool", [source], target, kernel_shape=[stride, stride], strides=[stride, stride])


def _node(operator: str, inputs: list[str], output: str, **attributes: object) -> NodeProto:
    return helper.make_node(operator, inputs, [output], **attributes)
