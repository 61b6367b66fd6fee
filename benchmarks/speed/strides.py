"""The correspondence at a quarter, half and full resolution of the picture: what it costs.

Networks with seeded noise as weights run in PyTorch, the warp in numba. Cost only: an untrained
network says nothing about pictures.
"""

from __future__ import annotations

import time

import numpy as np

from ...config import ModelConfig
from ...kernels.corr_warp import warp_arrays
from ..registry import Assets, Benchmark, Case, Sample
from .inputs import network_inputs


def prepare(case: Case, assets: Assets) -> Benchmark:
    """One translation, its exemplar encoded before; its results are pictures (1, 3, H, W) in [-1, 1].

    parameters: preset, size and stride (of the warp).
    """
    import torch

    from ...train.networks import CoCosNet

    size, stride = case.parameters["size"], case.parameters["stride"]
    config = ModelConfig.preset(case.parameters["preset"], warp_stride=stride)
    torch.manual_seed(0)
    if assets.threads:
        torch.set_num_threads(assets.threads)
    model = CoCosNet(config).eval()
    label, *exemplar = map(torch.from_numpy, network_inputs(config, size))
    with torch.inference_mode():
        phi, values = (tensor.numpy() for tensor in model.encode_exemplar(*exemplar))

    @torch.inference_mode()
    def run() -> Sample:
        times = [time.perf_counter()]
        theta = model.encode_query(label).numpy()
        times.append(time.perf_counter())
        warped = warp_arrays(theta, phi, values, patch=config.patch, temperature=config.temperature)
        times.append(time.perf_counter())
        image, _ = model.synthesize(torch.from_numpy(warped.out), label)
        times.append(time.perf_counter())
        parts = zip(("query", "warp", "synthesis"), 1e3 * np.diff(times), strict=True)
        return Sample(image.numpy(), {name: float(ms) for name, ms in parts})

    positions = (size // stride) ** 2
    facts = {"positions": positions, "matrix_gib": positions**2 * 4 / 2**30}
    return Benchmark(run, lambda image: {"largest": float(np.abs(image).max())}, facts=facts)
