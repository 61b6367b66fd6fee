"""CoCosNet as a whole: correspondence network, warp and generator, stage by stage or at once.

Source: arXiv 2004.05571. The stages are what a bundle's graphs hold: the exemplar's share of the work depends on the
exemplar alone, so it can be done once for many labels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import MIN_SIDE, SIZE_MULTIPLE, ModelConfig
from ...errors import InputError
from .correspondence import Correspondence
from .generator import Generator


class ModelOutput(NamedTuple):
    """What a forward pass returns; images in [-1, 1], H = h * warp_stride."""

    image: Tensor  # (B, 3, H, W)
    warped_image: Tensor  # (B, 3, H, W)
    warped: Tensor  # (B, V, h, w)
    theta: Tensor  # (B, C, h, w)
    phi: Tensor  # (B, C, h, w)


class CoCosNet(nn.Module):
    """The translation model that `config` describes.

    Labels are class ids (B, H, W), uint8 or int64, for `label_kind` "classes", or float planes (B, nc, H, W) for either
    kind (one-hot or soft for classes). Images are (B, 3, H, W) in [-1, 1]. H and W are multiples of 32, 64 at least;
    the exemplar may differ from the label in size. Ids are not checked here (`preprocess.load_label` does): one outside
    the classes belongs to none of them. Weights are plain; training parametrizes them (`layers.add_spectral_norm`).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.correspondence = Correspondence(config)
        self.generator = Generator(config)

    def encode_query(self, label: Tensor) -> Tensor:
        """Label -> theta (B, C, h, w), h = H / warp_stride."""
        planes = self.label_planes(label)
        return self.correspondence.query(self.correspondence.label_adaptor(planes), planes, planes)

    def encode_exemplar(self, image: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Exemplar, and its label if `condition_on_label` -> phi (B, C, h, w) and the values to warp (B, V, h, w)."""
        _check_size(image, 4, "image")
        planes = None
        if self.config.condition_on_label:
            if label is None:
                raise InputError(f"task {self.config.task!r} mixes labels into the features: give the exemplar's label")
            planes = self.label_planes(label)
            if planes.shape[2:] != image.shape[2:]:
                raise InputError(f"exemplar of {tuple(image.shape[2:])} has a label of {tuple(planes.shape[2:])}")
        both = image if planes is None else torch.cat([image, planes], 1)
        phi = self.correspondence.key(self.correspondence.image_adaptor(image), planes, both)
        return phi, self.warp_values(image)

    def warp_values(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) -> (B, V, h, w): each position's mean color, or for "pixel_shuffle" all its pixels."""
        step = self.config.warp_stride
        if self.config.warp_upsampling == "pixel_shuffle":
            return F.pixel_unshuffle(image, step)
        return F.avg_pool2d(image, step)

    def upsample_warp(self, warped: Tensor) -> Tensor:
        """Warped values (B, V, h, w) -> warped_image (B, 3, H, W)."""
        step, mode = self.config.warp_stride, self.config.warp_upsampling
        if mode == "pixel_shuffle":
            return F.pixel_shuffle(warped, step)
        if mode == "bilinear":
            return F.interpolate(warped, scale_factor=float(step), mode="bilinear", align_corners=False)
        return F.interpolate(warped, scale_factor=float(step), mode="nearest")

    def synthesize(self, warped: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Warped values (B, V, h, w) and the label -> image and warped_image, each (B, 3, H, W)."""
        warped_image = self.upsample_warp(warped)
        return self.generator(warped_image, self.label_planes(label)), warped_image

    def forward(
        self, label: Tensor, exemplar: Tensor, exemplar_label: Tensor | None = None, *, backend: str = "auto"
    ) -> ModelOutput:
        """The whole translation.

        Args:
            label: class ids (B, H, W), or planes (B, nc, H, W).
            exemplar: (B, 3, h, w) float in [-1, 1].
            exemplar_label: as `label`, of the exemplar's size; not needed without `condition_on_label`.
            backend: of the warp (`flashcocos.kernels.corr_warp`).

        Returns:
            The image, and what it was made of.

        Raises:
            InputError: a size is no multiple of 32, or the exemplar's label is missing or of another size.
        """
        from ...kernels import corr_warp

        planes = self.label_planes(label)
        theta = self.encode_query(planes)
        phi, values = self.encode_exemplar(exemplar, exemplar_label)
        config = self.config
        warped = corr_warp(
            theta, phi, values, patch=config.patch, temperature=config.temperature, backend=backend
        )  # (B, V, h, w)
        image, warped_image = self.synthesize(warped, planes)
        return ModelOutput(image, warped_image, warped, theta, phi)

    def label_planes(self, label: Tensor) -> Tensor:
        """Class ids (B, H, W) or planes (B, nc, H, W) -> planes (B, nc, H, W) of the weights' dtype."""
        dtype = self.correspondence.theta.weight.dtype
        if label.is_floating_point():
            _check_size(label, 4, "label")
            if label.shape[1] != self.config.label_channels:
                raise InputError(f"label: expected {self.config.label_channels} planes, got {label.shape[1]}")
            return label.to(dtype)
        if self.config.label_kind != "classes":
            raise InputError(f"label: expected {self.config.label_channels} float planes, got {label.dtype} class ids")
        _check_size(label, 3, "label")
        ids = torch.arange(self.config.label_channels, dtype=torch.int32, device=label.device).reshape(1, -1, 1, 1)
        return (label[:, None].to(torch.int32) == ids).to(dtype)


def _check_size(x: Tensor, dimensions: int, name: str) -> None:
    if x.ndim != dimensions:
        raise InputError(f"{name}: expected {dimensions} dimensions, batch first, got the shape {tuple(x.shape)}")
    for side in x.shape[-2:]:
        if side < MIN_SIDE or side % SIZE_MULTIPLE:
            raise InputError(
                f"{name}: height and width must be multiples of {SIZE_MULTIPLE} and at least {MIN_SIDE}, "
                f"got {tuple(x.shape[-2:])}; resize it (load_image and load_label take `size`)"
            )
