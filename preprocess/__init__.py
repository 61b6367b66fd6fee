"""Labels and pictures, prepared once and the same way for training, export and the runtime: numpy and Pillow only.

`load_image`, `to_uint8`: pictures to planes in [-1, 1] and back. `load_label`: a prepared label, checked.
"""

from .images import load_image, to_uint8
from .labels import load_label, save_label

__all__ = ["load_image", "load_label", "save_label", "to_uint8"]
