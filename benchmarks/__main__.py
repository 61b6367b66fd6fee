"""`python -m flashcocos.benchmarks COMMAND`; the package's docstring explains the scheme."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FlashcocosError, InputError
from . import __doc__ as scheme
from .cases import all_cases
from .provenance import RESULTS
from .registry import GROUPS, select

if TYPE_CHECKING:
    from .runner import Row


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 where every case has its row, 1 for an error or a case that failed."""
    parser = argparse.ArgumentParser(
        prog="python -m flashcocos.benchmarks",
        description=scheme,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    model = commands.add_parser("model", help="fill a folder with what the cases run on")
    model.add_argument("-o", "--output", required=True, metavar="FOLDER", help="a model.safetensors there is kept")
    model.add_argument("--preset", default="ade20k", help="of the random model that is made where there is none")
    for name, summary in (("list", "show the cases"), ("run", "run cases and keep their rows")):
        sub = commands.add_parser(name, help=summary)
        sub.add_argument("--group", action="append", default=[], choices=GROUPS, help="repeat for several")
        sub.add_argument("--only", action="append", default=[], metavar="PATTERN", help="names, as in 'warp/numba-*'")
        sub.add_argument(
            "--bundle",
            action="append",
            default=[],
            metavar="NAME=PATH",
            help="a further bundle, as a step of the ablation",
        )
    run = commands.choices["run"]
    run.add_argument("--model", metavar="FOLDER", help="what `model` has filled")
    run.add_argument("--threads", type=int, metavar="N", help="CPU threads, 1 to 256 (default: one a core)")
    run.add_argument("--fresh", action="store_true", help="begin the results files anew")
    run.add_argument("-o", "--output", default=str(RESULTS), metavar="FOLDER", help="default: benchmarks/results")
    gpu = commands.add_parser("gpu", help="measure in ten minutes what only a machine with an NVIDIA GPU can show")
    gpu.add_argument("-o", "--output", required=True, metavar="FOLDER", help="the rows go into its file gpu.jsonl")
    # a machine that is lent for ten minutes keeps some for itself
    gpu.add_argument("--seconds", type=float, default=570.0, metavar="N", help="stop after them (default: 570)")
    gpu.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, to see that all of it works")
    gpu.add_argument("--fresh", action="store_true", help="begin the file anew")
    scale = commands.add_parser(
        "scale", help="simulate a service: how long requests wait, how many devices a load takes"
    )
    scale.add_argument(
        "--ms", type=float, nargs="+", required=True, metavar="N", help="a device's times of a request, all as frequent"
    )
    scale.add_argument("--rate", type=float, default=1000.0, metavar="N", help="requests a second (default: 1000)")
    scale.add_argument("--p99", type=float, default=1.0, metavar="S", help="seconds for 99 of 100 (default: 1)")
    commands.add_parser("report", help="write docs/benchmarks.md, the README's table and the plots")
    options = parser.parse_args(arguments)
    try:
        return _COMMANDS[options.command](options)
    except (FlashcocosError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; the same command goes on", file=sys.stderr)
        return 130


def _model(options: argparse.Namespace) -> int:
    from ..config import ModelConfig
    from ..export.bundle import export_bundle
    from .speed.naive import export_naive, seeded_model

    folder = Path(options.output)
    file = folder / "model.safetensors"
    makers: dict[Path, Callable[[Path], Any]] = {
        file: lambda path: seeded_model(ModelConfig.preset(options.preset), path),
        folder / "bundle": lambda path: export_bundle(file, path),
        folder / "naive.onnx": lambda path: export_naive(file, path),
    }
    for path, make in makers.items():
        if not path.exists():
            make(path)
        print(path)
    return 0


def _list(options: argparse.Namespace) -> int:
    cases = select(all_cases(list(_bundles(options))), options.group, options.only)
    for group, summary in GROUPS.items():
        if members := [case for case in cases if case.group == group]:
            print(f"{group}: {summary}")
            for case in members:
                print(f"  {case.name:36} {case.measures}")
    return 0


def _run(options: argparse.Namespace) -> int:
    from ..config import ModelConfig
    from .runner import open_assets, run_cases

    bundles = _bundles(options)
    assets = open_assets(options.model, bundles, threads=options.threads)
    config = ModelConfig.from_json(assets.config) if assets.config else None
    cases = all_cases(list(bundles), config)
    selected = select(cases, options.group, options.only)
    rows = run_cases(selected, assets, options.output, known=cases, command=_command(), fresh=options.fresh)
    return _ended(rows, options.output)


def _gpu(options: argparse.Namespace) -> int:
    from .gpu import FILE, run_gpu

    rows = run_gpu(
        options.output,
        limit=options.seconds,
        dry_run=options.dry_run,
        command=_command(),
        fresh=options.fresh,
    )
    wrong = [row["case"] for row in rows if row["status"] == "outside"]
    if wrong:
        print(f"{len(wrong)} gave wrong results: {', '.join(wrong)}", file=sys.stderr)
    return _ended(rows, Path(options.output) / FILE) or int(bool(wrong))


def _scale(options: argparse.Namespace) -> int:
    from .scale import report

    print(report(options.ms, options.rate, options.p99))
    return 0


def _ended(rows: Sequence[Row], output: str | Path) -> int:
    failed = [row["case"] for row in rows if row["status"] == "failed"]
    if failed:
        print(f"{len(failed)} failed, and run again with the same command: {', '.join(failed)}", file=sys.stderr)
    print(output)
    return 1 if failed else 0


def _command() -> str:
    return shlex.join(["python", "-m", "flashcocos.benchmarks", *map(_without_folder, sys.argv[1:])])


def _without_folder(word: str) -> str:
    """`word` with a path in it cut to its last part, for folders of this machine mean nothing elsewhere."""
    name, equals, path = word.rpartition("=")
    return f"{name}{equals}{Path(path).name}" if os.sep in path and Path(path).exists() else word


def _bundles(options: argparse.Namespace) -> dict[str, str]:
    bundles = {}
    for word in options.bundle:
        name, _, path = word.partition("=")
        if not path or not name.isidentifier() or name in ("model", "default"):
            raise InputError(f"--bundle: expected NAME=PATH with a name other than 'model' and 'default', got {word!r}")
        bundles[name] = path
    return bundles


def _report(options: argparse.Namespace) -> int:
    from .report import write_report

    for path in write_report():
        print(path)
    return 0


_COMMANDS = {"model": _model, "list": _list, "run": _run, "gpu": _gpu, "scale": _scale, "report": _report}

if __name__ == "__main__":
    sys.exit(main())
