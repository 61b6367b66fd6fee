"""`Translator`: an opened model bundle that turns a label and an exemplar into a picture. Numpy in, numpy out.

The exemplar's half of the correspondence network depends on the exemplar alone (arXiv 2004.05571, section 3.1), so it
is run once by `encode_exemplar` and its result is used for any number of labels. What runs where is in pipeline.py.
"""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from ..bundle import Bundle
from ..bundle.default_model import resolve_model
from ..bundle.stages import check_stages
from ..config import SIZE_MULTIPLE, ModelConfig
from ..errors import InputError
from ..preprocess.images import FloatArray, ImageSource, UInt8Array, load_image, load_rgb
from ..preprocess.labels import LabelSource, load_label, resize_nearest
from .pipeline import Exemplar, Pipeline, open_pipeline

MIN_SIDE = 2 * SIZE_MULTIPLE  # of what is translated, in pixels: the generator starts at 1/32 and needs two there
MAX_SIDE = 8192
Size: TypeAlias = "int | tuple[int, int] | str | None"


@dataclasses.dataclass(frozen=True, eq=False)
class Translation:
    """One result, of height H and width W, with h = H / 4 and w = W / 4 positions of correspondence.

    image: (H, W, 3) uint8, the translated picture.
    warped: (H, W, 3) uint8, the exemplar's colors laid out as the label asks, before synthesis.
    confidence: (h, w) float32 in [0, 1], how much of a position's softmax its best match holds.
    matches: (h, w, 2) float32, (x, y) of the best match's center in pixels of the exemplar at `Exemplar.size`, where
        (0, 0) is the upper left corner of the picture and (0.5, 0.5) the middle of its first pixel.
    exemplar_size: (height, width) of the exemplar that `matches` refers to.
    timings: milliseconds of "query", "warp" and "synthesis", or only "total" where one CUDA graph ran all of them; in a
        batch, an equal share.
    """

    image: UInt8Array
    warped: UInt8Array
    confidence: FloatArray
    matches: FloatArray
    exemplar_size: tuple[int, int]
    timings: Mapping[str, float]


