"""The command line: `flashcocos COMMAND`. Only argparse is imported until a command runs, so that `--help` is instant.

Each command is a parser and a `_run_...` function that calls one function of the package. Exit codes: 0 done, 1 an
error or at least one file that failed, 2 wrong usage, 128 + N stopped by signal N (130: Ctrl-C).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .. import __version__
from ..errors import FlashcocosError, InputError
from ..export.commands import add_build, add_quantize

# the extra that brings a package which a command may find missing
_EXTRAS = {
    "torch": "export",
    "safetensors": "export",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "cpu",
    "tomli": "train",
}
_COMMAND_EXTRAS = {"train": "train", "pairs": "train", "evaluate": "eval"}  # each brings all that its command needs

Run = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; errors are one line on standard error unless `--debug`."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (FlashcocosError, OSError) as error:
        if options.debug:
            raise
        print(f"flashcocos {options.command}: error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").split(".")[0])
        extra = extra and _COMMAND_EXTRAS.get(options.command, extra)
        if options.debug or extra is None:
            raise
        print(
            f"flashcocos {options.command}: error: the package {error.name} is missing; "
            f"pip install 'flashcocos[{extra}]'",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(f"flashcocos {options.command}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flashcocos", description="Exemplar-based image translation (CoCosNet), built for deployment."
    )
    parser.add_argument("--version", action="version", version=f"flashcocos {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: Run, summary: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=run)
        return sub

    _add_translate(command)
    _add_demo(command)
    _add_info(command)
    _add_prepare(command)
    _add_download(command)
    _add_convert(command)
    _add_train(command)
    _add_export(command)
    add_build(command)
    add_quantize(command)
    _add_verify(command)
    _add_pairs(command)
    _add_evaluate(command)
    _add_bench(command)
    return parser


Command = Callable[[str, Run, str, str], argparse.ArgumentParser]


def _size(text: str) -> tuple[int, int] | str:
    return "input" if text == "input" else _sides(text)


def _sides(text: str) -> tuple[int, int]:
    """Parse "256" as (256, 256) and "256x384" as (256, 384), height first."""
    parts = text.lower().split("x")
    try:
        height, width = (int(parts[0]), int(parts[-1])) if len(parts) <= 2 else (0, 0)
    except ValueError:
        height = width = 0
    if height <= 0 or width <= 0:
        raise argparse.ArgumentTypeError(f"expected SIDE or HEIGHTxWIDTH in pixels, got {text!r}")
    return height, width


def _add_translate(command: Command) -> None:
    sub = command(
        "translate",
        _run_translate,
        "Translate label maps into images that take their look from exemplars.",
        "flashcocos translate --model model.zip --input labels/ --exemplar cat.jpg --exemplar-label cat.png -o out/",
    )
    sub.add_argument("--model", required=True, metavar="BUNDLE", help="model bundle, a folder or a .zip")
    sub.add_argument("--input", metavar="PATH", help="label file, or folder of label files (see `flashcocos prepare`)")
    sub.add_argument("--exemplar", metavar="PATH", help="exemplar image for all, or folder of images paired by name")
    sub.add_argument("--exemplar-label", metavar="PATH", help="label file of the exemplar, or folder paired by name")
    sub.add_argument("--pairs", metavar="CSV", help="instead of these: lines of input,exemplar[,exemplar_label]")
    sub.add_argument("-o", "--output", required=True, metavar="PATH", help="image to write, or folder for a folder")
    sub.add_argument("--size", type=_size, help='SIDE, HEIGHTxWIDTH or "input" (default: the model\'s own)')
    sub.add_argument("--tile", type=int, metavar="PIXELS", help="finish larger pictures in tiles of this side")
    sub.add_argument("--format", choices=("png", "jpg"), default="png", help="of the images in a folder")
    sub.add_argument("--save", default="", metavar="LIST", help="also write any of warped,matches,confidence,grid")
    sub.add_argument("--grid", action="store_true", help="same as --save grid: input, exemplar, warped, result in one")
    sub.add_argument("--resume", action="store_true", help="skip inputs whose output is there already")
    _add_engine(sub, gpu=True)
    sub.add_argument("--engines", metavar="DIR", help="what `flashcocos build` wrote (default: beside the bundle)")
    sub.add_argument(
        "--exemplar-cache-mib", type=int, metavar="MIB", help="GPU memory for encoded exemplars (default: 512)"
    )


def _add_engine(sub: argparse.ArgumentParser, *, gpu: bool = False) -> None:
    """The options of `_engine`; gpu: also those that need engines built for a GPU, and the backend's own precision."""
    backends, precisions, warps = ["onnxruntime", "openvino"], ["float32", "bfloat16"], ["auto", "numpy", "numba"]
    arithmetic = "of the arithmetic; bfloat16: openvino"
    if gpu:
        backends += ["tensorrt", "tensorrt-rtx"]
        precisions += ["float16"]
        warps += ["cuda"]
        arithmetic += "; float16: tensorrt (default: float32; of tensorrt the fastest that was built)"
    sub.add_argument("--backend", choices=backends, default="onnxruntime", help="what runs the graphs")
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the graphs run")
    sub.add_argument("--precision", choices=precisions, default=None if gpu else "float32", help=arithmetic)
    sub.add_argument("--warp", choices=warps, default="auto", help="which code warps; numpy, numba: on the CPU")
    sub.add_argument("--threads", type=int, metavar="N", help="CPU threads of each graph (default: all cores)")


