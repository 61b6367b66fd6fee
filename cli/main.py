"""The command line: `flashcocos COMMAND`. Only argparse is imported until a command runs, so that `--help` is instant.

Each command is a parser and a function that calls one function of the package; one file has a family of commands.
Exit codes: 0 done, 1 an error or at least one file that failed, 2 wrong usage, 128 + N stopped by signal N.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NoReturn

from .. import __version__
from ..errors import FlashcocosError, printable
from . import measure, models, serve, train, translate
from .arguments import Run

# the extra that brings a package which a command may find missing
_EXTRAS = {
    "torch": "export",
    "safetensors": "export",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "cpu",
    "cv2": "prepare",
    "skimage": "prepare",
    "dicebear": "avatars",
    "resvg": "avatars",
    "tensorboard": "train",
    "tomli": "serve",
    "h5py": "hed",
    "torchmetrics": "eval",
    "psutil": "cpu",
    "fastapi": "serve",
    "prometheus_client": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
    "ray": "ray",
    "upath": "remote",
}
_COMMAND_EXTRAS = {"train": "train", "pairs": "train", "evaluate": "eval"}  # each brings all that its command needs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; errors are one line on standard error unless `--debug`.

    Args:
        arguments: Words after `flashcocos`; None for those of this process.

    Returns:
        The exit code.
    """
    _prepare_streams()
    try:
        return _run(arguments)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it exits
        return 141  # as a shell reports SIGPIPE


def _run(arguments: Sequence[str] | None) -> int:
    try:
        options = _parser().parse_args(arguments)
    except SystemExit:
        sys.stdout.flush()  # --help into a closed pipe
        raise
    try:
        with _sigterm_as_interrupt():
            code = int(options.run(options))
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        raise
    except (FlashcocosError, OSError) as error:
        if options.debug:
            raise
        return _complain(options.command, f"error: {_reason(error)}")
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").split(".")[0])
        extra = extra and _COMMAND_EXTRAS.get(options.command, extra)
        if options.debug or extra is None:
            raise
        return _complain(
            options.command, f"error: the package {error.name} is missing; pip install 'flashcocos[{extra}]'"
        )
    except _Terminated:
        return _complain(options.command, "terminated", 128 + signal.SIGTERM)
    except KeyboardInterrupt:
        return _complain(options.command, "interrupted", 128 + signal.SIGINT)


class _Terminated(KeyboardInterrupt):
    """SIGTERM has come; whatever cleans up after Ctrl-C does so after it."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line in place of the whole usage."""
        self.exit(2, f"{self.prog}: error: {printable(message)}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="flashcocos",
        usage="flashcocos COMMAND [OPTION ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"flashcocos {__version__}")
    commands = parser.add_subparsers(
        prog="flashcocos", dest="command", metavar="COMMAND", required=True, help=argparse.SUPPRESS
    )
    listed = []

    def command(name: str, run: Run, summary: str, example: str, details: str = "") -> argparse.ArgumentParser:
        listed.append(f"  {name:<10} {summary}")
        sub = commands.add_parser(
            name,
            description=textwrap.fill(f"{summary} {details}", 79),
            epilog="example:\n" + textwrap.indent(example, "  "),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=run)
        return sub

    for family in (translate, serve, models, train, measure):
        listed.append(f"\n{family.TITLE}:")
        family.add_commands(command)
    parser.description = (
        "Exemplar-based image translation (CoCosNet): a label map says what is where in\n"
        "a picture, an exemplar what it looks like.\n" + "\n".join(listed)
    )
    parser.epilog = (
        "start with:\n  flashcocos demo\n  flashcocos COMMAND --help      options and an example of a command"
    )
    return parser


def _complain(command: str, text: str, code: int = 1) -> int:
    """Print one line on standard error, if that can be written to; returns the exit code."""
    with contextlib.suppress(OSError):
        print(f"flashcocos {command}: {printable(text)}", file=sys.stderr)
    return code


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error).replace("\n", " ")


def _prepare_streams() -> None:
    """Make the standard streams safe to write to, whatever the shell made of them."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: its number must not go to the next file that is opened
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name may have letters that the terminal has not


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does, with its temporary files removed. The trainer sets its own handler."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