class Translator:
    """A model bundle, ready to translate. Safe to share between threads; use as a context manager or call `close`.

    bundle: path of a bundle folder or zip, or an opened `Bundle`; without one, the model that ships with flashcocos.
    backend: "onnxruntime", "openvino" (for the CPU), or on a GPU "tensorrt" or "tensorrt-rtx", whose engines
        `flashcocos build` makes. device: "cpu", "cuda", or "auto" (CUDA where it starts, else the CPU; logged once).
    threads: CPU threads of each graph, None for one per core; the warp's are set by `NUMBA_NUM_THREADS`.
    warp: "numba" or "numpy" on the CPU, "cuda" on the GPU, or "auto": on the GPU with TensorRT and with device "cuda",
        else numba where it is installed. On the GPU nothing leaves it between label and picture.
    precision: that the graphs compute in. None: float32 on the CPU, tf32 or float32 in ONNX Runtime on a GPU, and the
        fastest that was built with TensorRT. Else "float32", "bfloat16" with OpenVINO on a CPU that has it, or
        "float16" with TensorRT.
    engines: the folder of TensorRT engines and of the warp's kernels that `flashcocos build` wrote; None for the one
        beside the bundle, NAME.engines.
    exemplar_cache_mib: MiB of device memory for encoded exemplars, 512 unless given.
    tile: side in pixels, a multiple of 32 from 64, of the tiles that the second half of the synthesis makes larger
        pictures in: less memory, the same picture, some work twice. None makes pictures whole.
    Raises `InputError` for a missing bundle and for options unknown or that do not go together, `BundleError` for a
    damaged or hostile bundle, and `BackendError` where the backend, device, precision, an engine or the warp's compiled
    kernels are not there.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str] | Bundle | None = None,
        *,
        backend: str = "onnxruntime",
        device: str = "auto",
        threads: int | None = None,
        warp: str = "auto",
        precision: str | None = None,
        engines: str | os.PathLike[str] | None = None,
        exemplar_cache_mib: int | None = None,
        tile: int | None = None,
    ) -> None:
        model = resolve_model(bundle)
        opened = model if isinstance(model, Bundle) else Bundle(model)
        check_stages(opened.manifest)
        self.bundle = opened
        self.config = opened.manifest.config
        self._model = opened.manifest.files[opened.manifest.stages["exemplar"].file].sha256
        self._pipeline: Pipeline = open_pipeline(
            opened,
            backend=backend,
            device=device,
            threads=threads,
            warp=warp,
            precision=precision,
            engines=engines,
            exemplar_cache_mib=exemplar_cache_mib,
            tile=tile,
        )
        self._release = weakref.finalize(self, self._pipeline.close)  # also where nobody closes it, and at exit

    def __enter__(self) -> Translator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the graphs; translating afterwards raises `BackendError`. Running translations finish."""
        self._release()

    def describe(self) -> dict[str, dict[str, str]]:
        """For every stage, the warp included, the fields of `EngineInfo`."""
        return {name: dataclasses.asdict(info) for name, info in self._pipeline.describe().items()}

    def encode_exemplar(self, image: ImageSource, label: LabelSource | None = None, size: Size = None) -> Exemplar:
        """Encode an exemplar once, for any number of translations.

        image: path, Pillow image or uint8 array (H, W, 3). label: its prepared label, for models that mix the label
        into the matching (`config.condition_on_label`), and only for those. size: as for `translate`; "input" is the
        picture's own size. Raises `InputError`.
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
            inputs["label"] = resize_nearest(load_label(self.config, label), (height, width))[None]
        phi, values = self._pipeline.encode(inputs)
        phi.flags.writeable = values.flags.writeable = False
        return Exemplar(phi, values, (height, width), self._model)

    @overload
    def translate(self, label: LabelSource, exemplar: Exemplar, size: Size = None) -> Translation: ...

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
        label: LabelSource | list[Any] | tuple[Any, ...],
        exemplar: Exemplar | Sequence[Exemplar],
        size: Size = None,
        *,
        batch_size: int = 4,
    ) -> Translation | list[Translation]:
        """Translate one label, or a list or tuple of labels with one exemplar for all or one each.

        label: a prepared label: path, array, or Pillow image of class ids.
        size: (height, width) or the side of a square, in multiples of 32 from 64 to 8192; None is the square the model
            was trained at; "input" the label's own size, rounded to multiples of 32. The exemplar's size may differ.
        batch_size: labels of one size that run together; more is faster on a GPU and takes more memory. TensorRT
            runs as many of them together as an engine was built for.
        Raises `InputError` for what cannot be used, `BackendError` where a stage fails, say out of memory.
        """
        if not isinstance(label, list | tuple):
            return self._translate([self._label(label, size)], [self._check_exemplar(exemplar)])[0]
        exemplars = [exemplar] * len(label) if isinstance(exemplar, Exemplar) else list(exemplar)
        if len(exemplars) != len(label):
            raise InputError(f"{len(label)} labels with {len(exemplars)} exemplars; give one exemplar, or one a label")
        if batch_size < 1:
            raise InputError(f"batch_size: expected at least 1, got {batch_size!r}")
        exemplars = [self._check_exemplar(one) for one in exemplars]
        labels = [self._label(one, size) for one in label]
        alike: dict[tuple[int, ...], list[int]] = {}
        for index, planes in enumerate(labels):
            alike.setdefault(planes.shape, []).append(index)
        results: dict[int, Translation] = {}
        for indices in alike.values():
            for start in range(0, len(indices), batch_size):
                part = indices[start : start + batch_size]
                batch = self._translate([labels[i] for i in part], [exemplars[i] for i in part])
                results.update(zip(part, batch, strict=True))
        return [results[index] for index in range(len(labels))]

    def _translate(self, labels: list[npt.NDArray[Any]], exemplars: list[Exemplar]) -> list[Translation]:
        return [
            Translation(
                image=result.image,
                warped=result.warped,
                confidence=result.probability,
                matches=self._positions(result.index, exemplar),
                exemplar_size=exemplar.size,
                timings=result.timings,
            )
            for result, exemplar in zip(self._pipeline.render(np.stack(labels), exemplars), exemplars, strict=True)
        ]

    def _positions(self, index: npt.NDArray[np.int64], exemplar: Exemplar) -> FloatArray:
        y, x = np.divmod(index, exemplar.phi.shape[3])
        return ((np.stack([x, y], axis=-1) + 0.5) * self.config.down_scale).astype(np.float32)

    def _label(self, source: LabelSource, size: Size) -> npt.NDArray[Any]:
        planes = load_label(self.config, source)
        return resize_nearest(planes, resolve_size(self.config, size, planes.shape[-2:]))

    def _check_exemplar(self, exemplar: object) -> Exemplar:
        if not isinstance(exemplar, Exemplar):
            raise InputError(f"exemplar: expected the result of encode_exemplar, got {type(exemplar).__name__}")
        if exemplar.model != self._model:
            raise InputError("exemplar: encoded by another model; encode it with this translator")
        return exemplar


def resolve_size(config: ModelConfig, size: Size, own: tuple[int, ...]) -> tuple[int, int]:
    """(height, width) that `size`, as `Translator.translate` takes it, means for a source of its own size `own`.

    Raises `InputError`.
    """
    if size is None:
        return config.image_size, config.image_size
    if size == "input":
        sides: tuple[Any, ...] = tuple(max(MIN_SIDE, round(side / SIZE_MULTIPLE) * SIZE_MULTIPLE) for side in own)
    else:
        sides = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(sides) != 2 or any(type(side) is not int or side % SIZE_MULTIPLE or side < MIN_SIDE for side in sides):
        raise InputError(
            f'size: expected "input", one side or (height, width), each a multiple of {SIZE_MULTIPLE} from {MIN_SIDE}; '
            f"got {size!r}"
        )
    if max(sides) > MAX_SIDE:
        raise InputError(
            f"size: {sides[1]} x {sides[0]} pixels; expected at most {MAX_SIDE} a side: scale the input down"
        )
    return sides[0], sides[1]
