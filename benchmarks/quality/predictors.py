"""What makes the pictures to score: a bundle through the runtime, or a model file through PyTorch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from ...config import ModelConfig
from ...errors import InputError
from ...preprocess.images import PathLike, UInt8Array, to_uint8
from ...runtime.options import EngineOptions
from ...train.data import Item

if TYPE_CHECKING:
    from ...runtime import Translator
    from ...train.networks import CoCosNet


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """One translation.

    Attributes:
        image: uint8 (H, W, 3).
        warped: The warped exemplar, uint8 (H, W, 3).
        matches: For each position (h, w) of the map the flat index of the exemplar's position that it matches best.
    """

    image: UInt8Array
    warped: UInt8Array
    matches: npt.NDArray[np.int64]


class Predictor(Protocol):
    """Translates the items of a data set."""

    @property
    def config(self) -> ModelConfig: ...

    def predict(self, item: Item) -> Prediction: ...


class BundlePredictor:
    """Predicts with the runtime, without torch."""

    def __init__(self, translator: Translator) -> None:
        self.translator, self.config = translator, translator.config

    def predict(self, item: Item) -> Prediction:
        height, width = item["label"].shape[-2:]
        label = item["exemplar_label"] if self.config.condition_on_label else None
        exemplar = self.translator.encode_exemplar(to_uint8(item["exemplar"]), label, (height, width))
        result = self.translator.translate(item["label"], exemplar, (height, width))
        step = self.config.warp_stride
        x, y = np.moveaxis(result.matches.astype(np.int64) // step, -1, 0)
        return Prediction(result.image, result.warped, y * (width // step) + x)


class ModelPredictor:
    """Predicts with the network in the mode that it is in."""

    def __init__(self, model: CoCosNet) -> None:
        self.model, self.config = model, model.config

    def predict(self, item: Item) -> Prediction:
        import torch

        from ...kernels import corr_match

        device = next(self.model.parameters()).device
        label, exemplar, exemplar_label = (
            torch.as_tensor(item[name])[None].to(device) for name in ("label", "exemplar", "exemplar_label")
        )
        with torch.inference_mode():
            result = self.model(label, exemplar, exemplar_label if self.config.condition_on_label else None)
            match = corr_match(result.theta, result.phi, patch=self.config.patch, temperature=self.config.temperature)
        image, warped = (to_uint8(x[0].float().cpu().numpy()) for x in (result.image, result.warped_image))
        return Prediction(image, warped, match.index[0].cpu().numpy())


def open_predictor(path: PathLike, options: EngineOptions) -> Predictor:
    """Open a model file (.safetensors) or a bundle.

    Args:
        path: The file, or the bundle's folder or .zip.
        options: For a bundle. A model file runs in PyTorch on their device and has its own kernels for the warp.

    Returns:
        The predictor.

    Raises:
        InputError: A model file has no such backend or precision.
        FlashcocosError: Any error of `checkpoint.load_model` and of `Translator`.
    """
    if Path(path).suffix == ".safetensors":
        if options.backend not in ("auto", "onnxruntime") or options.precision not in (None, "float32"):
            wanted = f"backend {options.backend!r}, precision {options.precision!r}"
            raise InputError(f"{path}: a model file runs in PyTorch in float32; {wanted} needs a bundle")
        from ...train.checkpoint import load_model
        from ...train.device import torch_device

        return ModelPredictor(load_model(path).to(torch_device(options.device)))
    from ...runtime import Translator

    return BundlePredictor(Translator(path, **vars(options)))
