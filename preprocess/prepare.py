"""Raw label files to prepared ones: one photograph's, or a whole folder's as `flashcocos prepare` does it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tqdm import tqdm

from ..errors import InputError
from ..remote import is_remote, to_path
from . import ade20k, celebahq, edges, pose
from .images import PathLike, UInt8Array, check_size
from .labels import resize_nearest, save_label
from .layouts import ROLES, Sample, find_layout, find_sample, read_list, select
from .palette import CLASS_NAMES, read_drawing


@dataclasses.dataclass(frozen=True)
class Message:
    """What there is to say of one sample: what it lacks, or, where `failed`, why it was left out."""

    name: str
    text: str
    failed: bool


@dataclasses.dataclass(frozen=True)
class Summary:
    """The outcome of `prepare_folder`: how many labels were written and left out, and what each sample lacks."""

    prepared: int
    failed: int
    messages: tuple[Message, ...]


def load_raw(task: str, image: PathLike, size: tuple[int, int] | None = None, *, canny: str = "upstream") -> UInt8Array:
    """The label of one photograph from its raw label files, found beside it by the layouts of `layouts`.

    Args:
        task: "ade20k", "celebahq", "celebahqedge", "deepfashion", or "avatars" for drawings in the palette.
        image: the photograph.
        size: (height, width), or None for the size of the label file (class ids) or of the photograph (planes).
        canny: "upstream" or "modern", for "celebahqedge": see `edges`.

    Returns:
        uint8: class ids (H, W), or planes (15 or 20, H, W) of value * 255 for "celebahqedge" and "deepfashion".

    Raises:
        InputError: missing, damaged or empty files.
    """
    return _load(find_sample(task, image), size, canny, False)


def prepare_folder(
    task: str,
    source_folder: PathLike,
    output_folder: PathLike,
    *,
    size: tuple[int, int] | None,
    canny: str = "upstream",
    list_file: PathLike | None = None,
    nearest: bool = False,
) -> Summary:
    """Write the prepared label of every sample in `source_folder` as `output_folder`/<key>.png or .npz.

    A sample with missing or bad files is reported and left out, and the rest goes on. Existing files are replaced.

    Args:
        task: as for `load_raw`.
        source_folder: in one of the layouts of `layouts`, which also says what a key is.
        output_folder: outside the source's folders.
        size: as for `load_raw`.
        canny: as for `load_raw`.
        list_file: prepare only what it names.
        nearest: of avatars, whether a color that is not in the palette stands for the nearest that is.

    Returns:
        How many were written and left out, and what each sample lacks.

    Raises:
        InputError: nothing can be done: a bad option, no samples, or an output among the source's files.
    """
    check_size(size)
    if nearest and task != "avatars":
        raise InputError(f"nearest (--nearest) is for drawings of task avatars, not for {task}")
    if canny not in edges.CANNY:
        raise InputError(f"canny: expected one of {', '.join(edges.CANNY)}, got {canny!r}")
    layout, output = find_layout(task, source_folder), to_path(output_folder)
    for root in (layout.images, layout.labels):
        if is_remote(output) == is_remote(root) and output.resolve().is_relative_to(root.resolve()):
            raise InputError(f"{output}: lies inside the source files {root}; choose a folder outside")
    samples = layout.samples()
    if not samples:
        raise InputError(f"{source_folder}: no {task} files; expected images/NAME.jpg and labels/{_ending(task)}")
    messages: list[Message] = []
    prepared = 0
    if list_file is not None:
        samples, unknown = select(samples, [name for line in read_list(list_file) for name in line])
        messages += [Message(name, f"listed in {list_file}, but not found", failed=True) for name in unknown]
    some_images = any(sample.images for sample in samples)
    with tqdm(desc="prepare", total=len(samples), unit="file", disable=None) as progress:
        for sample in samples:
            try:
                label = _load(sample, size, canny, nearest)
            except InputError as error:
                messages.append(Message(sample.key, str(error), failed=True))
            else:
                save_label(output / f"{sample.key}{'.png' if label.ndim == 2 else '.npz'}", label)
                prepared += 1
                messages += [Message(sample.key, text, failed=False) for text in _lacks(sample, some_images)]
            progress.update()
    return Summary(prepared, sum(message.failed for message in messages), tuple(messages))


def _load(sample: Sample, size: tuple[int, int] | None, canny: str, nearest: bool) -> UInt8Array:
    files, task = sample.files, sample.task
    if len(sample.images) > 1:
        raise InputError(f"several photographs of one name: {', '.join(image.name for image in sample.images)}")
    if task == "avatars":
        drawing = read_drawing(_need(sample, "label"), len(CLASS_NAMES[task]), nearest=nearest)
        return resize_nearest(drawing, size)
    if task in ("ade20k", "celebahq"):
        label = _need(sample, "label")
        ids = ade20k.load(label, size) if task == "ade20k" else celebahq.load(label, files.get("glasses"), size)
        if not ids.any():
            raise InputError(f"{label}: empty: every pixel is of class 0")
        return ids
    if not sample.images:
        raise InputError("lacks its photograph, which gives the size of the label and, for celebahqedge, edges")
    if task == "deepfashion":
        return pose.load(sample.images[0], _need(sample, "candidate"), _need(sample, "subset"), size)
    if not files:
        raise InputError(f"lacks the masks of its parts, {_ending(task)}")
    return edges.load(sample.images[0], files, size, canny)


def _need(sample: Sample, role: str) -> Path:
    if role not in sample.files:
        raise InputError(f"lacks its label file, {_ending(sample.task, role)}")
    return sample.files[role]


def _lacks(sample: Sample, some_images: bool) -> list[str]:
    """What a sample does without: parts, or its photograph where others of the folder have one."""
    if sample.task == "celebahqedge":
        missing = [part for part in ROLES[sample.task] if part not in sample.files]
        return [f"lacks {', '.join(missing)}: taken as not visible"] if missing else []
    return ["lacks its photograph: the label is prepared without"] if some_images and not sample.images else []


def _ending(task: str, role: str | None = None) -> str:
    """How the files of `task` (or of one `role`) are named, for messages."""
    endings = ROLES[task]
    return f"NAME{endings[role]}" if role else " and ".join(f"NAME{ending}" for ending in list(endings.values())[:2])
