"""An `Engine` of the service without a model: it paints, waits when told to, and remembers what it was asked."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from tiny_bundle import CHANNELS, CLASSES

from flashcocos.config import ModelConfig
from flashcocos.runtime import Exemplar, Translation
from flashcocos.serve.engine import Description

__all__ = ["CHANNELS", "CLASSES", "FakeEngine", "painted"]


class FakeEngine:
    """Results are `painted`. While `gate` is closed, translations wait; `fail` is raised for labels that hold 11."""

    def __init__(self, config: ModelConfig = CLASSES) -> None:
        self.config = config
        self.gate = threading.Event()
        self.gate.set()
        self.fail: Exception | None = None
        self.batches: list[int] = []
        self.seen: list[int] = []  # the first class id of each label
        self.encoded = 0

    def describe(self) -> Description:
        stage = {"backend": "fake", "provider": "", "device": "cpu", "precision": "", "arithmetic": ""}
        names = tuple(f"class {number}" for number in range(self.config.label_channels))
        colors = tuple((number, 0, 0) for number in range(self.config.label_channels))
        if self.config.label_kind != "classes":
            names = colors = ()
        return Description("fake", "0" * 32, self.config, names, colors, {"query": stage})

    def encode(self, image: Image.Image, label: Any) -> Exemplar:
        self.encoded += 1
        assert (label is not None) == self.config.condition_on_label
        average = np.asarray(image.resize((1, 1)), np.float32).reshape(1, 3, 1, 1)
        return Exemplar(average, np.zeros((1, 3, 1, 1), np.float32), (image.height, image.width), "0" * 64)

    def translate(self, labels: Sequence[Any], exemplars: Sequence[Exemplar]) -> list[Translation]:
        assert self.gate.wait(30)
        self.batches.append(len(labels))
        self.seen += [int(label.flat[0]) for label in labels]
        if self.fail and any((label == 11).any() for label in labels):
            raise self.fail
        return [self._result(label, exemplar) for label, exemplar in zip(labels, exemplars, strict=True)]

    def close(self) -> None:
        pass

    def _result(self, label: Any, exemplar: Exemplar) -> Translation:
        image = painted(label, exemplar.phi.reshape(3))
        height, width = image.shape[0] // 4, image.shape[1] // 4
        matches = np.full((height, width, 2), 2, np.float32)
        confidence = np.full((height, width), 0.5, np.float32)
        timings = {"query": 1.0, "warp": 2.0, "synthesis": 3.0}
        return Translation(image, image[::-1].copy(), confidence, matches, exemplar.size, timings)


def painted(label: Any, color: Any) -> np.ndarray:
    """The average color of the exemplar, darker for higher class ids."""
    ids = label if label.ndim == 2 else label[0]
    return (np.asarray(color, np.float32) * (1 - ids[..., None].astype(np.float32) / 256)).astype(np.uint8)
