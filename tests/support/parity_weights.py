"""Deterministic weights and inputs for the parity tests: the same numbers from a name and a shape, on any machine.

The reference results in tests/data/parity_synthetic were computed by the public CoCosNet networks with exactly these
numbers, so nothing here may change.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
LABEL_CHANNELS = {"ade20k": 151, "celebahq": 19, "celebahqedge": 15, "deepfashion": 20}
CLASS_TASKS = ("ade20k", "celebahq")


def make_state(shapes: Mapping[str, Sequence[int]], seed: int = 0) -> dict[str, Array]:
    """A state dict in upstream's layout from names and shapes, each u and v settled on its weight."""
    state = {key: _fill(key, tuple(shape), seed) for key, shape in shapes.items()}
    for key in [key for key in state if key.endswith("weight_u")]:
        stem = key.removesuffix("_u")
        state[key], state[f"{stem}_v"] = _settle(state[f"{stem}_orig"], state[key])
    return state


def make_inputs(task: str, seed: int = 0, size: int = 256) -> dict[str, Array]:
    """ "label" and "label_ref" (1, nc, size, size) and "ref" (1, 3, size, size) in [-1, 1].

    Class tasks get one-hot blocky class maps, the others smooth planes in [0, 1].
    """
    rng = _generator(task, seed)
    channels = LABEL_CHANNELS[task]
    inputs = {}
    for name in ("label", "label_ref"):
        if task in CLASS_TASKS:
            ids = np.kron(rng.integers(0, channels, (size // 32, size // 32)), np.ones((32, 32), int))
            ids[size // 4 : size // 2, size // 3 : size // 2] = rng.integers(0, channels)
            inputs[name] = (np.arange(channels)[:, None, None] == ids).astype(np.float32)[None]
        else:
            inputs[name] = ((_smooth(rng, channels, size) + 1) / 2)[None]
    inputs["ref"] = _smooth(rng, 3, size)[None]
    return inputs


def _generator(name: str, seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))


def _fill(key: str, shape: tuple[int, ...], seed: int) -> Array:
    rng = _generator(key, seed)
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "gamma":
        return np.full(shape, 0.5, np.float32)
    if leaf == "bias":
        return (0.05 * rng.standard_normal(shape)).astype(np.float32)
    if "prelu" in key:
        return np.full(shape, 0.25, np.float32)
    if leaf in ("weight_u", "weight_v"):
        vector = rng.standard_normal(shape).astype(np.float32)
        return vector / np.linalg.norm(vector)
    fan_in = int(np.prod(shape[1:]))
    return (np.sqrt(2.0 / fan_in) * rng.standard_normal(shape)).astype(np.float32)


def _settle(weight: Array, u: Array) -> tuple[Array, Array]:
    # three power iterations in float64, so that sigma = u W v is well away from zero
    matrix, left = weight.reshape(weight.shape[0], -1).astype(np.float64), u.astype(np.float64)
    for _ in range(3):
        right = matrix.T @ left
        right /= np.linalg.norm(right)
        left = matrix @ right
        left /= np.linalg.norm(left)
    return left.astype(np.float32), right.astype(np.float32)


def _smooth(rng: np.random.Generator, channels: int, size: int) -> Array:
    """Noise at four scales, blown up and box-blurred: (channels, size, size) in [-1, 1]."""
    planes = np.zeros((channels, size, size))
    for cell, gain in ((64, 1.0), (32, 0.7), (16, 0.5), (8, 0.3)):
        count = size // cell
        planes += gain * np.kron(rng.standard_normal((channels, count, count)), np.ones((cell, cell)))
    for axis in (1, 2):
        planes = (np.roll(planes, 1, axis) + planes + np.roll(planes, -1, axis)) / 3
    return np.clip(planes / 2.0, -1, 1).astype(np.float32)
