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
    from .errors import BackendError, BundleError, CheckpointError, FlashcocosError, InputError
    from .kernels import corr_match, corr_row, corr_warp
    from .runtime import EncodedLabel, EngineOptions, Exemplar, Translation, Translator

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "BundleError",
    "CheckpointError",
    "EncodedLabel",
    "EngineOptions",
    "Exemplar",
    "FlashcocosError",
    "InputError",
    "ModelConfig",
    "Translation",
    "Translator",
    "__version__",
    "corr_match",
    "corr_row",
    "corr_warp",
]

_MODULES = {
    **dict.fromkeys(("BackendError", "BundleError", "CheckpointError", "FlashcocosError", "InputError"), "errors"),
    **dict.fromkeys(("EncodedLabel", "EngineOptions", "Exemplar", "Translation", "Translator"), "runtime"),
    **dict.fromkeys(("corr_match", "corr_row", "corr_warp"), "kernels"),
    "ModelConfig": "config",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
