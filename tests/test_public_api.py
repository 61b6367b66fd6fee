"""The names that `import flashcocos` offers, each imported on first use."""

from __future__ import annotations

import subprocess
import sys

import pytest

import flashcocos

NAMES = (
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
)


def test_public_names() -> None:
    assert tuple(flashcocos.__all__) == NAMES
    for name in NAMES[:-4]:
        assert getattr(flashcocos, name).__name__ == name
    assert all(callable(getattr(flashcocos, name)) for name in NAMES[-3:])
    for error in ("InputError", "BackendError", "BundleError", "CheckpointError"):
        assert issubclass(getattr(flashcocos, error), flashcocos.FlashcocosError)
    with pytest.raises(AttributeError, match="no attribute 'translate'"):
        flashcocos.translate  # noqa: B018


@pytest.mark.parametrize("statement", ["import flashcocos", "import flashcocos.runtime"])
def test_importing_loads_nothing_heavy(statement: str) -> None:
    code = (
        f"import sys; {statement}; "
        "print(sorted({'torch', 'onnxruntime', 'onnx', 'numba', 'numpy', 'PIL', 'msgspec'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_without_torch() -> None:
    code = (
        "import sys; from flashcocos import *; assert Translator and corr_warp; "
        "print(sorted({'torch', 'onnxruntime', 'onnx', 'numba'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
