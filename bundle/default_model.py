"""The small models that ship inside the package, and the inputs that `flashcocos demo` translates with the default one.

The model file of each lies beside its bundle: what `flashcocos train` goes on from and `flashcocos export` reads.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import InputError

NAME = "avatars-128"
NAMES = (NAME, "avatars-256")
FOLDER = Path(__file__).parent / "models"
MODEL = FOLDER / f"{NAME}.zip"
SOURCE = FOLDER / f"{NAME}.safetensors"
PAIRS = FOLDER / "demo" / "pairs.csv"  # input,exemplar,exemplar_label a line, all beside it


def resolve_model(model: str | os.PathLike[str] | None = None) -> Path:
    """The path of the bundle that a user means.

    Args:
        model: a path, one of the names "avatars-128" and "avatars-256", or None for the first.

    Returns:
        The path; nothing is opened.

    Raises:
        InputError: the name is also that of a file or folder here, or the installation lacks the shipped model.
    """
    if model is not None and model not in NAMES:
        return Path(model)
    if model is not None and Path(model).exists():
        raise InputError(
            f"{model} is the name of a shipped model and also lies here; write ./{model} for what lies here"
        )
    path = MODEL if model is None else FOLDER / f"{model}.zip"
    if not path.is_file():
        raise InputError(f"this installation has no model at {path}; name a bundle, or install flashcocos again")
    return path
