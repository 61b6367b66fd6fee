"""The PyTorch device that a setting means."""

from __future__ import annotations

import torch

from ..errors import BackendError


def torch_device(device: str) -> str:
    """The PyTorch device that "auto", "cpu" or "cuda" means here.

    Args:
        device: "auto" for CUDA where there is a GPU.

    Returns:
        "cpu" or "cuda".

    Raises:
        BackendError: "cuda" without a GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendError("device cuda: torch sees no GPU; choose auto or cpu, or install torch for CUDA")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
