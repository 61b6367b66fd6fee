"""A larger network from a trained smaller one, to train on: wider layers, or a correspondence finer than a quarter.

Source: Net2Net, arXiv 1511.05641, section 2.2. New channels are copies of old ones and nothing reads them at first:
their columns in the next layer are 0. Only positional normalization, over all channels, sees them, so the grown
network starts close to the small one, not equal to it. What the small network lacks altogether keeps its random start.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import InputError

GROWABLE = ("ngf", "spade_hidden", "max_channels", "warp_stride")  # fields of ModelConfig


def grown_state(fresh: Mapping[str, Tensor], small: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the larger network.

    Args:
        fresh: its state dict, randomly initialized.
        small: the state dict of the trained network.

    Returns:
        A state dict with the names and shapes of `fresh`.

    Raises:
        InputError: a weight of the small network has no place in the larger one.
    """
    state = dict(fresh)
    for name, weight in small.items():
        if name not in state or any(n < o for n, o in zip(state[name].shape, weight.shape, strict=True)):
            size = tuple(state[name].shape) if name in state else "absent"
            raise InputError(f"{name} is {tuple(weight.shape)} in the smaller network, {size} in the larger one")
        state[name] = _grown(state[name].shape, weight, parts=2 if ".scale_shift." in name else 1)
    return state


def _grown(shape: torch.Size, weight: Tensor, parts: int) -> Tensor:
    """`weight` (out, in, ...) or (out,) in a larger shape; each of `parts` blocks of outputs grows by itself."""
    if shape == weight.shape:
        return weight
    grown = weight.new_zeros(shape)
    for new, old in zip(grown.chunk(parts), weight.chunk(parts), strict=True):
        copies = old[torch.arange(len(new)) % len(old)]
        if new.ndim > 1:
            new[:, : old.shape[1]] = copies
        else:
            new.copy_(copies)
    return grown
