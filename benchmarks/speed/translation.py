"""One translation, label and exemplar to picture, by everything that can do it.

    eager            CoCosNet in PyTorch as published: whole matrices in the warp and in the self-attention
    eager-tiled      flashcocos's own networks in PyTorch: tiled warp and fused attention, no matrix at all
    compiled         torch.compile of `eager`; the compilation is in first_ms
    naive            `eager` as one ONNX graph in ONNX Runtime
    naive-openvino   the same graph in OpenVINO
    runtime          Translator on a bundle

Inputs are seeded noise of the right kind; files are neither read nor decoded in the timed part. Pictures are compared
as uint8.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...config import ModelConfig
from ..registry import Assets, Benchmark, Case, Sample
from .inputs import UInt8Array, differences, inputs, network_inputs, similarity

LABEL_SHIFT = 4  # pixels by which each label is another; the same classes occur in all of them


def prepare(case: Case, assets: Assets) -> Benchmark:
    """A translation; its results are uint8 pictures (H, W, 3).

    parameters: method and size; of the runtime also bundle, backend, precision, cached, label_cached, batch and tile;
    of PyTorch also dtype, where bfloat16 means autocast; of the naive graph also precision.
    """
    methods: dict[str, Callable[[Mapping[str, Any], Assets], tuple[Callable[[], Sample], dict[str, Any]]]] = {
        **dict.fromkeys(("eager", "eager-tiled", "compiled"), _eager),
        "runtime": _runtime,
        "naive": _naive,
        "naive-openvino": _naive_openvino,
    }
    run, facts = methods[case.parameters["method"]](case.parameters, assets)
    path = Path(assets.references) / f"{case.reference or case.name}.npy"

    def check(picture: UInt8Array) -> dict[str, float]:
        if case.reference:
            return differences(picture, np.load(path))
        if assets.references:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, picture)
        return {}

    def score(picture: UInt8Array) -> dict[str, float]:
        return similarity(picture, np.load(path)) if case.reference else {}

    return Benchmark(run, check, score, facts=facts)


def _eager(parameters: Mapping[str, Any], assets: Assets) -> tuple[Callable[[], Sample], dict[str, Any]]:
    import torch

    from ...preprocess import to_uint8
    from ...train.checkpoint import load_model
    from .naive import Published

    method, rounded = parameters["method"], parameters["dtype"] == "bfloat16"
    model = load_model(assets.model)
    tensors = [torch.from_numpy(array) for array in network_inputs(model.config, parameters["size"])]
    network: Callable[..., Any] = Published(model)
    if method == "compiled":
        torch.compiler.config.force_disable_caches = True  # else only the machine's first run compiles
        network = torch.compile(network, dynamic=False)

    @torch.inference_mode()
    def run() -> Sample:
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            picture = model(*tensors).image if method == "eager-tiled" else network(*tensors)
        return Sample(to_uint8(picture[0].float().numpy()))

    return run, {}


def _naive(parameters: Mapping[str, Any], assets: Assets) -> tuple[Callable[[], Sample], dict[str, Any]]:
    import onnxruntime

    from ...preprocess import to_uint8

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = assets.threads or 0
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(assets.naive, options, providers=["CPUExecutionProvider"])
    feeds = _feeds(parameters, assets, [value.name for value in session.get_inputs()])
    return lambda: Sample(to_uint8(session.run(["image"], feeds)[0][0])), {}


def _naive_openvino(parameters: Mapping[str, Any], assets: Assets) -> tuple[Callable[[], Sample], dict[str, Any]]:
    import openvino

    from ...preprocess import to_uint8

    precision = {"float32": "f32", "bfloat16": "bf16"}[parameters["precision"]]
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    if assets.threads:
        options["INFERENCE_NUM_THREADS"] = assets.threads
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(assets.naive), "CPU", options)
    feeds = _feeds(parameters, assets, [port.get_any_name() for port in compiled.inputs])
    return lambda: Sample(to_uint8(compiled(feeds)[0][0])), {}


def _runtime(parameters: Mapping[str, Any], assets: Assets) -> tuple[Callable[[], Sample], dict[str, Any]]:
    from ...runtime import Translator

    start = time.perf_counter()
    translator = Translator(
        assets.bundles[parameters["bundle"]],
        backend=parameters["backend"],
        precision=parameters["precision"],
        device=assets.device,
        num_threads=assets.threads,
        tile=parameters["tile"],
    )
    load = time.perf_counter() - start
    size, batch = parameters["size"], parameters["batch"]
    label, image, image_label = inputs(translator.config, size)
    exemplar_label = image_label if translator.config.condition_on_label else None
    shifts = itertools.count(step=LABEL_SHIFT)

    def new_labels() -> list[Any]:
        """Other labels each time, for the translator keeps what it has encoded; the first is `label` itself."""
        return [np.roll(label, next(shifts), axis=-1) for _ in range(batch)]

    def encode() -> tuple[Any, float]:
        start = time.perf_counter()
        exemplar = translator.encode_exemplar(image, exemplar_label, size)
        return exemplar, 1e3 * (time.perf_counter() - start)

    cached = encode() if parameters["cached"] else None
    encoded = [translator.encode_label(one, size) for one in new_labels()] if parameters["label_cached"] else None

    def run() -> Sample:
        exemplar, encoding = cached or encode()
        result = translator.translate(encoded or new_labels(), exemplar, size, batch_size=batch)[0]
        parts = {stage: share * batch for stage, share in result.timings.items()}
        return Sample(result.image, parts if cached else {"exemplar": encoding, **parts})

    facts = {"load_ms": round(1e3 * load, 1), "warp": translator.describe()["warp"]["backend"]}
    return run, facts | ({"exemplar_ms": round(cached[1], 1)} if cached else {})


def _feeds(parameters: Mapping[str, Any], assets: Assets, names: list[str]) -> dict[str, np.ndarray]:
    """Inputs of the single graph, by their names."""
    return dict(zip(names, network_inputs(ModelConfig.from_json(assets.config), parameters["size"]), strict=True))
