"""`flashcocos prepare`, `pairs` and `train`: from one's own data to a model file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..errors import InputError, printable
from ..files import require_distinct, require_file
from ..runtime.options import DEVICES
from .arguments import AddCommand, show, sides

TITLE = "Data and training"


def add_commands(command: AddCommand) -> None:
    """Add the parsers of this family."""
    _add_prepare(command)
    _add_pairs(command)
    _add_train(command)


def _add_prepare(command: AddCommand) -> None:
    parser = command(
        "prepare",
        _prepare,
        "Write label files of your own data.",
        "flashcocos prepare celebahqedge faces/ -o labels/ --size 256",
        "They have the form that training and translation read.",
    )
    parser.add_argument(
        "task", choices=("avatars", "ade20k", "celebahq", "celebahqedge", "deepfashion"), help="what the labels are for"
    )
    parser.add_argument(
        "source", metavar="FOLDER", help="pictures and raw label files, in the task's published layout or flat"
    )
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="folder for the label files")
    parser.add_argument("--size", type=sides, metavar="SIZE", help="SIDE or HEIGHTxWIDTH (default: each file's own)")
    parser.add_argument(
        "--canny", choices=("upstream", "modern"), default="upstream", help="edge detector of celebahqedge"
    )
    parser.add_argument("--list", metavar="FILE", help="prepare only the samples that this list names")
    parser.add_argument(
        "--nearest", action="store_true", help="of avatars: colors not in the palette become the nearest"
    )


def _prepare(options: argparse.Namespace) -> int:
    from ..preprocess.prepare import prepare_folder

    require_distinct(options.output, options.source, options.list)
    if options.list is not None:
        require_file(options.list)
    summary = prepare_folder(
        options.task,
        options.source,
        options.output,
        size=options.size,
        canny=options.canny,
        list_file=options.list,
        nearest=options.nearest,
    )
    for message in summary.messages:
        print(printable(f"{message.name}: {message.text}"), file=sys.stderr)
    show(f"{summary.prepared} prepared, {summary.failed} failed: {options.output}")
    return 1 if summary.failed else 0


def _add_pairs(command: AddCommand) -> None:
    parser = command(
        "pairs",
        _pairs,
        "List the most similar pictures of each picture in a folder.",
        "flashcocos pairs data/images -o pairs.txt --vgg vgg19-dcbb9e9d.pth",
        "They are the exemplars to train and to score with.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="pictures, searched through")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="list to write; features are kept beside it"
    )
    parser.add_argument("--vgg", metavar="PATH", help="compare by VGG19, its weights from this file")
    parser.add_argument("--model", metavar="PATH", help="or by the features of a trained model, .safetensors")
    parser.add_argument("--exemplars", metavar="FOLDER", help="retrieve from these pictures (default: FOLDER itself)")
    parser.add_argument("-k", "--count", type=int, default=10, metavar="K", help="exemplars per picture (default: 10)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="pictures that run together (default: 8)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where the network runs (default: auto)")


def _pairs(options: argparse.Namespace) -> int:
    for path in filter(None, (options.vgg, options.model)):
        require_file(path)
    require_distinct(options.output, options.vgg, options.model, options.folder, options.exemplars)
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
        print(printable(reason if reason.startswith(name) else f"{name}: {reason}"), file=sys.stderr)
    show(f"{summary.written} listed, {len(summary.failed)} left out: {options.output}")
    return 1 if summary.failed else 0


def _add_train(command: AddCommand) -> None:
    parser = command(
        "train",
        _train,
        "Train a model, or continue a training that was stopped.",
        "flashcocos train avatars-128 --set run.batch=16 -o avatars\n"
        "torchrun --nproc_per_node 8 -m flashcocos.cli train ade20k",
        "On several GPUs: under torchrun.",
    )
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="settings: a .toml file, or a preset: avatars-128, avatars-256, ade20k, celebahq, celebahqedge, "
        "deepfashion",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting, as in schedule.steps=500"
    )
    parser.add_argument(
        "-o", "--output", metavar="FOLDER", help="model, checkpoint and logs (default: training/ and CONFIG's name)"
    )
    parser.add_argument(
        "--estimate-memory",
        type=float,
        nargs="+",
        metavar="GIB",
        help="train nothing: show the memory of a step, and the largest batch that fits in so many GiB",
    )


def _train(options: argparse.Namespace) -> int:
    import os

    from ..train.settings import read_settings
    from ..train.trainer import MODEL, train

    if options.config.endswith(".toml"):
        require_file(options.config)
    settings = read_settings(options.config, options.set)
    if options.estimate_memory:
        if options.output:
            raise InputError("--estimate-memory writes nothing; leave --output out")
        from tqdm import tqdm

        from ..train.memory_estimate import report

        with tqdm(desc="estimate", unit="step", disable=None) as progress:
            show(report(settings, options.estimate_memory, progress))
        return 0
    folder = Path(options.output or Path("training", Path(options.config).stem))
    require_distinct(folder, options.config)
    stopped = train(settings, folder)
    if os.environ.get("RANK", "0") == "0":
        show(folder / MODEL)
    return 128 + stopped if stopped else 0  # as a shell reports a signal
