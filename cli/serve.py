"""`flashcocos serve`: a model as an HTTP service with a web page."""

from __future__ import annotations

import argparse
import gc
import os

from ..errors import InputError
from .arguments import BUNDLE, AddCommand, show

TITLE = "Serve"
# option -> setting, help
_OPTIONS = {
    "model": ("model", f"{BUNDLE} (default)"),
    "host": ("host", "address to listen on; beyond this machine only with --token-file (default: 127.0.0.1)"),
    "port": ("port", "TCP port (default: 8000)"),
    "token-file": ("token_file", "lines of NAME TOKEN; requests must carry one of the tokens"),
    "batch": ("batch", "translations of one size that run together (default: 1 on a CPU, 4 on a GPU)"),
    "queue": ("queue", "requests that may wait; more get status 429 (default: 32)"),
    "drain": ("drain_s", "seconds that accepted requests get after SIGTERM (default: 30)"),
    "device": ("device", "where the graphs run: auto, cpu or cuda (default: auto)"),
    "threads": ("threads", "CPU threads of each graph (default: all cores)"),
}


def add_commands(command: AddCommand) -> None:
    """Add the parsers of this family."""
    parser = command(
        "serve",
        _serve,
        "Serve a model over HTTP, with a web page to paint labels.",
        "flashcocos serve\n"
        "flashcocos serve --model ade20k.zip --host 0.0.0.0 --token-file tokens.txt --batch 4 --queue 32 --drain 30",
        "docs/serving.md has the requests and all settings; each is also a variable, as FLASHCOCOS_BATCH.",
    )
    for name, (_, text) in _OPTIONS.items():
        parser.add_argument(f"--{name}", metavar=name.split("-")[-1].upper(), help=text)
    parser.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help='run on the Ray cluster there: HOST:PORT, or "auto"; without an address, on one of this machine',
    )
    parser.add_argument("--replicas", type=int, metavar="N", help="with --ray: processes with a model (default: 1)")
    parser.add_argument("--config", metavar="FILE", help="TOML file of settings")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting, as in deadline_s=10"
    )


def _serve(options: argparse.Namespace) -> int:
    gc.disable()  # a start makes many objects, which all stay: looking through them takes a tenth of its time
    try:
        return _run(options)
    finally:
        gc.enable()


def _run(options: argparse.Namespace) -> int:
    from ..serve.config import read_config
    from ..serve.server import run

    texts = {}
    for change in options.set:
        key, equals, text = change.partition("=")
        if not equals:
            raise InputError(f"--set {change}: expected KEY=VALUE, as in deadline_s=10")
        texts[key] = text
    for name, (field, _) in _OPTIONS.items():
        if (text := getattr(options, name.replace("-", "_"))) is not None:
            texts[field] = text
    config = read_config(texts, os.environ, options.config)

    def announce(address: str) -> None:
        gc.freeze()
        gc.enable()
        show(f"flashcocos serves {config.model or 'avatars-128'} on {address}")

    if options.ray:
        from ..serve import ray_app

        return ray_app.run(config, 1 if options.replicas is None else options.replicas, options.ray, announce)
    if options.replicas is not None:
        raise InputError("--replicas is for --ray; without Ray there is one process")
    return run(config, announce)