def _engine(options: argparse.Namespace) -> dict[str, Any]:
    names = ("backend", "device", "precision", "warp")
    return {name: getattr(options, name) for name in names} | {"num_threads": options.threads}


def _run_translate(options: argparse.Namespace) -> int:
    from ..runtime import Translator
    from ..runtime.folder import translate_folder

    save = {name for name in options.save.split(",") if name} | ({"grid"} if options.grid else set())
    with Translator(
        options.model,
        **_engine(options),
        engines=options.engines,
        exemplar_cache_mib=options.exemplar_cache_mib,
        tile=options.tile,
    ) as translator:
        summary = translate_folder(
            translator,
            options.input,
            options.exemplar,
            options.exemplar_label,
            options.output,
            pairs=options.pairs,
            size=options.size,
            save=save,
            suffix=f".{options.format}",
            resume=options.resume,
            progress=True,
        )
    print(f"{summary.done} translated, {summary.skipped} skipped, {len(summary.failed)} failed: {options.output}")
    return 1 if summary.failed else 0


def _add_demo(command: Command) -> None:
    sub = command(
        "demo",
        _run_demo,
        "Translate the inputs that ship with flashcocos with the model that ships with it.",
        "flashcocos demo -o demo_output",
    )
    sub.add_argument("-o", "--output", default="demo_output", metavar="FOLDER", help="default: demo_output")


def _run_demo(options: argparse.Namespace) -> int:
    from ..bundle.default_model import PAIRS
    from ..runtime import Translator
    from ..runtime.folder import translate_folder

    with Translator(device="cpu") as translator:
        summary = translate_folder(
            translator, None, None, None, options.output, pairs=PAIRS, save={"grid"}, progress=True
        )
    print(f"{summary.done} of {summary.done + len(summary.failed)} pictures translated; *.grid.png shows each as")
    print(f"input | exemplar | warped exemplar | result: {options.output}")
    return 1 if summary.failed else 0


def _add_info(command: Command) -> None:
    sub = command(
        "info",
        _run_info,
        "Show versions and devices, and what a model bundle holds and would run on.",
        "flashcocos info model.zip",
    )
    sub.add_argument("bundle", nargs="?", metavar="BUNDLE", help="model bundle, a folder or a .zip")
    sub.add_argument("--engines", metavar="DIR", help="its TensorRT engines (default: beside the bundle)")
    sub.add_argument(
        "--size", type=_sides, metavar="SIZE", help="plan their GPU memory: SIDE or HEIGHTxWIDTH in pixels"
    )
    sub.add_argument("--tile", type=int, metavar="PIXELS", help="plan it for tiles of this side")


def _run_info(options: argparse.Namespace) -> int:
    from ..runtime.info import describe_bundle

    print(describe_bundle(options.bundle, options.engines, options.size, options.tile))
    return 0


def _add_prepare(command: Command) -> None:
    sub = command(
        "prepare",
        _run_prepare,
        "Write the label files of a folder of one's own data, in the form that training and translation read.",
        "flashcocos prepare celebahqedge faces/ -o labels/ --size 256",
    )
    sub.add_argument("task", choices=("ade20k", "celebahq", "celebahqedge", "deepfashion"))
    sub.add_argument(
        "source", metavar="FOLDER", help="pictures and raw label files, in the task's published layout or flat"
    )
    sub.add_argument("-o", "--output", required=True, metavar="FOLDER")
    sub.add_argument("--size", type=_sides, metavar="SIZE", help="SIDE or HEIGHTxWIDTH (default: each file's own)")
    sub.add_argument(
        "--canny", choices=("upstream", "modern"), default="upstream", help="edge detector of celebahqedge"
    )
    sub.add_argument("--list", metavar="FILE", help="prepare only the samples that this list names")


