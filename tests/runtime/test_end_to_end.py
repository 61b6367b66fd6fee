"""From a network to a picture: an exported bundle in the translator against the PyTorch network itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from exported import CHANNELS, CLASSES, exported_stage, model_file
from fake_gpu import fake_gpu
from fake_tensorrt import profile
from tiny_bundle import random_label, random_picture

from flashcocos.config import ModelConfig
from flashcocos.export import bundle as bundle_writer
from flashcocos.preprocess import load_image, load_label, to_uint8
from flashcocos.runtime import Translator
from flashcocos.train.checkpoint import load_model

MAX_DIFFERENCE = 1  # of 255: float32 rounding can tip a pixel over a rounding edge, and no more


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "tensorrt"])
@pytest.mark.parametrize("tile", [None, 64], ids=["whole", "tiles"])
@pytest.mark.parametrize("config", [CLASSES, CHANNELS], ids=["classes", "channels"])
def test_the_runtime_equals_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: ModelConfig, tile: int | None, backend: str
) -> None:
    if backend != "tensorrt":
        pytest.importorskip(backend, reason=f"needs the extra {backend}")
    monkeypatch.setattr(bundle_writer, "export_stage", lambda model, stage: exported_stage(model.config, stage))
    bundle = bundle_writer.export_bundle(model_file(config), tmp_path / "bundle.zip")
    model = load_model(model_file(config)).eval()
    options = {"device": "cpu", "warp": "numpy"}
    if backend == "tensorrt":  # a stand-in that runs the graphs on the CPU, with twins of the kernels between them
        options = {}
        fake_gpu(monkeypatch, bundle, profiles=[profile((64, 64, 96), (64, 64, 128))], total=256 << 20)
    with Translator(bundle, backend=backend, tile=tile, **options) as translator:
        for size, exemplar_size in (((64, 64), (64, 64)), ((96, 64), (64, 128))):
            label, exemplar_label = random_label(config, *size, 1), random_label(config, *exemplar_size, 2)
            picture = random_picture(*exemplar_size)
            exemplar = translator.encode_exemplar(
                picture, exemplar_label if config.condition_on_label else None, "input"
            )
            result = translator.translate(label, exemplar, "input")
            with torch.inference_mode():
                expected = model(
                    torch.from_numpy(load_label(config, label))[None],
                    torch.from_numpy(load_image(picture))[None],
                    torch.from_numpy(load_label(config, exemplar_label))[None] if config.condition_on_label else None,
                    backend="reference",
                )
            image, warped = (to_uint8(planes[0].numpy()) for planes in (expected.image, expected.warped_image))
            assert image.std() > 10  # a flat picture would prove nothing
            assert np.abs(result.image.astype(int) - image).max() <= MAX_DIFFERENCE
            assert np.abs(result.warped.astype(int) - warped).max() <= MAX_DIFFERENCE
