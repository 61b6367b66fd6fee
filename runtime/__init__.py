"""Translation with a model bundle on any machine: numpy, Pillow and ONNX Runtime, no torch.

`Translator` opens a bundle, `EngineOptions` says what runs it, `Exemplar` and `EncodedLabel` are what it encodes,
`Translation` is a result. They are imported on first use, so that the command line can read the options' choices
without numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .options import EngineOptions
    from .pipeline import EncodedLabel, Exemplar
    from .translator import Translation, Translator

__all__ = ["EncodedLabel", "EngineOptions", "Exemplar", "Translation", "Translator"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import translator

    return getattr(translator, name)
