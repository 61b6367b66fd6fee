"""One translation, start to picture: the runtime against the eager PyTorch networks with the full matrix.

    python -m flashcocos.benchmarks.translation --checkpoint model.safetensors --bundle model/ --size 256

Each case runs in a process of its own on the same input, seeded noise of the right kind; both decode nothing and write
nothing. Reported: median, smallest and largest milliseconds of a translation after one warm-up, and the peak memory of
the process. The outputs are compared first: a runtime that differs is not timed.

    eager            CoCosNet in PyTorch, label and exemplar in, warp with its N x N matrix (as published)
    runtime          Translator, exemplar encoded anew each time
    runtime-cached   Translator, exemplar encoded once
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ModelConfig
from .harness import peak_rss, run_isolated, write_results

CASES = ("eager", "runtime", "runtime-cached")
CLASSES = 16  # that a label holds, on which the runtime's time depends: 4 to 21, 11 on average, in 12 of ADE20K's
MIN_PSNR = 40.0  # dB between the uint8 pictures of eager and runtime; rounding alone gives more than 50


def inputs(config: ModelConfig, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A label, an exemplar (size, size, 3) and its label: blocks of 32 pixels with noise, from a fixed seed."""
    rng = np.random.default_rng(0)

    def label() -> np.ndarray:
        cells = (size // 32, size // 32)
        if config.label_kind == "classes":
            present = rng.choice(config.label_channels, min(CLASSES, config.label_channels), replace=False)
            blocks = rng.choice(present, cells)
        else:
            blocks = rng.integers(0, 256, (config.label_channels, *cells))
        return np.kron(blocks, np.ones((32, 32), int)).astype(np.uint8)

    colours = np.kron(rng.integers(0, 200, (size // 32, size // 32, 3)), np.ones((32, 32, 1), int))
    exemplar = (colours + rng.integers(0, 56, (size, size, 3))).astype(np.uint8)
    return label(), exemplar, label()


def eager(checkpoint: str, size: int) -> Callable[[], np.ndarray]:
    """The networks in PyTorch with the reference warp."""
    import torch

    from ..preprocess import load_image, load_label, to_uint8
    from ..train.checkpoint import load_model

    model = load_model(checkpoint).eval()
    label, exemplar, exemplar_label = inputs(model.config, size)
    tensors = [
        torch.from_numpy(load_label(model.config, label)[None]),
        torch.from_numpy(load_image(exemplar)[None]),
        torch.from_numpy(load_label(model.config, exemplar_label)[None]) if model.config.mask_mixing else None,
    ]

    @torch.inference_mode()
    def run() -> np.ndarray:
        return to_uint8(model(*tensors, backend="reference").image[0].numpy())

    return run


def runtime(bundle: str, size: int, *, cached: bool) -> Callable[[], np.ndarray]:
    """The torch-free runtime."""
    from ..runtime import Translator

    translator = Translator(bundle, device="cpu")
    label, image, image_label = inputs(translator.config, size)

    def encode() -> Any:
        mixing = translator.config.mask_mixing
        return translator.encode_exemplar(image, image_label if mixing else None, size=size)

    kept = encode() if cached else None
    return lambda: translator.translate(label, kept or encode(), size=size).image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="model.safetensors")
    parser.add_argument("--bundle", required=True, help="the bundle exported from it")
    parser.add_argument("--size", type=int, default=256, help="side in pixels")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--name", default="translation", help="of the results file")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--picture", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            picture = str(Path(folder) / "eager.npy")
            row = run_isolated(__spec__.name, [*sys.argv[1:], "--case", case, "--picture", picture])
            rows.append(row)
            print(
                f"{case:15} {row['median_ms']:8.0f} ms  ({row['min_ms']:.0f} to {row['max_ms']:.0f})  "
                f"peak {row['peak_mib']:6.0f} MiB  {row['psnr_db']:.1f} dB"
            )
    words = " ".join(Path(word).name for word in sys.argv[1:])  # a folder of this machine tells nobody anything
    print(write_results(options.name, f"python -m flashcocos.benchmarks.translation {words}", rows))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time one case in this process."""
    if options.case == "eager":
        run = eager(options.checkpoint, options.size)
    else:
        run = runtime(options.bundle, options.size, cached=options.case == "runtime-cached")
    picture = run()
    if options.case == "eager":
        np.save(options.picture, picture)
    quality = psnr(picture, np.load(options.picture))
    if quality < MIN_PSNR:
        raise SystemExit(f"{options.case} differs from eager: {quality:.1f} dB, expected at least {MIN_PSNR}")
    times = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return {
        "case": options.case,
        "size": options.size,
        "median_ms": statistics.median(times),
        "min_ms": min(times),
        "max_ms": max(times),
        "repeats": options.repeats,
        "psnr_db": quality,
        "peak_mib": peak_rss() / 2**20,
    }


def psnr(actual: np.ndarray, expected: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures in dB, at most 99."""
    error = float(np.mean((actual.astype(float) - expected.astype(float)) ** 2))
    return 10 * np.log10(255**2 / error) if error > 255**2 * 10**-9.9 else 99.0


if __name__ == "__main__":
    main()
