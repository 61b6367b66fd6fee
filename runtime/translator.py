"""`Translator`: an opened model bundle that turns a label and an exemplar into a picture. Numpy in, numpy out.

Each half of the correspondence network depends on the exemplar or the label alone (arXiv 2004.05571, section 3.1), so
`encode_exemplar` and `encode_label` run it once for any number of translations. What runs where is in backends.py.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from ..bundle import Bundle
from ..bundle.default_model import resolve_model
from ..bundle.stages import check_stages
from ..config import MAX_SIDE, MIN_SIDE, SIZE_MULTIPLE, ModelConfig, Size, is_side
from ..errors import InputError
from ..preprocess.images import FloatArray, ImageSource, UInt8Array, load_image, load_rgb
from ..preprocess.labels import LabelSource, load_label, resize_nearest
from .backends import open_pipeline
from .options import EngineOptions
from .pipeline import EncodedLabel, Exemplar, Pipeline

__all__ = ["EncodedLabel", "EngineOptions", "Exemplar", "Translation", "Translator", "resolve_size"]

_log = logging.getLogger("flashcocos.runtime")


@dataclasses.dataclass(frozen=True, eq=False)
class Translation:
    """One result, of height H and width W, with a map of h x w positions of correspondence, h = H / warp_stride.

    Attributes:
        image: the translated picture, (H, W, 3) uint8.
        warped: the exemplar's colors laid out as the label asks, before synthesis, (H, W, 3) uint8.
        confidence: the share of a position's softmax that its best match has, (h, w) float32 in [0, 1].
        matches: (x, y) of the best match's center in pixels of the exemplar at `Exemplar.size`, (h, w, 2) float32.
            (0, 0) is the upper left corner of the picture and (0.5, 0.5) the middle of its first pixel.
        exemplar_size: (height, width) of the exemplar that `matches` refers to.
        timings: milliseconds of "query", "warp" and "synthesis", or only "total" where one CUDA graph ran all of them;
            in a batch, an equal share.
    """

    image: UInt8Array
    warped: UInt8Array
    confidence: FloatArray
    matches: FloatArray
    exemplar_size: tuple[int, int]
    timings: Mapping[str, float]


class Translator:
    """A model bundle, ready to translate. Safe to share between threads; use as a context manager or call `close`.

    Example:
        >>> with Translator("model.zip") as translator:
        ...     exemplar = translator.encode_exemplar("photo.jpg", "photo_label.png")
        ...     result = translator.translate("label.png", exemplar)
        >>> Image.fromarray(result.image).save("result.png")

    Args:
        bundle: path of a bundle folder or zip, or an opened `Bundle`; None for the model that ships with flashcocos.
        backend: what runs the graphs. This and all following arguments are described in `EngineOptions`.
        device: "auto", "cpu" or "cuda".
        precision: of the arithmetic.
        warp: which code warps.
        num_threads: CPU threads of each graph.
        engines: folder that `flashcocos build` wrote.
        exemplar_cache_mib: MiB of GPU memory for encoded exemplars.
        tile: side in pixels of the tiles of larger pictures.

    Raises:
        InputError: the bundle is missing, or an option is unknown, excludes another or is of no use here.
        BundleError: the bundle is damaged or hostile.
        BackendError: the backend, device, precision, an engine or the warp's compiled kernels are missing here.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str] | Bundle | None = None,
        *,
        backend: str = "auto",
        device: str = "auto",
        precision: str | None = None,
        warp: str = "auto",
        num_threads: int | None = None,
        engines: str | os.PathLike[str] | None = None,
        exemplar_cache_mib: int | None = None,
        tile: int | None = None,
    ) -> None:
        options = EngineOptions(
            backend=backend,
            device=device,
            precision=precision,
            warp=warp,
            num_threads=num_threads,
            engines=engines,
            exemplar_cache_mib=exemplar_cache_mib,
            tile=tile,
        )
        opened = _open_bundle(bundle)
        check_stages(opened.manifest)
        self._take(opened, open_pipeline(opened, options))

    @classmethod
    def over(cls, bundle: Bundle, pipeline: Pipeline) -> Translator:
        """A translator whose stages `pipeline` runs, which it closes; `BundleError` where they are not the bundle's."""
        check_stages(bundle.manifest)
        translator = cls.__new__(cls)
        translator._take(bundle, pipeline)
        return translator

    def _take(self, bundle: Bundle, pipeline: Pipeline) -> None:
        self.bundle, manifest = bundle, bundle.manifest
        self.config = manifest.config
        self._model, self._label_model = (manifest.graph_file(stage).sha256 for stage in ("exemplar", "query"))
        self._warned_of_proportions = False
        self._pipeline = pipeline
        self._release = weakref.finalize(self, self._pipeline.close)  # also where nobody closes it, and at exit

    def __enter__(self) -> Translator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the graphs; translating afterwards raises `BackendError`. Running translations finish."""
        self._release()

    def describe(self) -> dict[str, dict[str, str]]:
        """For every stage, the warp included, the fields of `EngineInfo`."""
        return {name: dataclasses.asdict(info) for name, info in self._pipeline.describe().items()}

    def encode_exemplar(self, image: ImageSource, label: LabelSource | None = None, size: Size = None) -> Exemplar:
        """Encode an exemplar once, for any number of translations.

        Args:
            image: path, Pillow image or uint8 array (H, W, 3).
            label: the picture's prepared label, for models that condition the matching on it
                (`config.condition_on_label`), and only for those.
            size: as for `translate`; "input" is the picture's own size.

        Returns:
            The encoded exemplar, for this model alone.

        Raises:
            InputError: the picture, label or size cannot be used, or the label is missing or of no use.
            BackendError: the stage fails, for example out of memory.
        """
        if self.config.condition_on_label and label is None:
            raise InputError(
                f"a model for {self.config.task} needs the exemplar's label: encode_exemplar(image, label)"
            )
        if label is not None and not self.config.condition_on_label:
            raise InputError(f"a model for {self.config.task} takes no label for the exemplar: encode_exemplar(image)")
        picture = load_rgb(image)
        height, width = resolve_size(self.config, size, (picture.height, picture.width))
        inputs: dict[str, npt.NDArray[Any]] = {"image": load_image(picture, (height, width))[None]}
        if label is not None:
            planes = load_label(self.config, label)
            self._compare_proportions(picture.size, (planes.shape[-1], planes.shape[-2]))
            inputs["label"] = resize_nearest(planes, (height, width))[None]
        phi, values = self._pipeline.encode(inputs)
        phi.flags.writeable = values.flags.writeable = False
        return Exemplar(phi, values, (height, width), self._model)

    def encode_label(self, label: LabelSource, size: Size = None) -> EncodedLabel:
        """Encode a label once, for translations with any number of exemplars.

        A label that comes again soon is not encoded again anyway; this spares reading and comparing it too, and keeps
        it for as long as the result is held. On a GPU it is encoded with each picture all the same.

        Args:
            label: as for `translate`.
            size: as for `translate`.

        Returns:
            The encoded label, for this model alone.

        Raises:
            InputError: the label or size cannot be used.
            BackendError: the stage fails, for example out of memory.
        """
        planes = self._label(label, size).planes.copy()  # the source may be the caller's own array
        planes.flags.writeable = False
        return EncodedLabel(planes, self._pipeline.encode_label(planes[None]), self._label_model)

    @overload
    def translate(self, label: LabelSource | EncodedLabel, exemplar: Exemplar, size: Size = None) -> Translation: ...

    @overload
    def translate(
        self,
        label: list[Any] | tuple[Any, ...],
        exemplar: Exemplar | Sequence[Exemplar],
        size: Size = None,
        *,
        batch_size: int = 4,
    ) -> list[Translation]: ...

    def translate(
        self,
        label: LabelSource | EncodedLabel | list[Any] | tuple[Any, ...],
        exemplar: Exemplar | Sequence[Exemplar],
        size: Size = None,
        *,
        batch_size: int = 4,
    ) -> Translation | list[Translation]:
        """Translate one label, or a list or tuple of labels with one exemplar for all or one each.

        Args:
            label: a prepared label (path, array, or Pillow image of class ids) or a result of `encode_label`, or a list
                or tuple of them.
            exemplar: result of `encode_exemplar`; for several labels, one for all or a sequence of one for each.
            size: (height, width) or the side of a square, in multiples of 32 from 64 to 8192; None is the square the
                model was trained at; "input" the label's own size, rounded to multiples of 32. An encoded label has its
                size already. The exemplar's size may differ.
            batch_size: labels of one size that run together; more is faster on a GPU and takes more memory. TensorRT
                runs as many of them together as an engine was built for.

        Returns:
            A `Translation`, or for a list or tuple of labels a list in their order.

        Raises:
            InputError: a label, exemplar, size or batch size cannot be used.
            BackendError: a stage fails, for example out of memory.
        """
        if not isinstance(label, list | tuple):
            return self._translate([self._label(label, size)], [self._check_exemplar(exemplar)])[0]
        exemplars = list(exemplar) if isinstance(exemplar, Sequence) else [exemplar] * len(label)
        if len(exemplars) != len(label):
            raise InputError(f"{len(label)} labels with {len(exemplars)} exemplars; give one exemplar, or one a label")
        if type(batch_size) is not int or batch_size < 1:
            raise InputError(f"batch_size: expected a whole number from 1, got {batch_size!r}")
        exemplars = [self._check_exemplar(item) for item in exemplars]
        labels = [self._label(item, size) for item in label]
        by_size: dict[tuple[int, ...], list[int]] = {}
        for index, encoded in enumerate(labels):
            by_size.setdefault(encoded.size, []).append(index)
        results: dict[int, Translation] = {}
        for indices in by_size.values():
            for start in range(0, len(indices), batch_size):
                part = indices[start : start + batch_size]
                batch = self._translate([labels[i] for i in part], [exemplars[i] for i in part])
                results.update(zip(part, batch, strict=True))
        return [results[index] for index in range(len(labels))]

    def _translate(self, labels: list[EncodedLabel], exemplars: list[Exemplar]) -> list[Translation]:
        planes, thetas = np.stack([label.planes for label in labels]), [label.theta for label in labels]
        return [
            Translation(
                image=result.image,
                warped=result.warped,
                confidence=result.probability,
                matches=self._positions(result.index, exemplar),
                exemplar_size=exemplar.size,
                timings=result.timings,
            )
            for result, exemplar in zip(self._pipeline.render(planes, exemplars, thetas), exemplars, strict=True)
        ]

    def _positions(self, index: npt.NDArray[np.int64], exemplar: Exemplar) -> FloatArray:
        y, x = np.divmod(index, exemplar.phi.shape[3])
        return ((np.stack([x, y], axis=-1) + 0.5) * self.config.warp_stride).astype(np.float32)

    def _label(self, source: LabelSource | EncodedLabel, size: Size) -> EncodedLabel:
        """A label at `size`, its theta None where it was not encoded before."""
        if not isinstance(source, EncodedLabel):
            planes = load_label(self.config, source)
            resized = resize_nearest(planes, resolve_size(self.config, size, planes.shape[-2:]))
            return EncodedLabel(resized, None, self._label_model)
        if source.model != self._label_model:
            raise InputError("label: encoded by another model; encode it with this translator")
        if size is not None and resolve_size(self.config, size, source.size) != source.size:
            raise InputError(
                f"size: the label was encoded at {source.size[1]} x {source.size[0]} pixels, got {size!r}; leave size "
                "out, or encode the label again"
            )
        return source

    def _compare_proportions(self, picture: tuple[int, int], label: tuple[int, int]) -> None:
        """Warn once where an exemplar and its label, each (width, height), differ by more than a rounded pixel."""
        skew = abs(picture[0] * label[1] - picture[1] * label[0])
        if skew > max(sum(picture), sum(label)) and not self._warned_of_proportions:
            self._warned_of_proportions = True
            _log.warning(
                "exemplar of %d x %d pixels (width x height) with a label of %d x %d: the proportions differ, so the "
                "label may not fit the picture, which its EXIF orientation may have turned",
                *picture,
                *label,
            )

    def _check_exemplar(self, exemplar: object) -> Exemplar:
        if not isinstance(exemplar, Exemplar):
            raise InputError(f"exemplar: expected the result of encode_exemplar, got {type(exemplar).__name__}")
        if exemplar.model != self._model:
            raise InputError("exemplar: encoded by another model; encode it with this translator")
        return exemplar


def _open_bundle(bundle: object) -> Bundle:
    if isinstance(bundle, Bundle):
        return bundle
    if bundle is not None and not isinstance(bundle, str | os.PathLike):
        raise InputError(f"bundle: expected the path of a model bundle, a Bundle or None; got {bundle!r}")
    return Bundle(resolve_model(bundle))


def resolve_size(config: ModelConfig, size: Size, source_size: tuple[int, ...]) -> tuple[int, int]:
    """(height, width) that `size`, as `Translator.translate` takes it, means for a source of `source_size`.

    Raises `InputError`.
    """
    if size is None:
        return config.image_size, config.image_size
    if size == "input":
        rounded = (round(side / SIZE_MULTIPLE) * SIZE_MULTIPLE for side in source_size)
        sides: tuple[Any, ...] = tuple(max(MIN_SIDE, side) for side in rounded)
    else:
        sides = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(sides) != 2 or not all(map(is_side, sides)):
        raise InputError(
            f'size: expected "input", one side or (height, width), each a multiple of {SIZE_MULTIPLE} from {MIN_SIDE}; '
            f"got {size!r}"
        )
    if max(sides) > MAX_SIDE:
        raise InputError(
            f"size: {sides[1]} x {sides[0]} pixels; expected at most {MAX_SIDE} a side: scale the input down"
        )
    return sides[0], sides[1]
