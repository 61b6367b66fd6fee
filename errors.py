"""The exceptions flashcocos raises on purpose; the command line prints them as one line, without a traceback.

Each message names the offending value, what was expected, and the remedy.
"""

import importlib
from typing import Any


class FlashcocosError(Exception):
    """Base class of every error that flashcocos raises on purpose."""


class InputError(FlashcocosError, ValueError):
    """A value, file, shape or dtype that the caller supplied cannot be used."""


class BackendError(FlashcocosError, RuntimeError):
    """A backend, device, precision or package that was asked for cannot run here."""


class BundleError(FlashcocosError, ValueError):
    """A model bundle is damaged, of an unknown format, or does not match its manifest."""


class CheckpointError(FlashcocosError, ValueError):
    """A checkpoint is not what it should be: unreadable, or with missing, extra or misshapen keys."""


def import_extra(module: str, message: str, extra: str) -> Any:
    """Import a module of an optional package; `BackendError` with `message` and the extra where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendError(f"{message}: pip install 'flashcocos[{extra}]' ({error})") from error


def printable(text: object) -> str:
    """`text` on one line that a terminal shows as it is: control characters, invisible ones and line ends escaped.

    Names of files and strings of bundles come from anyone, and may carry a terminal's commands.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
