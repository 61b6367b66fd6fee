"""What a training shows: a progress bar, a line of terms now and then, and TensorBoard's scalars and pictures."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from ..config import ModelConfig
from ..errors import import_extra
from ..preprocess.images import to_uint8
from ..preprocess.palette import label_colors
from .batches import Batch

ROWS = 4  # samples in a picture


class TrainLogger:
    """`with TrainLogger(folder, start, total, log_steps) as log: log.step(terms)`; writes to `folder`/tensorboard.

    start: steps already done, after which an interrupted run may have logged more: those are dropped. log_steps: steps
    between two lines; scalars are means over them. Raises `BackendError` without the package tensorboard.
    """

    def __init__(self, folder: Path, start: int, total: int, log_steps: int) -> None:
        tensorboard = import_extra("torch.utils.tensorboard", "the package tensorboard is missing", "train")
        self.done, self.total, self.log_steps = start, total, log_steps
        self._writer = tensorboard.SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self._progress = tqdm(desc="train", total=total, initial=start, unit="step", disable=None)
        self._sums: dict[str, float] = {}
        self._count, self._since = 0, time.monotonic()

    def __enter__(self) -> TrainLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()
        self._writer.close()

    def write(self, message: str) -> None:
        """Print a line."""
        self._progress.write(message, file=sys.stderr)

    def step(self, terms: Mapping[str, float], lr: float) -> None:
        """Count a step with the value of each term and the learning rate; every `log_steps` print and write means."""
        self.done, self._count = self.done + 1, self._count + 1
        self._progress.update()
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        if self._count < self.log_steps and self.done < self.total:
            return
        means = {name: value / self._count for name, value in self._sums.items()}
        now = time.monotonic()
        speed = self._count / max(now - self._since, 1e-9)
        for name, value in means.items():
            self._writer.add_scalar(f"loss/{name}", value, self.done)
        self._writer.add_scalar("lr", lr, self.done)
        self._writer.add_scalar("steps per second", speed, self.done)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
        left = (self.total - self.done) / speed / 60
        self.write(f"step {self.done}/{self.total}: {shown}, {speed:.2f} it/s, {left:.0f} min left")
        self._sums, self._count, self._since = {}, 0, now

    def pictures(self, config: ModelConfig, batch: Batch, warped_image: Tensor, image: Tensor) -> None:
        """Write input | exemplar | warped | output | target of the first samples, one below the other."""
        rows = []
        for label, *planes in zip(batch.label[:ROWS], batch.exemplar, warped_image, image, batch.image, strict=False):
            columns = [to_uint8(plane.detach().float().cpu().numpy()) for plane in planes]
            rows.append(np.concatenate([label_colors(config, label.cpu().numpy()), *columns], 1))  # (H, 5 W, 3)
        picture = np.concatenate(rows)
        self._writer.add_image("input, exemplar, warped, output, target", picture, self.done, dataformats="HWC")

    def flush(self) -> None:
        """Write out what TensorBoard's writer still holds."""
        self._writer.flush()
