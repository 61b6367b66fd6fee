"""`flashcocos evaluate` and `bench`: how good a model is, and how fast."""

from __future__ import annotations

import argparse

from ..errors import InputError
from ..files import require_distinct, require_file, require_target
from ..runtime.options import CPU_BACKENDS
from .arguments import BUNDLE, AddCommand, add_engine, add_threads, engine, names, show

TITLE = "Measure"


def add_commands(command: AddCommand) -> None:
    """Add the parsers of this family."""
    _add_evaluate(command)
    _add_bench(command)


def _add_evaluate(command: AddCommand) -> None:
    parser = command(
        "evaluate",
        _evaluate,
        "Score a model on rendered portraits or on photographs.",
        "flashcocos evaluate model.zip --data avatars -o scores.json --sheet sheet.png",
        "Rendered portraits (avatars) have exact targets; photographs come in a folder of your own.",
    )
    parser.add_argument("model", metavar="MODEL", help=f"{BUNDLE}; or a model file .safetensors, run by PyTorch")
    parser.add_argument("--data", required=True, metavar="DATA", help='"avatars", or the folder of a photo data set')
    parser.add_argument("--count", type=int, metavar="N", help="score the first N pairs only")
    parser.add_argument(
        "--split", choices=("train", "validation", "test"), default="test", help="of the avatars (default: test)"
    )
    parser.add_argument(
        "--hand-drawn", action="store_true", help="avatars: labels as if painted by hand (the targets stay)"
    )
    parser.add_argument("--pairs", metavar="LIST", help="photographs: list of name,exemplar (see `flashcocos pairs`)")
    parser.add_argument("--labels", metavar="FOLDER", help="photographs: labels that `flashcocos prepare` wrote")
    parser.add_argument("--task", help="photographs: whose layout the folder has (default: the model's task)")
    parser.add_argument(
        "--metrics", type=names, default="fid,swd,semantic,style", metavar="LIST",
        help="photographs: which (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--vgg", metavar="PATH", help="weights of VGG19, for semantic and style")
    parser.add_argument("--inception-weights", metavar="PATH", help="Inception network as TorchScript, for fid")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the scores as JSON")
    parser.add_argument("--sheet", metavar="FILE", help="write a picture of the first 24 pairs")
    add_engine(parser)
    parser.set_defaults(precision="float32")  # so that the scores of two machines can be compared


def _evaluate(options: argparse.Namespace) -> int:
    import json

    from ..benchmarks.quality.evaluate import evaluate_model
    from ..bundle.default_model import resolve_model
    from ..files import atomic_path

    model = resolve_model(options.model)
    weights = (options.vgg, options.inception_weights)
    for path in filter(None, (options.pairs, *weights)):
        require_file(path)
    for output in filter(None, (options.output, options.sheet)):
        require_target(output)  # before an hour of scoring
        folders = (options.labels, None if options.data == "avatars" else options.data)
        require_distinct(output, model, options.pairs, *weights, *folders)
    if options.output and options.sheet:
        require_distinct(options.output, options.sheet)
    scores = evaluate_model(
        model,
        options.data,
        split=options.split,
        count=options.count,
        hand_drawn=options.hand_drawn,
        task=options.task,
        pairs=options.pairs,
        labels=options.labels,
        metrics=options.metrics,
        vgg=options.vgg,
        inception=options.inception_weights,
        sheet=options.sheet,
        **engine(options),
    )
    text = json.dumps(scores, indent=2)
    show(text)
    if options.output:
        with atomic_path(options.output) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    for path in filter(None, (options.output, options.sheet)):
        show(path)
    return 0


def _add_bench(command: AddCommand) -> None:
    parser = command(
        "bench",
        _bench,
        "Measure how fast a bundle is on this machine's CPU.",
        "flashcocos bench model.zip --quick\n"
        "flashcocos bench model.zip --profile --size 512\n"
        "flashcocos bench model.zip --size 256 --size 512 -o bench.jsonl",
        "Prints a table with a row for each backend that is installed.",
    )
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE", help=f"{BUNDLE} (default)")
    parser.add_argument("--quick", action="store_true", help="two minutes at most, and a batch of 4 too")
    parser.add_argument(
        "--profile", action="store_true", help="instead: the time of each stage and kind of operator in ONNX Runtime"
    )
    parser.add_argument(
        "--size", type=int, action="append", default=[], metavar="SIDE", help="in pixels; repeat for several"
    )
    parser.add_argument("--backend", choices=CPU_BACKENDS, action="append", default=[], help="repeat for several")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed translations per case (default: 5)")
    add_threads(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="rows to write, .jsonl; continues a run that stopped")
    parser.add_argument("--fresh", action="store_true", help="start the output anew")


def _bench(options: argparse.Namespace) -> int:
    from ..bundle.default_model import resolve_model

    bundle = resolve_model(options.bundle)
    if options.profile:
        if clashing := [name for name in ("quick", "backend", "output") if getattr(options, name)]:
            raise InputError(f"--profile runs ONNX Runtime and prints; leave --{clashing[0]} out")
        from ..benchmarks.speed.profiling import profile, report

        for size in options.size or [None]:
            show(report(profile(bundle, size=size, repeats=options.repeats, num_threads=options.threads)))
        return 0
    from ..benchmarks.speed.bundle import bench, table

    if options.output:
        require_target(options.output)
        require_distinct(options.output, bundle)
    rows = bench(
        bundle,
        sizes=options.size,
        backends=options.backend,
        repeats=options.repeats,
        num_threads=options.threads,
        quick=options.quick,
        output=options.output,
        fresh=options.fresh,
    )
    show(table(rows))
    if options.output:
        show(options.output)
    return 1 if any(row["status"] in ("outside", "failed") for row in rows) else 0
