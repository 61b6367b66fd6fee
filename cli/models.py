"""`flashcocos info`, `download`, `convert`, `export`, `verify`, `quantize`, `build` and `export-triton`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import InputError
from ..files import require_distinct, require_file
from .arguments import BUNDLE, AddCommand, add_pairing, parse_target, show, sides

TITLE = "Models"


def add_commands(command: AddCommand) -> None:
    """Add the parsers of this family."""
    _add_info(command)
    _add_download(command)
    _add_convert(command)
    _add_export(command)
    _add_verify(command)
    _add_quantize(command)
    _add_build(command)
    _add_export_triton(command)


def _add_info(command: AddCommand) -> None:
    parser = command(
        "info",
        _info,
        "Show versions and devices, and what a model bundle contains.",
        "flashcocos info model.zip",
    )
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE", help=f"{BUNDLE}; without it, this machine only")
    parser.add_argument("--engines", metavar="DIR", help="its TensorRT engines (default: beside the bundle)")
    parser.add_argument(
        "--size", type=sides, metavar="SIZE", help="show their GPU memory at this size: SIDE or HEIGHTxWIDTH in pixels"
    )
    parser.add_argument("--tile", type=int, metavar="PIXELS", help="the same for tiles of this side")


def _info(options: argparse.Namespace) -> int:
    from ..bundle.default_model import resolve_model
    from ..runtime.info import describe_bundle

    bundle = options.bundle and resolve_model(options.bundle)
    show(describe_bundle(bundle, options.engines, options.size, options.tile))
    return 0


def _add_download(command: AddCommand) -> None:
    parser = command(
        "download",
        _download,
        "Download a published checkpoint into the cache folder.",
        "flashcocos download ade20k",
        "A download that was interrupted goes on where it stopped, and its SHA-384 is checked.",
    )
    parser.add_argument("name", choices=("ade20k",), help="which: ade20k")
    parser.add_argument("--cache", metavar="FOLDER", help="where to keep it (default: the user's cache folder)")
    parser.add_argument("--base-url", metavar="URL", help="a mirror that has the same files")


def _download(options: argparse.Namespace) -> int:
    from ..export.download import BASE_URL, download

    for path in download(options.name, options.cache, base_url=options.base_url or BASE_URL):
        show(path)
    return 0


def _add_convert(command: AddCommand) -> None:
    parser = command(
        "convert",
        _convert,
        "Turn upstream's two checkpoints into one model file.",
        "flashcocos convert latest_net_Corr.pth latest_net_G.pth -o model.safetensors",
        "The task and the model's options are read from the shapes of the weights.",
    )
    parser.add_argument("corr", metavar="CORR.pth", help="the correspondence network")
    parser.add_argument("generator", metavar="G.pth", help="the generator")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="model file to write, .safetensors")
    parser.add_argument("--task", help="name of the task, if the number of label channels is no published task's")
    parser.add_argument("--label-kind", choices=("classes", "channels"), help="likewise: class ids or planes")
    parser.add_argument("--warp-upsampling", choices=("nearest", "bilinear", "pixel_shuffle"), help="likewise")


def _convert(options: argparse.Namespace) -> int:
    from ..train.upstream import convert

    for path in (options.corr, options.generator):
        require_file(path)
        require_distinct(options.output, path)
    config = convert(
        options.corr,
        options.generator,
        options.output,
        task=options.task,
        label_kind=options.label_kind,
        warp_upsampling=options.warp_upsampling,
    )
    show(
        f"task {config.task}: {config.label_channels} {config.label_kind}, adaptor kernel {config.adaptor_kernel}, "
        f"labels {'are' if config.condition_on_label else 'are not'} part of the matching, "
        f"{config.warp_upsampling} upsampling"
    )
    show(options.output)
    return 0


def _add_export(command: AddCommand) -> None:
    parser = command(
        "export",
        _export,
        "Export a model file as a bundle, which the other commands run.",
        "flashcocos export model.safetensors -o model.zip --precision float16",
        "With --single: as one portable ONNX graph.",
    )
    parser.add_argument("model", metavar="MODEL", help="model file, .safetensors")
    parser.add_argument(
        "-o", "--output", required=True, metavar="PATH", help="bundle: a folder or a .zip; with --single: .onnx"
    )
    parser.add_argument(
        "--single", action="store_true", help="one graph of standard operators, label and exemplar to picture"
    )
    parser.add_argument("--precision", choices=("float32", "float16"), default="float32", help="of the stored weights")
    parser.add_argument("--license", default="", metavar="TEXT", help="license of the weights, kept in the manifest")
    parser.add_argument("--aot", nargs="+", metavar="SM", help="also the warp, compiled for GPUs: --aot sm_86 sm_89")
    parser.add_argument(
        "--plain",
        action="store_true",
        help="leave convolutions as they are, for ONNX Runtime on a GPU; a CPU is faster without this",
    )


def _export(options: argparse.Namespace) -> int:
    if options.single and options.aot:
        raise InputError("--aot puts kernels into a bundle; --single writes one graph without any")
    require_file(options.model)
    require_distinct(options.output, options.model)
    if options.single:
        from ..export.single import export_single

        show(export_single(options.model, options.output, precision=options.precision, license=options.license))
        return 0
    if options.output.endswith(".onnx"):
        raise InputError(f"output {options.output}: a bundle is a folder or a .zip; --single writes one .onnx")
    from ..export.bundle import export_bundle

    targets = [parse_target(target) for target in options.aot or ()]
    show(
        export_bundle(
            options.model,
            options.output,
            precision=options.precision,
            license=options.license,
            targets=targets,
            plain=options.plain,
        )
    )
    return 0


def _add_verify(command: AddCommand) -> None:
    parser = command(
        "verify",
        _verify,
        "Check a bundle, and compare it with the model that it came from.",
        "flashcocos verify model.zip --checkpoint model.safetensors",
        "Checks hashes and graphs, and compares ONNX Runtime with PyTorch, stage by stage and end to end.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help=BUNDLE)
    parser.add_argument(
        "--checkpoint", metavar="MODEL", help="model file it was exported from; without it, no comparison"
    )
    parser.add_argument(
        "--size", type=sides, action="append", metavar="SIZE", help="size to check at; repeat for several"
    )


def _verify(options: argparse.Namespace) -> int:
    from ..bundle.default_model import resolve_model
    from ..export.verify import verify

    if options.checkpoint is not None:
        require_file(options.checkpoint)
    sizes = {"sizes": options.size} if options.size else {}
    report = verify(resolve_model(options.bundle), options.checkpoint, **sizes)
    show(report.table())
    return 0 if report.ok else 1


def _add_quantize(command: AddCommand) -> None:
    parser = command(
        "quantize",
        _quantize,
        "Write a bundle whose generator computes in int8.",
        "flashcocos quantize model.zip --input labels/ --exemplar photos/ --exemplar-label photo_labels/ -o int8.zip",
        "It is calibrated on your labels and exemplars, and runs on a CPU and in TensorRT engines built of it.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help=BUNDLE)
    add_pairing(parser)
    parser.add_argument("--count", type=int, default=32, metavar="N", help="pairs to use at most (default: 32)")
    parser.add_argument(
        "--min-psnr", type=float, default=32.0, metavar="DB", help="lowest quality to accept (default: 32)"
    )
    parser.add_argument("-o", "--output", required=True, metavar="PATH", help="bundle to write, a folder or a .zip")


def _quantize(options: argparse.Namespace) -> int:
    from ..bundle.default_model import resolve_model
    from ..export.quantize import quantize_bundle
    from ..runtime.jobs import FolderRequest, match_files

    bundle = resolve_model(options.bundle)
    files = (options.input, options.exemplar, options.exemplar_label)
    require_distinct(options.output, bundle, *files, options.pairs)
    nowhere = Path(options.output).with_name("pictures")  # match_files plans pictures, and none is written
    jobs = match_files(FolderRequest(*files, nowhere, pairs=options.pairs))
    step = max(1, len(jobs) // max(1, options.count))
    jobs = jobs[::step][: options.count]
    for job in jobs:
        job.check()
        require_distinct(options.output, job.label, job.exemplar, job.exemplar_label)
    done = quantize_bundle(bundle, options.output, jobs, min_psnr=options.min_psnr)
    show(
        f"{done.quantized} of {done.convolutions} convolutions in int8; "
        f"{min(done.psnr):.1f} to {max(done.psnr):.1f} dB on {len(done.psnr)} held-out pairs"
    )
    show(done.path)
    return 0


def _add_build(command: AddCommand) -> None:
    parser = command(
        "build",
        _build,
        "Build TensorRT engines of a bundle, for this or other GPUs.",
        "flashcocos build model.zip --target sm_89 --precision float16 --size 512 --size 256:512:1024",
        "Compiles the warp's kernels too.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help=BUNDLE)
    parser.add_argument(
        "--target", nargs="+", default=[], metavar="SM",
        help="compute capabilities as sm_89; one engine serves all (default: the GPU of this machine)",
    )  # fmt: skip
    parser.add_argument(
        "--precision", choices=("float32", "float16"), default="float16",
        help="of the arithmetic, except of what is int8 in a bundle of flashcocos quantize (default: float16)",
    )  # fmt: skip
    parser.add_argument(
        "--variant", choices=("tensorrt-rtx", "tensorrt"), default="tensorrt-rtx",
        help="tensorrt-rtx builds for GPUs of other machines; tensorrt for this one's (default: tensorrt-rtx)",
    )  # fmt: skip
    parser.add_argument(
        "--size", action="append", default=[], metavar="SIZE",
        help="pixels: SIDE, HEIGHTxWIDTH, or least:optimal:most for any size in between; may be repeated "
        "(default: the model's own)",
    )  # fmt: skip
    parser.add_argument("--batch", default="1", metavar="N", help="pictures at once: N or least:optimal:most (1)")
    parser.add_argument(
        "--tile", type=int, metavar="PIXELS", help="side of the tiles that finish larger pictures; less memory"
    )
    parser.add_argument("-o", "--output", metavar="DIR", help="folder of the engines (default: beside the bundle)")
    parser.add_argument("--check", action="store_true", help="first compare the graphs with the bundle's, on the CPU")
    parser.add_argument("--no-kernels", action="store_true", help="leave out the warp's kernels, which need triton")


def _build(options: argparse.Namespace) -> int:
    from ..bundle import Bundle
    from ..bundle.default_model import resolve_model
    from ..export.tensorrt.build import build, build_kernels, current_architecture, parse_profile
    from ..export.tensorrt.check import require_agreement
    from ..runtime.gpu.memory_estimate import estimate_memory
    from ..runtime.gpu.store import default_folder, import_variant

    path = resolve_model(options.bundle)
    bundle, precision = Bundle(path), options.precision
    config = bundle.manifest.config
    profiles = [parse_profile(size, options.batch) for size in options.size or [str(config.image_size)]]
    import_variant(options.variant)  # a missing package is an error before anything is built
    targets = [parse_target(target) for target in options.target] or [current_architecture()]
    folder = Path(options.output) if options.output else default_folder(path)
    require_distinct(folder, path)
    if options.check:
        decibels = require_agreement(bundle, precision, config.image_size)
        apart = ", int8 apart" if bundle.manifest.precision == "int8" else ""
        print(f"{precision} against the bundle's graphs on the CPU, {config.image_size} px{apart}: {decibels:.1f} dB")
    if not options.no_kernels:
        names = build_kernels(path, folder, targets, precision)
        print(f"kernels: {', '.join(names)}", flush=True)
    records = []
    for engine in build(
        path,
        targets=targets,
        precision=precision,
        variant=options.variant,
        profiles=profiles,
        output=folder,
        tile=options.tile,
    ):
        record = engine.record
        records.append(record)
        int8 = f"{record.int8_convolutions} convolutions in int8, " if record.int8_convolutions else ""
        print(
            f"{record.key.stage} at {record.key.profile}: {'kept' if engine.kept else 'built'}, {_mib(record.bytes)}; "
            f"{int8}weights {_mib(record.weight_bytes)}, working memory {_mib(record.activation_bytes)}",
            flush=True,
        )
    for profile in profiles:
        batch, height, width = (axis[2] for axis in (profile.batch, profile.height, profile.width))
        fitting = [record for record in records if record.key.profile in (profile, profile.tiled(options.tile))]
        print(f"device memory: {estimate_memory(config, fitting, height, width, batch=batch, tile=options.tile)}")
    show(folder)
    return 0


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _add_export_triton(command: AddCommand) -> None:
    parser = command(
        "export-triton",
        _export_triton,
        "Write a model repository for Triton Inference Server.",
        "flashcocos export-triton model.zip -o models/ --gpu",
        "A README.md in it says how to run and ask it; docs/triton-server.md says more.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help=BUNDLE)
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="repository to write")
    parser.add_argument(
        "--platform", choices=("onnxruntime", "tensorrt", "python"), default="onnxruntime",
        help="what runs the stages: a backend of the server, or ONNX Runtime in Python models (default: onnxruntime)",
    )  # fmt: skip
    parser.add_argument(
        "--instances", type=int, default=1, metavar="N", help="of each stage and of the warp, on each device (1)"
    )
    parser.add_argument("--gpu", action="store_true", help="run the stages and the warp on a GPU")


def _export_triton(options: argparse.Namespace) -> int:
    from ..bundle.default_model import resolve_model
    from ..export.triton_server import export_triton

    show(
        export_triton(
            resolve_model(options.bundle),
            options.output,
            platform=options.platform,
            instances=options.instances,
            gpu=options.gpu,
        )
    )
    return 0
