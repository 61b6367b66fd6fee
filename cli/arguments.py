"""What the commands' parsers share: types of arguments, the options of the engine, and printing."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

from ..errors import InputError, printable
from ..runtime.options import BACKENDS, DEVICES, MAX_THREADS, PRECISIONS, WARPS

Run = Callable[[argparse.Namespace], int]
AddCommand = Callable[..., argparse.ArgumentParser]  # (name, run, summary, example, details=""); see main.py

BUNDLE = "model bundle: a folder, a .zip, or avatars-128 or avatars-256, which ship"


def show(text: object) -> None:
    """Print lines on standard output, without what a terminal would take for commands."""
    for line in str(text).split("\n"):
        print(printable(line))


def sides(text: str) -> tuple[int, int]:
    """Parse "256" as (256, 256) and "256x384" as (256, 384), height first."""
    parts = text.lower().split("x")
    try:
        height, width = (int(parts[0]), int(parts[-1])) if len(parts) <= 2 else (0, 0)
    except ValueError:
        height = width = 0
    if height <= 0 or width <= 0:
        raise argparse.ArgumentTypeError(f"expected SIDE or HEIGHTxWIDTH in pixels, got {text!r}")
    return height, width


def sides_or_input(text: str) -> tuple[int, int] | str:
    """As `sides`, but "input" stays as it is."""
    return text if text == "input" else sides(text)


def thread_count(text: str) -> int:
    """Parse a number of threads; tens of thousands of them bring a machine down."""
    if not text.isdecimal() or not 1 <= int(text) <= MAX_THREADS:
        raise argparse.ArgumentTypeError(f"expected 1 to {MAX_THREADS} threads, got {text!r}")
    return int(text)


def names(text: str) -> list[str]:
    """Parse a list of names with commas between them."""
    return [name for name in text.split(",") if name]


def parse_target(text: str) -> int:
    """ "sm_89", "sm89", "89" or "8.9" as 89; raises `InputError`."""
    match = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", text.strip().lower())
    if not match:
        raise InputError(f"target {text!r}: expected a compute capability as sm_89")
    return int(match[1]) * 10 + int(match[2])


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Add --threads."""
    parser.add_argument(
        "--threads", type=thread_count, metavar="N", help=f"CPU threads of each graph, 1 to {MAX_THREADS} (all cores)"
    )


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose what runs a model; `engine` reads them."""
    parser.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="what runs the graphs (default: auto, the fastest here)"
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where the graphs run (default: auto)")
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="of the arithmetic; bfloat16: openvino, float16: tensorrt"
    )
    parser.add_argument(
        "--warp", choices=WARPS, default="auto", help="what warps; numba, numpy: on the CPU (default: auto)"
    )
    add_threads(parser)


def engine(options: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `Translator` for the options of `add_engine`."""
    choices = {name: getattr(options, name) for name in ("backend", "device", "precision", "warp")}
    return {**choices, "num_threads": options.threads}


def add_pairing(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which labels and exemplars belong together, as in `runtime.jobs.FolderRequest`."""
    parser.add_argument("--input", metavar="PATH", help="label file, or folder of label files")
    parser.add_argument("--exemplar", metavar="PATH", help="exemplar picture for all, or folder paired by name")
    parser.add_argument("--exemplar-label", metavar="PATH", help="label file of the exemplar, or folder paired by name")
    parser.add_argument("--pairs", metavar="CSV", help="instead of these: lines of input,exemplar[,exemplar_label]")
