"""`flashcocos demo` and `translate`: pictures from labels and exemplars."""

from __future__ import annotations

import argparse

from ..runtime.options import EXEMPLAR_CACHE_MIB
from .arguments import BUNDLE, AddCommand, add_engine, add_pairing, engine, names, show, sides_or_input

TITLE = "Translate"


def add_commands(command: AddCommand) -> None:
    """Add the parsers of this family."""
    parser = command(
        "demo",
        _demo,
        "Translate the labels that ship with flashcocos; a first try.",
        "flashcocos demo -o demo_output",
    )
    parser.add_argument(
        "-o", "--output", default="demo_output", metavar="FOLDER", help="folder for the pictures (default: demo_output)"
    )
    parser = command(
        "translate",
        _translate,
        "Translate label maps into pictures that look like exemplars.",
        "flashcocos translate --input label.png --exemplar cat.jpg --exemplar-label cat.png -o result.png\n"
        "flashcocos translate --model model.zip --input labels/ --exemplar photos/ -o out/",
        "One label gives one picture, a folder of labels a folder of pictures.",
    )
    parser.add_argument("--model", metavar="BUNDLE", help=f"{BUNDLE} (default)")
    add_pairing(parser)
    parser.add_argument("-o", "--output", required=True, metavar="PATH", help="picture to write, or folder")
    parser.add_argument("--size", type=sides_or_input, help='SIDE, HEIGHTxWIDTH or "input" (default: the model\'s own)')
    parser.add_argument("--tile", type=int, metavar="PIXELS", help="finish larger pictures in tiles of this side")
    parser.add_argument("--format", choices=("png", "jpg"), default="png", help="of the pictures in a folder")
    parser.add_argument(
        "--save", type=names, default=[], metavar="LIST", help="also write any of warped,matches,confidence,grid"
    )
    parser.add_argument(
        "--grid", action="store_true", help="same as --save grid: input, exemplar, warped, result in one picture"
    )
    parser.add_argument("--resume", action="store_true", help="skip inputs whose output is there already")
    parser.add_argument(
        "--ray", metavar="ADDRESS", help='run on the Ray cluster there: HOST:PORT, "auto", or "local" for this machine'
    )
    add_engine(parser)
    parser.add_argument("--engines", metavar="DIR", help="what `flashcocos build` wrote (default: beside the bundle)")
    parser.add_argument(
        "--exemplar-cache-mib",
        type=int,
        metavar="MIB",
        help=f"GPU memory for encoded exemplars (default: {EXEMPLAR_CACHE_MIB})",
    )


def _demo(options: argparse.Namespace) -> int:
    from ..bundle.default_model import PAIRS
    from ..runtime import Translator
    from ..runtime.folder import translate_folder
    from ..runtime.jobs import FolderRequest

    request = FolderRequest(None, None, None, options.output, pairs=PAIRS, save={"grid"})
    with Translator(device="cpu") as translator:
        summary = translate_folder(translator, request, progress=True)
    show(f"{summary.done} of {summary.done + len(summary.failed)} pictures translated; *.grid.png shows each as")
    show(f"input | exemplar | warped exemplar | result: {options.output}")
    return 1 if summary.failed else 0


def _translate(options: argparse.Namespace) -> int:
    from ..bundle import Bundle
    from ..bundle.default_model import resolve_model
    from ..runtime import Translator
    from ..runtime.cluster import translate_folder_on_ray
    from ..runtime.folder import translate_folder
    from ..runtime.jobs import FolderRequest

    bundle = Bundle(resolve_model(options.model))
    model = {
        **engine(options),
        "engines": options.engines,
        "exemplar_cache_mib": options.exemplar_cache_mib,
        "tile": options.tile,
    }
    request = FolderRequest(
        options.input,
        options.exemplar,
        options.exemplar_label,
        options.output,
        pairs=options.pairs,
        size=options.size,
        save={*options.save, *(["grid"] if options.grid else [])},
        suffix=f".{options.format}",
        resume=options.resume,
    )
    if options.ray:
        summary = translate_folder_on_ray(options.ray, bundle, model, request, progress=True)
    else:
        with Translator(bundle, **model) as translator:
            summary = translate_folder(translator, request, progress=True)
    show(f"{summary.done} translated, {summary.skipped} skipped, {len(summary.failed)} failed: {options.output}")
    return 1 if summary.failed else 0
