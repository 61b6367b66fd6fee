"""`Engine`: what the service needs of a model; and `LocalEngine`, a `Translator` in this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy.typing as npt
from PIL import Image

from ..bundle import Bundle
from ..bundle.default_model import resolve_model
from ..config import ModelConfig
from ..preprocess.palette import legend
from ..runtime import Exemplar, Translation, Translator
from .config import ServeConfig
from .wire import content_id

Label = npt.NDArray[Any]  # class ids uint8 (H, W), or planes uint8 (channels, H, W)


@dataclasses.dataclass(frozen=True)
class Description:
    """What a model is.

    Attributes:
        name: the bundle's, for people.
        id: 32 hexadecimal digits, the same wherever the same weights run.
        config: its network.
        class_names, palette: of each class; empty for labels of planes.
        stages: for each stage, the fields of `EngineInfo`.
    """

    name: str
    id: str
    config: ModelConfig
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    stages: dict[str, dict[str, str]]

    @property
    def on_gpu(self) -> bool:
        """Whether a stage runs on a GPU."""
        return any(stage["device"] != "cpu" for stage in self.stages.values())


class Engine(Protocol):
    """A model. Calls block, come from several threads, and raise the exceptions of `flashcocos.errors`."""

    def describe(self) -> Description:
        """What the model is; constant."""
        ...

    def encode(self, image: Image.Image, label: Label | None) -> Exemplar:
        """An exemplar of a picture and, for models that want it, its label, both of the size to encode at."""
        ...

    def translate(self, labels: Sequence[Label], exemplars: Sequence[Exemplar]) -> list[Translation]:
        """A result for each label of a batch, all of one size, with the exemplar of the same index."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


class LocalEngine:
    """The bundle that `config` names, opened in this process; raises as `Translator` does."""

    def __init__(self, config: ServeConfig) -> None:
        bundle = Bundle(resolve_model(config.model or None))
        self._translator = Translator(bundle, **vars(config.engine_options()))
        manifest = bundle.manifest
        names, colors = legend(manifest.config)
        graphs = {manifest.files[stage.file].sha256 for stage in manifest.stages.values()}
        self._description = Description(
            name=bundle.path.stem,
            id=content_id(*sorted(map(str.encode, graphs))),
            config=manifest.config,
            class_names=manifest.class_names or names,
            palette=manifest.palette or colors,
            stages=self._translator.describe(),
        )

    def describe(self) -> Description:
        """As `Engine`."""
        return self._description

    def encode(self, image: Image.Image, label: Label | None) -> Exemplar:
        """As `Engine`."""
        return self._translator.encode_exemplar(image, label, size=(image.height, image.width))

    def translate(self, labels: Sequence[Label], exemplars: Sequence[Exemplar]) -> list[Translation]:
        """As `Engine`."""
        return self._translator.translate(list(labels), list(exemplars), size="input", batch_size=len(labels))

    def close(self) -> None:
        """As `Engine`."""
        self._translator.close()