def _run_prepare(options: argparse.Namespace) -> int:
    from ..preprocess.prepare import prepare_folder

    summary = prepare_folder(
        options.task, options.source, options.output, size=options.size, canny=options.canny, list_file=options.list
    )
    for message in summary.messages:
        print(f"{message.name}: {message.text}", file=sys.stderr)
    print(f"{summary.prepared} prepared, {summary.failed} failed: {options.output}")
    return 1 if summary.failed else 0


def _add_download(command: Command) -> None:
    sub = command(
        "download",
        _run_download,
        "Fetch a published checkpoint into the cache folder; resumes, and checks its SHA-384.",
        "flashcocos download ade20k",
    )
    sub.add_argument("name", choices=("ade20k",))
    sub.add_argument("--cache", metavar="FOLDER", help="where to keep it (default: the user's cache folder)")
    sub.add_argument("--base-url", metavar="URL", help="a mirror that holds the same files")


def _run_download(options: argparse.Namespace) -> int:
    from ..export.download import BASE_URL, download

    for path in download(options.name, options.cache, base_url=options.base_url or BASE_URL):
        print(path)
    return 0


def _add_convert(command: Command) -> None:
    sub = command(
        "convert",
        _run_convert,
        "Turn upstream's checkpoints into one model file; task and options are read off the weights' shapes.",
        "flashcocos convert latest_net_Corr.pth latest_net_G.pth -o model.safetensors",
    )
    sub.add_argument("corr", metavar="CORR.pth", help="the correspondence network")
    sub.add_argument("generator", metavar="G.pth", help="the generator")
    sub.add_argument("-o", "--output", required=True, metavar="FILE", help="model file to write, .safetensors")
    sub.add_argument("--task", help="name of the task, where the label channels are none of the published tasks'")
    sub.add_argument("--label-kind", choices=("classes", "channels"), help="likewise: class ids or planes")
    sub.add_argument("--warp-upsampling", choices=("nearest", "bilinear", "pixel_shuffle"), help="likewise")


def _run_convert(options: argparse.Namespace) -> int:
    from ..train.upstream import convert

    config = convert(
        options.corr,
        options.generator,
        options.output,
        task=options.task,
        label_kind=options.label_kind,
        warp_upsampling=options.warp_upsampling,
    )
    print(
        f"task {config.task}: {config.label_channels} {config.label_kind}, adaptor kernel {config.adaptor_kernel}, "
        f"mask mixing {'on' if config.condition_on_label else 'off'}, {config.warp_upsampling} upsampling"
    )
    print(options.output)
    return 0


def _add_train(command: Command) -> None:
    sub = command(
        "train",
        _run_train,
        "Train a model, or go on with a training that was stopped; under torchrun, on several GPUs.",
        "flashcocos train avatars-128 --set run.batch=16 -o avatars",
    )
    sub.add_argument(
        "config",
        metavar="CONFIG",
        help="settings: a .toml file, or a preset: avatars-128, ade20k, celebahq, celebahqedge, deepfashion",
    )
    sub.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting, as in schedule.steps=500"
    )
    sub.add_argument(
        "-o", "--output", metavar="FOLDER", help="model, checkpoint and logs (default: training/ and CONFIG's name)"
    )
    sub.add_argument(
        "--plan",
        type=float,
        nargs="+",
        metavar="GIB",
        help="train nothing: show the memory of a step, and the largest batch in so many GiB, as in --plan 8 12 24",
    )


def _run_train(options: argparse.Namespace) -> int:
    import os
    from pathlib import Path

    from ..train.settings import read_settings
    from ..train.trainer import MODEL, train

    settings = read_settings(options.config, options.set)
    if options.plan:
        if options.output:
            raise InputError("--plan writes nothing; leave --output out")
        from tqdm import tqdm

        from ..train.memory_estimate import report

        with tqdm(desc="plan", unit="step", disable=None) as progress:
            print(report(settings, options.plan, progress))
        return 0
    folder = Path(options.output or Path("training", Path(options.config).stem))
    stopped = train(settings, folder)
    if os.environ.get("RANK", "0") == "0":
        print(folder / MODEL)
    return 128 + stopped if stopped else 0  # as a shell reports a signal


