"""State dicts of any size in upstream's layout, for tests of the import and of training parity."""

from __future__ import annotations

import torch
from parity_weights import make_state
from torch import Tensor, nn

from flashcocos.config import ModelConfig
from flashcocos.train.networks import CoCosNet
from flashcocos.train.networks.layers import SpectralConv2d
from flashcocos.train.upstream import upstream_key

TINY = {"ngf": 2, "nef": 2, "feature_channels": 8, "spade_hidden": 4, "residual_blocks": 1}


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
