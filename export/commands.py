"""The command lines of `flashcocos build` and `quantize`; like cli.py, nothing heavy is imported until one runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

_PRECISIONS = {"float32": "float32", "fp32": "float32", "float16": "float16", "fp16": "float16"}


def add_build(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the sub-command; `command` is that of cli.py."""
    sub = command(
        "build",
        _run_build,
        "Build TensorRT engines of a bundle, and compile the warp's kernels, for GPUs that need not be present.",
        "flashcocos build model.zip --target sm_89 --precision float16 --size 512 --size 256:512:1024",
    )
    sub.add_argument("bundle", metavar="BUNDLE", help="model bundle, a folder or a .zip")
    sub.add_argument(
        "--target", nargs="+", default=[], metavar="SM",
        help="compute capabilities as sm_89; one engine serves all (default: the GPU at hand)",
    )  # fmt: skip
    sub.add_argument(
        "--precision", choices=tuple(_PRECISIONS), default="float16",
        help="of the arithmetic, but for what is int8 in a bundle of flashcocos quantize (default: float16)",
    )  # fmt: skip
    sub.add_argument(
        "--variant", choices=("tensorrt-rtx", "tensorrt"), default="tensorrt-rtx",
        help="tensorrt-rtx builds for GPUs that are not there; tensorrt for the one at hand (default: tensorrt-rtx)",
    )  # fmt: skip
    sub.add_argument(
        "--size", action="append", default=[], metavar="SIZE",
        help="pixels: SIDE, HEIGHTxWIDTH, or least:optimal:most of them for any size between; may be repeated "
        "(default: the model's own)",
    )  # fmt: skip
    sub.add_argument("--batch", default="1", metavar="N", help="images at once: N or least:optimal:most (default: 1)")
    sub.add_argument(
        "--tile", type=int, metavar="PIXELS", help="side of the tiles that larger pictures are finished in; less memory"
    )
    sub.add_argument("-o", "--output", metavar="DIR", help="folder of the engines (default: beside the bundle)")
    sub.add_argument("--check", action="store_true", help="first compare the graphs with the bundle's, on the CPU")
    sub.add_argument("--no-kernels", action="store_true", help="leave out the warp's kernels, which need triton")


def _run_build(options: argparse.Namespace) -> int:
    from pathlib import Path

    from ..bundle import Bundle
    from ..runtime.gpu.memory_estimate import estimate_memory
    from ..runtime.gpu.store import default_folder, import_variant, parse_target
    from .tensorrt.build import build, build_kernels, current_architecture, parse_profile
    from .tensorrt.check import require_agreement

    bundle, precision = Bundle(options.bundle), _PRECISIONS[options.precision]
    config = bundle.manifest.config
    profiles = [parse_profile(size, options.batch) for size in options.size or [str(config.image_size)]]
    import_variant(options.variant)  # what is missing is told before anything is built
    targets = [parse_target(target) for target in options.target] or [current_architecture()]
    folder = Path(options.output) if options.output else default_folder(options.bundle)
    if options.check:
        found = require_agreement(bundle, precision, config.image_size)
        apart = ", int8 apart" if bundle.manifest.precision == "int8" else ""
        print(f"{precision} against the bundle's graphs on the CPU, {config.image_size} px{apart}: {found:.1f} dB")
    if not options.no_kernels:
        names = build_kernels(options.bundle, folder, targets, precision)
        print(f"kernels: {', '.join(names)}", flush=True)
    built: list[Any] = []
    for one in build(
        options.bundle,
        targets=targets,
        precision=precision,
        variant=options.variant,
        profiles=profiles,
        output=folder,
        tile=options.tile,
    ):
        built.append(one.record)
        record = one.record
        int8 = f"{record.int8_convolutions} convolutions in int8, " if record.int8_convolutions else ""
        print(
            f"{record.key.stage} at {record.key.profile}: {'kept' if one.kept else 'built'}, {_mib(record.bytes)}; "
            f"{int8}weights {_mib(record.weight_bytes)}, working memory {_mib(record.activation_bytes)} "
            f"(estimated {_mib(one.estimated_bytes)})",
            flush=True,
        )
    for profile in profiles:
        batch, height, width = (axis[2] for axis in (profile.batch, profile.height, profile.width))
        chosen = [record for record in built if record.key.profile in (profile, profile.tiled(options.tile))]
        print(f"device memory: {estimate_memory(config, chosen, height, width, batch=batch, tile=options.tile)}")
    print(folder)
    return 0


def add_quantize(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the sub-command; `command` is that of cli.py."""
    sub = command(
        "quantize",
        _run_quantize,
        "Write a bundle whose generator computes in int8, on a CPU and in TensorRT engines built of it, calibrated "
        "on one's own labels and exemplars.",
        "flashcocos quantize model.zip --input labels/ --exemplar photos/ --exemplar-label photo_labels/ -o int8.zip",
    )
    sub.add_argument("bundle", metavar="BUNDLE", help="model bundle, a folder or a .zip")
    sub.add_argument("--input", metavar="PATH", help="label file, or folder of label files")
    sub.add_argument("--exemplar", metavar="PATH", help="exemplar image for all, or folder of images paired by name")
    sub.add_argument("--exemplar-label", metavar="PATH", help="label file of the exemplar, or folder paired by name")
    sub.add_argument("--pairs", metavar="CSV", help="list of input,exemplar[,exemplar_label] to use instead")
    sub.add_argument("--count", type=int, default=32, metavar="N", help="pairs to use at most (default: 32)")
    sub.add_argument("--min-psnr", type=float, default=32.0, metavar="DB", help="least quality to accept (default: 32)")
    sub.add_argument("-o", "--output", required=True, metavar="PATH", help="bundle to write, a folder or a .zip")


def _run_quantize(options: argparse.Namespace) -> int:
    from pathlib import Path

    from ..runtime.jobs import plan_jobs
    from .quantize import quantize_bundle

    def path(name: str) -> Path | None:
        return Path(value) if (value := getattr(options, name)) else None

    nowhere = Path(options.output).with_name("pictures")  # the plan wants to know where results would go
    jobs = plan_jobs(path("input"), path("exemplar"), path("exemplar_label"), nowhere, pairs=path("pairs"))
    step = max(1, len(jobs) // max(1, options.count))
    done = quantize_bundle(options.bundle, options.output, jobs[::step][: options.count], min_psnr=options.min_psnr)
    print(
        f"{done.quantized} of {done.convolutions} convolutions in int8; "
        f"{min(done.psnr):.1f} to {max(done.psnr):.1f} dB on {len(done.psnr)} held-out pairs"
    )
    print(done.path)
    return 0


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