def _add_export(command: Command) -> None:
    sub = command(
        "export",
        _run_export,
        "Export a model file as a bundle for the runtime, or with --single as one portable ONNX graph.",
        "flashcocos export model.safetensors -o model.zip --precision float16",
    )
    sub.add_argument("model", metavar="MODEL", help="model file, .safetensors")
    sub.add_argument(
        "-o", "--output", required=True, metavar="PATH", help="bundle: a folder or a .zip; --single: .onnx"
    )
    sub.add_argument(
        "--single", action="store_true", help="one graph of standard operators, label and exemplar to image"
    )
    sub.add_argument("--precision", choices=("float32", "float16"), default="float32", help="of the stored weights")
    sub.add_argument("--license", default="", metavar="TEXT", help="license of the weights, kept in the manifest")
    sub.add_argument("--aot", nargs="+", metavar="SM", help="also the warp, compiled for GPUs: --aot sm_86 sm_89")


def _run_export(options: argparse.Namespace) -> int:
    if options.single:
        if options.aot:
            raise InputError("--aot puts kernels into a bundle; --single writes one graph without any")
        from ..export.single import export_single

        print(export_single(options.model, options.output, precision=options.precision, license=options.license))
    else:
        from ..export.bundle import export_bundle
        from ..runtime.gpu.store import parse_target

        targets = [parse_target(target) for target in options.aot or ()]
        print(
            export_bundle(
                options.model, options.output, precision=options.precision, license=options.license, targets=targets
            )
        )
    return 0


def _add_verify(command: Command) -> None:
    sub = command(
        "verify",
        _run_verify,
        "Check a bundle: hashes, graphs, and ONNX Runtime against PyTorch, stage by stage and end to end.",
        "flashcocos verify model.zip --checkpoint model.safetensors",
    )
    sub.add_argument("bundle", metavar="BUNDLE")
    sub.add_argument("--checkpoint", metavar="MODEL", help="model file it was exported from; without it, no comparison")
    sub.add_argument(
        "--size", type=_sides, action="append", metavar="SIZE", help="size to check at; repeat for several"
    )


def _run_verify(options: argparse.Namespace) -> int:
    from ..export.verify import verify

    chosen = {"sizes": options.size} if options.size else {}
    report = verify(options.bundle, options.checkpoint, **chosen)
    print(report.table())
    return 0 if report.ok else 1


def _add_pairs(command: Command) -> None:
    sub = command(
        "pairs",
        _run_pairs,
        "List, for each picture of a folder, the others most alike, as exemplars to train and to score with.",
        "flashcocos pairs data/images -o pairs.txt --vgg vgg19-dcbb9e9d.pth",
    )
    sub.add_argument("folder", metavar="FOLDER", help="pictures, searched through")
    sub.add_argument("-o", "--output", required=True, metavar="FILE", help="list to write; features are kept beside it")
    sub.add_argument("--vgg", metavar="PATH", help="compare by VGG19, its weights from this file")
    sub.add_argument("--model", metavar="PATH", help="or by the features of a trained model, .safetensors")
    sub.add_argument("--exemplars", metavar="FOLDER", help="retrieve from these pictures (default: FOLDER itself)")
    sub.add_argument("-k", "--count", type=int, default=10, metavar="K", help="exemplars a picture (default: 10)")
    sub.add_argument("--batch", type=int, default=8, metavar="N", help="pictures that run together (default: 8)")
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the network runs")


def _run_pairs(options: argparse.Namespace) -> int:
    from ..train.pairs import open_extractor, write_pairs

    summary = write_pairs(
        options.folder,
        options.output,
        open_extractor(options.vgg, options.model, options.device),
        exemplars=options.exemplars,
        count=options.count,
        batch=options.batch,
    )
    for name, reason in summary.failed:
        print(reason if reason.startswith(name) else f"{name}: {reason}", file=sys.stderr)
    print(f"{summary.written} listed, {len(summary.failed)} left out: {options.output}")
    return 1 if summary.failed else 0


