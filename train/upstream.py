"""Weights of the published CoCosNet (microsoft/CoCosNet): its state dicts read, checked, folded and renamed.

Upstream saves the correspondence network ("Corr") and the generator ("G") as two raw state dicts, spectral norm kept
apart as `weight_orig`, `weight_u` and `weight_v`. Shapes decide the label channels, widths, adaptor kernel,
conditioning on the label and attention; the rest comes from the task's preset.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..config import PRESETS, ModelConfig
from ..errors import CheckpointError, InputError
from ..files import file_hash
from .checkpoint import load_pickle, save_state
from .networks import CoCosNet
from .networks.layers import SpectralConv2d, fold_spectral_norm

TASKS = ("ade20k", "celebahq", "celebahqedge", "deepfashion")

# our names -> upstream's, in this order: the first root that fits, which also decides the file, then every part
_ROOTS = {
    "correspondence.label_adaptor.": ("Corr", "adaptive_model_seg."),
    "correspondence.image_adaptor.": ("Corr", "adaptive_model_img."),
    "correspondence.residual.": ("Corr", "layer."),
    "correspondence.": ("Corr", ""),
    "generator.first.": ("G", "fc."),
    "generator.head.": ("G", "head_0."),
    "generator.middle_": ("G", "G_middle_"),
    "generator.attention.": ("G", "attn."),
    "generator.last.": ("G", "conv_img."),
    "generator.": ("G", ""),
}
_PARTS: dict[str, str | Callable[[re.Match[str]], str]] = {
    r"\.layers\.(\d)\.": lambda m: f".layer{int(m[1]) + 1}.0.",
    r"\.blocks\.0\.": ".head_0.",
    r"\.blocks\.(\d)\.": lambda m: f".G_middle_{int(m[1]) - 1}.",
    r"\.shared\.": ".mlp_shared.1.",
    r"attn\.query\.": "attn.theta.",
    r"attn\.key\.": "attn.phi.",
    r"attn\.value\.": "attn.g.",
    r"attn\.output\.": "attn.o.",
}


class StateDict:
    """One upstream state dict that returns checked float32 tensors and remembers which were taken."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str) -> None:
        self.tensors, self.name = tensors, name
        self._taken: set[str] = set()

    @classmethod
    def load(cls, path: str | os.PathLike[str], network: str) -> StateDict:
        """Read `path`; no code in it is ever run. `network` is only for messages."""
        name = f"{path} ({network} network)"
        tensors = load_pickle(path, f"{name}: not a readable checkpoint of plain tensors")
        if not isinstance(tensors, dict) or not tensors:
            raise CheckpointError(f"{name}: expected a state dict, got {type(tensors).__name__}")
        for key, tensor in tensors.items():
            if not isinstance(key, str) or not isinstance(tensor, Tensor):
                raise CheckpointError(f"{name}: {key!r} is a {type(tensor).__name__}, expected tensors by name only")
        return cls(tensors, name)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of the tensor `key`, which must exist."""
        if key not in self.tensors:
            raise CheckpointError(f"{self.name}: key {key!r} is missing")
        return tuple(self.tensors[key].shape)

    def take(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """The float32 tensor `key`; `CheckpointError` unless it is there, of `shape`, dense and finite."""
        actual = self.shape(key)
        tensor = self.tensors[key]
        if actual != shape:
            raise CheckpointError(f"{self.name}: key {key!r} has the shape {actual}, expected {shape}")
        dense = tensor.layout == torch.strided and tensor.is_floating_point()
        # a crafted tensor can claim any size over a few bytes
        if not dense or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{self.name}: key {key!r} is {tensor.dtype}, expected dense floating-point numbers")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{self.name}: key {key!r} holds values that are not finite")
        self._taken.add(key)
        return tensor.detach().float()

    def finish(self) -> None:
        """`CheckpointError` if a key was never taken."""
        if extra := [key for key in self.tensors if key not in self._taken]:
            raise CheckpointError(
                f"{self.name}: key {extra[0]!r} has no place in this network ({len(extra)} such keys)"
            )


def convert(
    corr_path: str | os.PathLike[str],
    generator_path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    task: str | None = None,
    label_kind: str | None = None,
    warp_upsampling: str | None = None,
) -> ModelConfig:
    """Write a published checkpoint as a model file. No code in the checkpoint is ever run.

    Args:
        corr_path: upstream's `*_net_Corr.pth`.
        generator_path: upstream's `*_net_G.pth`.
        output: the model file to write, .safetensors.
        task: needed only for a network of the user's own training, whose number of label channels is that of no
            published task; it overrides the preset.
        label_kind: as `task`.
        warp_upsampling: as `task`.

    Returns:
        The configuration.

    Raises:
        InputError: a path is missing or no plain file.
        CheckpointError: the files are not such a pair; the message names file and key.
    """
    states = {"Corr": StateDict.load(corr_path, "Corr"), "G": StateDict.load(generator_path, "G")}
    options = {"task": task, "label_kind": label_kind, "warp_upsampling": warp_upsampling}
    config = infer_config(states, {name: value for name, value in options.items() if value is not None})
    with torch.device("meta"):  # names and shapes are all that is needed of the model
        model = CoCosNet(config)
    tensors = upstream_state(model, states)
    provenance = {
        "source": "microsoft/CoCosNet",
        "files": {Path(path).name: file_hash(path) for path in (corr_path, generator_path)},
    }
    save_state(output, config, tensors, provenance)
    return config


def infer_config(states: Mapping[str, StateDict], options: Mapping[str, str]) -> ModelConfig:
    """The configuration that follows from the shapes of the "Corr" and "G" state dicts and the options of `convert`."""
    corr, generator = states["Corr"], states["G"]
    nef, labels = _dimensions(corr, "adaptive_model_seg.layer1.0.weight_orig")[:2]
    features, mixed = _dimensions(corr, "theta.weight")[:2]
    if mixed not in (features, features + labels):
        raise CheckpointError(
            f"{corr.name}: 'theta.weight' reads {mixed} channels; expected {features} features, or {features + labels} "
            "with the label joined"
        )
    preset = next((PRESETS[name] for name in TASKS if PRESETS[name].label_channels == labels), None)
    names = ("task", "label_kind", "warp_upsampling")
    if preset is None and (missing := [name for name in names if name not in options]):
        published = ", ".join(f"{name} {PRESETS[name].label_channels}" for name in TASKS)
        raise CheckpointError(
            f"{corr.name}: {labels} label channels are none of the published tasks' ({published}); "
            f"say what they are: {missing[0]} is needed"
        )
    try:
        return ModelConfig.from_dict(
            {
                **{name: options[name] if name in options else getattr(preset, name) for name in names},
                "label_channels": labels,
                "ngf": _dimensions(generator, "fc.weight")[0] // 16,
                "nef": nef,
                "feature_channels": features,
                "spade_hidden": _dimensions(generator, "head_0.norm_0.mlp_shared.1.weight")[0],
                "residual_blocks": len(
                    [key for key in corr.tensors if re.fullmatch(r"layer\.\d+\.conv1\.weight", key)]
                ),
                "adaptor_kernel": _dimensions(corr, "adaptive_model_seg.layer2.0.weight_orig")[2],
                "condition_on_label": mixed != features,
                "attention": any(key.startswith("attn.") for key in generator.tensors),
            }
        )
    except InputError as error:
        raise CheckpointError(f"{corr.name}, {generator.name}: {error}") from error


def upstream_state(model: CoCosNet, states: Mapping[str, StateDict]) -> dict[str, Tensor]:
    """A state dict for `model`, a `CoCosNet` without spectral norm, out of upstream's `states`."""
    spectral = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, SpectralConv2d)}
    result = {}
    for name, target in model.state_dict().items():
        network, key = upstream_key(name)
        source, shape = states[network], tuple(target.shape)
        if name in spectral:
            weight = source.take(f"{key}_orig", shape)
            u = source.take(f"{key}_u", shape[:1])
            v = source.take(f"{key}_v", (target[0].numel(),))
            result[name] = fold_spectral_norm(weight, u, v)
            if not result[name].isfinite().all():
                raise CheckpointError(f"{source.name}: key '{key}_orig' has spectral norm 0 along its u and v")
        elif ".scale_shift." in key:
            # upstream keeps SPADE's scale and shift as two convolutions of the same input
            half = (shape[0] // 2, *shape[1:])
            halves = (source.take(key.replace("scale_shift", part), half) for part in ("mlp_gamma", "mlp_beta"))
            result[name] = torch.cat(list(halves))
        else:
            result[name] = source.take(key, shape)
    for state in states.values():
        state.finish()
    return result


def upstream_key(name: str) -> tuple[str, str]:
    """File ("Corr" or "G") and upstream's key of our parameter `name`, up to what folding and joining change."""
    root = next(prefix for prefix in _ROOTS if name.startswith(prefix))
    network, key = _ROOTS[root][0], _ROOTS[root][1] + name[len(root) :]
    for pattern, replacement in _PARTS.items():
        key = re.sub(pattern, replacement, key)
    return network, key


def _dimensions(state: StateDict, key: str) -> tuple[int, ...]:
    shape = state.shape(key)
    if len(shape) != 4:
        raise CheckpointError(f"{state.name}: key {key!r} has the shape {shape}, expected a convolution's four axes")
    return shape
