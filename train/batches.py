"""What each step of a training computes on: samples, their order, their share for one process, and augmentation.

Everything follows from (seed, step), whatever the number of processes and loading workers, so a resumed training sees
exactly what an uninterrupted one would, with no state to keep.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import InputError
from .data import PairData
from .data.hand_drawn import hand_drawn
from .settings import Settings

_PICTURES, _LABELS = ("image", "exemplar"), ("label", "exemplar_label")


class Batch(NamedTuple):
    """The items of a data set (`data.Item`), stacked."""

    label: Tensor  # as `CoCosNet` takes it
    image: Tensor  # (B, 3, H, W) in [-1, 1]: the true image of the label
    exemplar: Tensor  # (B, 3, H, W) in [-1, 1]
    exemplar_label: Tensor
    self_reference: Tensor  # (B,) float: 1 where the exemplar is the image itself (or a distorted copy), else 0
    has_target: Tensor  # (B,) bool: whether `image` is the exact answer


def open_data(settings: Settings) -> PairData:
    """The training data of `settings`; renders avatar pairs that are missing.

    Args:
        settings: of the training.

    Returns:
        The data set.

    Raises:
        InputError: the model takes other labels, or a file or folder is missing or cannot be used.
    """
    data, size = settings.data, settings.model.image_size
    if data.kind == "avatars":
        from .data.avatars import AvatarOptions, AvatarPairs
        from .data.avatars_paint import CLASSES

        if (settings.model.label_kind, settings.model.label_channels) != ("classes", len(CLASSES)):
            raise InputError(f"data.kind avatars needs a model of {len(CLASSES)} label classes, as preset avatars-128")
        avatars = AvatarOptions(size, data.retrieved_share)
        return AvatarPairs("train", avatars, count=data.count or None, folder=data.cache or None)
    from .data.photos import PhotoPairs

    if not data.root:
        raise InputError("data.root: expected the folder of the photographs, got ''; give --set data.root=FOLDER")
    return PhotoPairs(settings.model, data, seed=settings.run.seed)


class Steps(Dataset[list[Batch]]):
    """Item `step` is the list of micro-batches that process `rank` of `world` computes on in that step.

    An epoch shows every sample once, or as often as `data.repeat_rare` asks for, but for a last part that fills no
    batch. Raises `InputError` for fewer samples than a batch and for a batch that its processes and micro-batches do
    not divide.
    """

    def __init__(self, data: PairData, settings: Settings, rank: int = 0, world: int = 1) -> None:
        run = settings.run
        self.data, self.settings, self.rank, self.share = data, settings, rank, run.batch // world
        self.micro_batch = run.micro_batch or self.share
        if run.batch % (world * self.micro_batch):
            raise InputError(
                f"run.batch: {run.batch} is no multiple of {world} processes times run.micro_batch {self.micro_batch}"
            )
        if len(data) < run.batch:
            raise InputError(f"{len(data)} samples do not fill a batch of {run.batch}; lower run.batch")
        self.samples = torch.arange(len(data))
        if settings.data.repeat_rare:
            classes = settings.model.label_channels
            self.samples = self.samples.repeat_interleave(repeats(data, classes, settings.data.repeat_rare))
        self.per_epoch = len(self.samples) // run.batch

    def __len__(self) -> int:
        return self.settings.schedule.total(self.per_epoch)

    def __getitem__(self, step: int) -> list[Batch]:
        run, mine = self.settings.run, slice(self.rank * self.share, (self.rank + 1) * self.share)
        epoch, place = divmod(step, self.per_epoch)
        order = self.samples[torch.randperm(len(self.samples), generator=_generator(run.seed, epoch))]
        self.data.set_epoch(epoch)
        items: list[Any] = [self.data[int(index)] for index in order[place * run.batch : (place + 1) * run.batch][mine]]
        planes = {name: torch.stack([torch.as_tensor(item[name]) for item in items]) for name in Batch._fields}
        self._augment(planes, step, mine)
        return [
            Batch(**{name: tensor[start : start + self.micro_batch] for name, tensor in planes.items()})
            for start in range(0, self.share, self.micro_batch)
        ]

    def loader(self, start: int) -> Iterator[list[Batch]]:
        """The items from step `start` on, prepared ahead by `run.workers` processes."""
        # each worker is handed whole steps, so a step is the same however many there are
        return iter(
            DataLoader(
                self,
                batch_size=None,
                sampler=range(start, len(self)),
                num_workers=self.settings.run.workers,
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=_leave_signals_to_the_trainer,
            )
        )

    def _augment(self, planes: dict[str, Tensor], step: int, mine: slice) -> None:
        """Mirror whole samples, permute colors, repaint labels, then halve the samples, as the settings ask for."""
        settings, generator = self.settings, _generator(self.settings.run.seed + 1, step)
        # drawn for the batch of all processes, of which this one uses its own rows
        draws = torch.rand(settings.run.batch, 6, generator=generator)[mine]
        mirrored, recolored = draws[:, 0] < settings.data.mirror, draws[:, 1] < settings.data.recolor
        for name in (*_PICTURES, *_LABELS):
            planes[name][mirrored] = planes[name][mirrored].flip(-1)
        colors = torch.where(recolored[:, None], draws[:, 2:5].argsort(1), torch.arange(3))
        for name in _PICTURES:
            planes[name] = planes[name][torch.arange(len(colors))[:, None], colors]
        for place in (draws[:, 5] < settings.data.hand_drawn).nonzero()[:, 0].tolist():
            label = hand_drawn(planes["label"][place].numpy(), seed=step * settings.run.batch + mine.start + place)
            planes["label"][place] = torch.from_numpy(label)
        if step < settings.schedule.low_res_steps:
            for name in _PICTURES:
                planes[name] = F.avg_pool2d(planes[name], 2)
            for name in _LABELS:
                planes[name] = planes[name][..., ::2, ::2].contiguous()


def repeats(data: PairData, classes: int, threshold: float) -> Tensor:
    """How often an epoch shows each sample, (N,) integers of at least 1; reads every label once.

    The repeat factor of arXiv 1908.03195, appendix B: sqrt(threshold / f) of the rarest class in the label, f being the
    share of samples that show the class. The fractions add up until they make one more, so nothing is random.
    """
    labels = (torch.as_tensor(data[index]["label"]) for index in range(len(data)))
    shown = torch.stack([torch.bincount(label.flatten().int(), minlength=classes) > 0 for label in labels])
    factor = (threshold / shown.double().mean(0)).sqrt().clamp_min(1)
    wanted = torch.where(shown, factor, 1.0).amax(1)
    more = wanted.frac().cumsum(0).floor().diff(prepend=wanted.new_zeros(1))
    return (wanted.floor() + more).long()


def _leave_signals_to_the_trainer(_: int) -> None:
    # Ctrl-C reaches every process of the group: the workers go on until the trainer has finished its step
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _generator(seed: int, count: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + count)
