"""flashcocos: exemplar-based image translation (CoCosNet, arXiv 2004.05571), built for deployment.

    from flashcocos import Translator
    with Translator("model.zip") as translator:
        result = translator.translate("label.png", translator.encode_exemplar("photo.jpg", "photo_label.png"))

Everything is imported on first use: `import flashcocos` loads neither torch nor onnxruntime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import ModelConfig
    from .kernels import corr_match, corr_row, corr_warp
    from .runtime import Translator

__version__ = "0.1.0"
__all__ = ["ModelConfig", "Translator", "__version__", "corr_match", "corr_row", "corr_warp"]

_HOMES = {
    "ModelConfig": "config",
    "Translator": "runtime",
    "corr_match": "kernels",
    "corr_row": "kernels",
    "corr_warp": "kernels",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