def _add_evaluate(command: Command) -> None:
    sub = command(
        "evaluate",
        _run_evaluate,
        "Score a model on the avatars' exact targets, or on a folder of photographs.",
        "flashcocos evaluate model.zip --data avatars -o scores.json --sheet sheet.png",
    )
    sub.add_argument("model", metavar="MODEL", help="model bundle, or model file .safetensors to score through PyTorch")
    sub.add_argument("--data", required=True, metavar="DATA", help='"avatars", or the folder of a photo data set')
    sub.add_argument("--count", type=int, metavar="N", help="score the first N pairs only")
    sub.add_argument(
        "--split", choices=("train", "validation", "test"), default="test", help="of the avatars (default: test)"
    )
    sub.add_argument("--pairs", metavar="LIST", help="photographs: list of name,exemplar (see `flashcocos pairs`)")
    sub.add_argument("--labels", metavar="FOLDER", help="photographs: labels that `flashcocos prepare` wrote")
    sub.add_argument("--task", help="photographs: whose layout the folder has (default: the model's task)")
    sub.add_argument(
        "--metrics", default="fid,swd,semantic,style", metavar="LIST", help="photographs: which (default: %(default)s)"
    )
    sub.add_argument("--vgg", metavar="PATH", help="weights of VGG19, for semantic and style")
    sub.add_argument("--inception-weights", metavar="PATH", help="Inception network as TorchScript, for fid")
    sub.add_argument("-o", "--output", metavar="FILE", help="write the scores as JSON")
    sub.add_argument("--sheet", metavar="FILE", help="write a picture of the first 24 pairs")
    _add_engine(sub)


def _run_evaluate(options: argparse.Namespace) -> int:
    import json

    from ..benchmarks.quality.evaluate import evaluate_model
    from ..files import atomic_path

    scores = evaluate_model(
        options.model,
        options.data,
        split=options.split,
        count=options.count,
        task=options.task,
        pairs=options.pairs,
        labels=options.labels,
        metrics=[name for name in options.metrics.split(",") if name],
        vgg=options.vgg,
        inception=options.inception_weights,
        sheet=options.sheet,
        **_engine(options),
    )
    text = json.dumps(scores, indent=2)
    print(text)
    if options.output:
        with atomic_path(options.output) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    for path in filter(None, (options.output, options.sheet)):
        print(path)
    return 0


def _add_bench(command: Command) -> None:
    sub = command(
        "bench",
        _run_bench,
        "Time a bundle on this machine's CPU, with each backend that is installed; prints a table.",
        "flashcocos bench model.zip --quick\n"
        "  flashcocos bench model.zip --profile --size 512\n"
        "  flashcocos bench model.zip --size 256 --size 512 -o bench.jsonl",
    )
    sub.add_argument("bundle", nargs="?", metavar="BUNDLE", help="model bundle (default: the one that ships)")
    sub.add_argument("--quick", action="store_true", help="two minutes at the most, and a batch of 4 with it")
    sub.add_argument(
        "--profile", action="store_true", help="instead: the time of each stage and kind of operator in ONNX Runtime"
    )
    sub.add_argument(
        "--size", type=int, action="append", default=[], metavar="SIDE", help="in pixels; repeat for several"
    )
    sub.add_argument(
        "--backend", choices=("onnxruntime", "openvino"), action="append", default=[], help="repeat for several"
    )
    sub.add_argument("--repeats", type=int, default=5, metavar="N", help="timed translations a case (default: 5)")
    sub.add_argument("--threads", type=int, metavar="N", help="CPU threads of each graph (default: all cores)")
    sub.add_argument("-o", "--output", metavar="FILE", help="rows to write, .jsonl; goes on where a run was stopped")
    sub.add_argument("--fresh", action="store_true", help="begin the output anew")


def _run_bench(options: argparse.Namespace) -> int:
    from ..bundle.default_model import default_model_path

    bundle = default_model_path() if options.bundle is None else options.bundle
    if options.profile:
        if clashing := [name for name in ("quick", "backend", "output") if getattr(options, name)]:
            raise InputError(f"--profile runs ONNX Runtime and prints; leave --{clashing[0]} out")
        from ..benchmarks.speed.profiling import profile, report

        for size in options.size or [None]:
            print(report(profile(bundle, size=size, repeats=options.repeats, threads=options.threads)))
        return 0
    from ..benchmarks.speed.bundle import bench, table

    rows = bench(
        bundle,
        sizes=options.size,
        backends=options.backend,
        repeats=options.repeats,
        threads=options.threads,
        quick=options.quick,
        output=options.output,
        fresh=options.fresh,
    )
    print(table(rows))
    if options.output:
        print(options.output)
    return 1 if any(row["status"] in ("outside", "failed") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
