"""From a network to a picture: an exported bundle in the translator against the PyTorch network itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import random_label, random_picture

from flashcocos.config import ModelConfig
from flashcocos.export.bundle_writer import export_bundle
from flashcocos.preprocess import load_image, load_label, to_uint8
from flashcocos.runtime import Translator
from flashcocos.train.checkpoint import save_model
from flashcocos.train.networks import CoCosNet

torch = pytest.importorskip("torch")


def network(config: ModelConfig) -> CoCosNet:
    """A network whose output depends on all of its parts: no branch is scaled to nothing, as it is at the start."""
    torch.manual_seed(0)
    model = CoCosNet(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.5)
    return model


@pytest.mark.parametrize("preset", ["tiny", "tiny-channels"])
def test_the_runtime_equals_the_network(tmp_path: Path, preset: str) -> None:
    config = ModelConfig.preset(preset)
    model = network(config)
    save_model(tmp_path / "model.safetensors", model)
    bundle = export_bundle(tmp_path / "model.safetensors", tmp_path / "bundle.zip")
    with Translator(bundle, device="cpu", warp="numpy") as translator:
        for size, exemplar_size in (((64, 64), (64, 64)), ((96, 64), (64, 96))):
            label, other = random_label(config, *size, 1), random_label(config, *exemplar_size, 2)
            picture = random_picture(*exemplar_size)
            encoded = translator.encode_exemplar(picture, other if config.mask_mixing else None, "input")
            result = translator.translate(label, encoded, "input")
            with torch.inference_mode():
                expected = model(
                    torch.from_numpy(load_label(config, label))[None],
                    torch.from_numpy(load_image(picture))[None],
                    torch.from_numpy(load_label(config, other))[None] if config.mask_mixing else None,
                    backend="reference",
                )
            wanted, warped = to_uint8(expected.image[0].numpy()), to_uint8(expected.warped_image[0].numpy())
            assert wanted.std() > 2  # a flat picture would prove nothing
            assert np.abs(result.image.astype(int) - wanted).max() <= 1
            assert np.abs(result.warped.astype(int) - warped).max() <= 1
