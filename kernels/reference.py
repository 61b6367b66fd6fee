"""The oracle: the warp as its definition reads, with the N x M matrix formed; any float dtype, any device, autograd.

It follows the published computation step by step (unfold, center, normalize, correlate, softmax; arXiv 2004.05571,
equations 2 and 3, and the public code's patches and epsilon), so every other implementation is compared with it.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F

EPSILON = sys.float_info.epsilon  # added to each norm, as upstream does


def patch_vectors(features: torch.Tensor, patch: int) -> torch.Tensor:
    """The centered and normalized patch around each position: (B, C, H, W) -> (B, D, H * W), zero padded."""
    vectors = F.unfold(features, patch, padding=patch // 2)
    vectors = vectors - vectors.mean(dim=1, keepdim=True)
    norms: torch.Tensor = vectors.norm(dim=1, keepdim=True)
    return vectors / (norms + EPSILON)


def logits(theta: torch.Tensor, phi: torch.Tensor, patch: int, temperature: float) -> torch.Tensor:
    """Correlation of every query with every key over the temperature, (B, N, M), in the dtype of the inputs."""
    return patch_vectors(theta, patch).transpose(1, 2) @ patch_vectors(phi, patch) / temperature


def warp(
    theta: torch.Tensor, phi: torch.Tensor, values: torch.Tensor, patch: int = 3, temperature: float = 0.01
) -> tuple[torch.Tensor, torch.Tensor]:
    """The warp (B, V, Hq, Wq) and the log-sum-exp of the logits (B, Hq, Wq), both in the dtype of the inputs."""
    scores = logits(theta, phi, patch, temperature)  # (B, N, M)
    out = values.flatten(2) @ scores.softmax(dim=-1).transpose(1, 2)  # (B, V, M) @ (B, M, N)
    batch, _, height, width = theta.shape
    return out.reshape(batch, -1, height, width), scores.logsumexp(dim=-1).reshape(batch, height, width)
