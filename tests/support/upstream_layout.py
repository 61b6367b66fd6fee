"""State dicts of any size in upstream's layout, for tests of the import and of training parity."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from parity_weights import make_state
from torch import Tensor, nn

from flashcocos.config import ModelConfig
from flashcocos.train import upstream
from flashcocos.train.networks import CoCosNet
from flashcocos.train.networks.layers import SpectralConv2d

_DISCRIMINATOR = {
    r"^scales\.": "discriminator_",
    r"\.first\.": ".model0.0.",
    r"\.middle\.(\d)\.": lambda m: f".model{int(m[1]) + 1}.0.0.",
    r"\.last\.": ".model4.0.",
    r"\.attention\.": ".attn.",
    r"attn\.query\.": "attn.theta.",
    r"attn\.key\.": "attn.phi.",
    r"attn\.value\.": "attn.g.",
    r"attn\.output\.": "attn.o.",
}
TINY = {"ngf": 2, "nef": 2, "feature_channels": 8, "spade_hidden": 4, "residual_blocks": 1}


def upstream_key(name: str) -> tuple[str, str]:
    """`upstream.upstream_key`, also for the parameters of a discriminator ("D") and of spectral norms."""
    name = name.replace(".parametrizations.weight.original", ".weight_orig")
    name = name.replace(".parametrizations.weight.0._", ".weight_")
    if not name.startswith("scales."):
        return upstream.upstream_key(name)
    for pattern, replacement in _DISCRIMINATOR.items():
        name = re.sub(pattern, replacement, name)
    return "D", name


def load_upstream_state(model: nn.Module, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Load upstream's state dicts by network name into `model`, whose spectral norms are apart as theirs are.

    A model made on the "meta" device takes the tensors over.
    """
    tensors = {}
    for name in model.state_dict():
        network, key = upstream_key(name)
        halves = [key.replace("scale_shift", part) for part in ("mlp_gamma", "mlp_beta")]
        tensors[name] = states[network][key] if key in halves else torch.cat([states[network][x] for x in halves])
    model.load_state_dict(tensors, assign=next(model.parameters()).is_meta)


def upstream_shapes(model: nn.Module) -> dict[str, dict[str, list[int]]]:
    """{"Corr" or "G" or "D": {key: shape}} of a model without spectral norm."""
    spectral = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, SpectralConv2d)}
    shapes: dict[str, dict[str, list[int]]] = {}
    for name, tensor in model.state_dict().items():
        network, key = upstream_key(name)
        file, shape = shapes.setdefault(network, {}), list(tensor.shape)
        if name in spectral:
            file |= {f"{key}_orig": shape, f"{key}_u": shape[:1], f"{key}_v": [tensor[0].numel()]}
        elif ".scale_shift." in key:
            file |= {
                key.replace("scale_shift", part): [shape[0] // 2, *shape[1:]] for part in ("mlp_gamma", "mlp_beta")
            }
        else:
            file[key] = shape
    return shapes


def upstream_states(config: ModelConfig) -> dict[str, dict[str, Tensor]]:
    """The "Corr" and "G" state dicts of `config`, filled by `make_state`."""
    with torch.device("meta"):
        shapes = upstream_shapes(CoCosNet(config))
    return {
        network: {key: torch.from_numpy(value) for key, value in make_state(file).items()}
        for network, file in shapes.items()
    }
