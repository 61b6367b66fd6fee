"""Translation with a model bundle on any machine: numpy, Pillow and ONNX Runtime, no torch.

`Translator` opens a bundle, `Exemplar` is an encoded exemplar, `Translation` a result.
"""

from .translator import Exemplar, Translation, Translator

__all__ = ["Exemplar", "Translation", "Translator"]
