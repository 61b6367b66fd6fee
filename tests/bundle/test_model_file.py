"""The model files of the shipped models: each is the network of the bundle beside it."""

from __future__ import annotations

import csv

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from flashcocos.bundle import STAGES, Bundle
from flashcocos.bundle.default_model import FOLDER, MODEL, NAMES, PAIRS, SOURCE
from flashcocos.preprocess import load_image, load_label, to_uint8
from flashcocos.runtime import Translator
from flashcocos.train.checkpoint import load_model


@pytest.mark.parametrize("name", NAMES)
def test_the_bundles_weights_are_the_model_files(name: str) -> None:
    model, bundle = load_model(FOLDER / f"{name}.safetensors"), Bundle(FOLDER / f"{name}.zip")
    assert bundle.manifest.config == model.config
    state = {key: tensor.numpy().astype(np.float16) for key, tensor in model.state_dict().items()}
    stored: dict[str, np.ndarray] = {}
    for stage in STAGES:
        for tensor in onnx.load_from_string(bundle.read_stage(stage)).graph.initializer:
            key = tensor.name.removesuffix(".float16").removeprefix("model.").replace(".convolution.", ".")
            if key in state:
                stored[key] = numpy_helper.to_array(tensor).astype(np.float16)
    assert state.keys() - stored.keys() == {"correspondence.residual.0.prelu.weight"}  # a constant of its nodes
    for key, array in stored.items():
        np.testing.assert_array_equal(array.reshape(state[key].shape), state[key], err_msg=key)


@torch.inference_mode()
def test_the_model_file_makes_the_shipped_pictures() -> None:
    model = load_model(SOURCE)
    pairs = list(csv.DictReader(PAIRS.read_text(encoding="utf-8").splitlines()))
    assert len(pairs) == 6
    with Translator(MODEL, device="cpu") as shipped:
        for pair in pairs:
            paths = [PAIRS.parent / pair[key] for key in ("input", "exemplar", "exemplar_label")]
            expected = shipped.translate(paths[0], shipped.encode_exemplar(*paths[1:]))
            label, exemplar_label = (torch.tensor(load_label(model.config, path))[None] for path in paths[::2])
            exemplar = torch.from_numpy(load_image(paths[1]))[None]
            result = model(label, exemplar, exemplar_label)
            difference = to_uint8(result.image[0].numpy()).astype(int) - expected.image
            assert np.abs(difference).max() <= 1
