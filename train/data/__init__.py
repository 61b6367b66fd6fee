"""The data sets to train on; a module is imported when it is used, and only its own packages must be installed.

One contract for all of them, `PairData`: a picklable, map-style data set (torch's `DataLoader` takes it as it is) whose
items are dicts, `Item`. Item `index` of an epoch follows from (seed, epoch, index) alone, in whatever order and process
it is asked for, so a resumed training sees what an uninterrupted one would. Call `set_epoch` before the epoch's
`DataLoader` iterator is made: workers hold a copy of the data set (so leave `persistent_workers` off).
"""

from __future__ import annotations

from typing import Any, Protocol, TypedDict

import numpy as np
import numpy.typing as npt


class Item(TypedDict):
    """One sample to train on or to score. All items of a data set have one size and one set of label channels.

    label, exemplar_label: class ids, uint8 (H, W), or planes in [0, 1], float32 (nc, H, W), by the task's label kind.
    image, exemplar: float32 (3, H, W), RGB in [-1, 1].
    self_reference: float32, 1 where the exemplar is the image itself or a distorted copy of it, else 0.
    has_target: whether `image` is the exact answer for (label, exemplar). Where it is not, `image` is the photograph
        that the label was made of, in a look of its own.
    """

    label: npt.NDArray[Any]
    exemplar_label: npt.NDArray[Any]
    image: npt.NDArray[np.float32]
    exemplar: npt.NDArray[np.float32]
    self_reference: np.float32
    has_target: bool


class PairData(Protocol):
    """A data set; `IndexError` for an index outside it, `InputError` for a file that cannot be used."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, 0 at first, that the random parts of the items follow from."""
        ...


class EqualItems:
    """A data set of `count` times the same item, for measuring."""

    def __init__(self, item: Item, count: int) -> None:
        self._item, self._count = item, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Item:
        return self._item

    def set_epoch(self, epoch: int) -> None:
        """Every epoch is alike."""
