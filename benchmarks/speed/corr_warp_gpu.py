"""The Triton warp on a GPU against what PyTorch can do without it, forward and forward + backward.

    python -m flashcocos.benchmarks.speed.corr_warp_gpu           # square maps of 64, 128 and 256, patch 3
    python -m flashcocos.benchmarks.speed.corr_warp_gpu --smoke   # tiny maps in Triton's interpreter, a test

    triton    flashcocos.kernels.corr_warp(backend="triton"), a row for each of --kernels that can run: "nine_tap" and
              "straightforward" are its forward kernels, "auto" the one its rule takes
    reference, compiled, sdpa: as in `warp`

All in the same dtype, batch 1, features of a fixed seed. A row has milliseconds (median, 20th and 80th percentile of at
least 100 ms of runs after warm-up, CUDA events), TFLOP/s counted at 2 N^2 9C and at 2 N^2 C (products with the features
of the forward, three times that with the backward), peak memory beside the inputs, and the error of 64 queries against
float64, relative to its root mean square. An implementation that does not fit is a row that says so. Triton rows above
1 % are an error: a wrong kernel is not timed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from ..provenance import write_results
from .warp import TEMPERATURE, implementation

IMPLEMENTATIONS = ("triton", "reference", "compiled", "sdpa")
KERNELS = ("auto", "nine_tap", "straightforward")
MAX_ERROR = 0.01


def main() -> None:
    """Measure what the command line names and write benchmarks/results/NAME.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 128, 256], help="sides of the square maps")
    parser.add_argument("--values", type=int, nargs="+", default=[3, 48], help="value channels")
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--patch", type=int, default=3, choices=(1, 3, 5))
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--implementations", nargs="+", default=list(IMPLEMENTATIONS), choices=IMPLEMENTATIONS)
    parser.add_argument(
        "--kernels", nargs="+", default=["nine_tap", "straightforward"], choices=KERNELS, help="of triton's forward"
    )
    parser.add_argument("--name", default="corr_warp_gpu", help="of the results file")
    parser.add_argument("--smoke", action="store_true", help="one run of 4 x 4 maps on the CPU, nothing written")
    options = parser.parse_args()
    if options.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        options.sides, options.values, options.channels = [4], [3], 16
        options.implementations = ["triton", "reference", "sdpa"]
    import torch

    if not options.smoke and not torch.cuda.is_available():
        parser.error("no CUDA GPU here; --smoke tests this script without one")
    device = "cpu" if options.smoke else "cuda"
    rows = []
    for side in options.sides:
        for values in options.values:
            for name in options.implementations:
                for kernel in options.kernels if name == "triton" else [""]:
                    for backward in (False, True):
                        row = measure(name, kernel, side, values, backward, options, device)
                        rows.append(row)
                        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if not options.smoke:
        command = f"python -m flashcocos.benchmarks.speed.corr_warp_gpu {' '.join(sys.argv[1:])}".rstrip()
        print(write_results(options.name, command, rows))


def measure(
    name: str, kernel: str, side: int, values: int, backward: bool, options: argparse.Namespace, device: str
) -> dict[str, Any]:
    """One row of results.

    Args:
        name: One of `IMPLEMENTATIONS`.
        kernel: One of `KERNELS` for triton, else empty.
        side: Of the square maps.
        values: Value channels.
        backward: Whether to run the backward pass too.
        options: channels, dtype and patch.
        device: "cuda", or "cpu" for the smoke test.

    Returns:
        The row, JSON.
    """
    import torch

    from ...errors import InputError
    from ...kernels.gpu.triton_warp import choose_forward

    dtype, channels = getattr(torch, options.dtype), options.channels
    row = {"implementation": name, **({"kernel": kernel} if kernel else {}), "side": side, "values": values}
    row |= {"backward": backward, "dtype": options.dtype, "channels": channels, "patch": options.patch}
    row |= {"device": device}
    if device == "cuda":
        row |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, channels, side, side), (1, channels, side, side), (1, values, side, side), (1, values, side, side))
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    leaves, grad = [x.requires_grad_() for x in tensors[:3]], tensors[3]
    function = implementation(name, options.patch)

    def run() -> torch.Tensor:
        if backward:
            out = function(*leaves)
            torch.autograd.grad(out, leaves, grad)
            return out
        with torch.no_grad():
            return function(*leaves)

    used = torch.cuda.memory_allocated() if device == "cuda" else 0
    try:
        with choose_forward(kernel or "auto"):
            error = error_of(run(), leaves, options.patch)
            if name == "triton" and error > MAX_ERROR:
                raise SystemExit(f"the Triton warp is off by {error:.2e} at side {side}, V {values}: not timed")
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times = timed(run, device)
    except InputError as refused:
        return row | {"result": str(refused)}
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return row | {"result": "out of memory"}
    median = statistics.median(times)
    flop = 2 * side**4 * channels * (3 if backward else 1)
    row |= {"median_ms": round(median, 4), "error": float(f"{error:.2e}")}
    if len(times) >= 5:
        cuts = statistics.quantiles(times, n=5)
        row |= {"p20_ms": round(cuts[0], 4), "p80_ms": round(cuts[3], 4)}
    row |= {"tflops_nominal": round(flop * options.patch**2 / median / 1e9, 3)}
    row |= {"tflops_least": round(flop / median / 1e9, 3)}
    if device == "cuda":
        row["peak_mib"] = round((torch.cuda.max_memory_allocated() - used) / 2**20, 1)
    return row


def error_of(out: Any, leaves: list[Any], patch: int) -> float:
    """Root mean square error of 64 queries, spread over the map, against float64, over that of the reference."""
    import torch

    from ...kernels import reference

    with torch.no_grad():
        theta, phi, values = (x.detach().double() for x in leaves)
        places = torch.linspace(0, out[0, 0].numel() - 1, 64, device=out.device).long()
        query = reference.patch_vectors(theta, patch)[0, :, places]
        weights = (query.T @ reference.patch_vectors(phi, patch)[0] / TEMPERATURE).softmax(-1)
        expected = values[0].flatten(1) @ weights.T
        error = out[0].flatten(1)[:, places].double() - expected
        return float(error.square().mean().sqrt() / expected.square().mean().sqrt())


def timed(run: Callable[[], Any], device: str) -> list[float]:
    """Milliseconds of each run: one without a GPU, else enough for 100 ms after a warm-up, at least 10."""
    import torch

    if device == "cpu":
        start = time.perf_counter()
        run()
        return [1e3 * (time.perf_counter() - start)]
    for _ in range(3):
        run()
    times: list[float] = []
    while len(times) < 10 or sum(times) < 100:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        run()
        events[1].record()
        events[1].synchronize()
        times.append(events[0].elapsed_time(events[1]))
    return times


if __name__ == "__main__":
    main()
