"""Labels and pictures, prepared once and the same way for training, export and the runtime: numpy and Pillow only.

Pictures: `load_image` gives planes in [-1, 1], `to_uint8` takes them back.
Prepared labels (the .png or .npz that `flashcocos prepare` writes): `load_label`, `save_label`.
Raw labels: `load_raw(task, image, size)` finds the label files of one photograph by the published layouts (`layouts`)
and prepares them; `prepare_folder` does it for a whole folder. Their parts, on numpy arrays: `ade20k.class_ids`,
`celebahq.class_ids`, `edges.edge_planes`, `pose.pose_planes`; on files: `load` of the same modules.
List files with Windows or POSIX paths: `read_list`.

OpenCV and scikit-image (the extra `prepare`) are imported by the functions that need them: pose and edges.
"""

from .images import load_image, to_uint8
from .labels import load_label, save_label
from .layouts import read_list
from .prepare import load_raw, prepare_folder

__all__ = ["load_image", "load_label", "load_raw", "prepare_folder", "read_list", "save_label", "to_uint8"]
