"""`ModelConfig`: everything that describes a network, validated, with a JSON round trip and the presets by name.

Source of the presets: the effective options of the four published CoCosNet tasks (arXiv 2004.05571 and its public
README). Sizes are not part of a network: every graph takes any height and width divisible by `SIZE_MULTIPLE`.
"""

from __future__ import annotations

import json
import typing
from typing import Any, TypeAlias, TypeVar

import msgspec

from .errors import InputError

T = TypeVar("T")
Size: TypeAlias = "int | tuple[int, int] | str | None"  # as `Translator.translate` takes it

SIZE_MULTIPLE = 32  # the generator starts at 1/32 of the image and doubles five times
MIN_SIDE = 2 * SIZE_MULTIPLE  # pixels; reflection padding at 1/32 of the size needs two
MAX_SIDE = 8192
TILE_OVERLAP = 16  # pixels around a tile that are made and thrown away; the generator's fine half sees no further
LABEL_KINDS = ("classes", "channels")
WARP_UPSAMPLINGS = ("nearest", "bilinear", "pixel_shuffle")


def from_fields(kind: type[T], fields: Any, root: str = "") -> T:
    """Parsed JSON or TOML as an object of the msgspec type `kind`.

    Args:
        kind: a `msgspec.Struct` or any other type that msgspec converts to.
        fields: what a parser returned.
        root: name of `fields` in messages.

    Returns:
        The validated object.

    Raises:
        InputError: a field is missing, unknown, of the wrong type or out of range; the message starts with its path.
    """
    try:
        try:
            return msgspec.convert(fields, kind)
        except msgspec.ValidationError as error:
            raise InputError(_explain(error, kind, fields, root)) from error
    except RecursionError as error:
        raise InputError(f"{root or kind.__name__}: nested too deeply") from error


def _explain(error: msgspec.ValidationError, kind: Any, fields: Any, root: str) -> str:
    """msgspec's "Expected `int` >= 1 - at `$.run.batch`", with the path first, and the value and the choices."""
    text, _, path = str(error).partition(" - at `$")
    path = path.rstrip("`")
    name = (root + path).lstrip(".")
    if isinstance(error.__cause__, InputError):  # raised by a __post_init__, which names the field itself
        return f"{name}.{error.__cause__}".lstrip(".")
    text = text.replace("`", "")
    if "[" in path:  # msgspec does not say which entry it is
        return f"{name}: {text[0].lower()}{text[1:]}"
    for key in filter(None, path.split(".")):
        kind, fields = typing.get_type_hints(kind)[key], fields[key]
    if "unknown field" in text:
        return f"unknown key {f'{name}.' if name else ''}{text.split()[-1]}; known: {', '.join(kind.__struct_fields__)}"
    if "missing required field" in text:
        return f"{f'{name}.' if name else ''}{text.split()[-1]} is missing"
    expected = text.removeprefix("Expected ").partition(", got")[0].replace("object", "a mapping")
    if typing.get_origin(kind) is typing.Literal:
        expected = f"one of {', '.join(typing.get_args(kind))}"
    return f"{name or root or kind.__name__}: expected {expected}, got {fields!r:.60}"


def is_side(value: object) -> bool:
    """Whether `value` is a height or width in pixels that the networks take."""
    return type(value) is int and value >= MIN_SIDE and value % SIZE_MULTIPLE == 0


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One network, as training builds it, export writes it and the runtime reads it.

    task: which preprocessing the label needs: "ade20k", "celebahq", "celebahqedge", "deepfashion", "avatars", or
        any other name for a data set of the user's own.
    label_kind: "classes": the label is a map of class ids, expanded to one-hot inside the network;
        "channels": the label is `label_channels` planes of float32 in [0, 1].
    label_channels: classes or planes of the label (upstream's semantic_nc), 1 to 255.
    image_size: side in pixels the network was trained at; the runtime resizes to it unless told otherwise.
    ngf: base width of the generator; its widest layer has 16 ngf channels, but no more than `max_channels`.
    nef: base width of the domain adaptors; their widest layer has 8 nef channels.
    feature_channels: channels C of the adaptor's output and of theta and phi.
    spade_hidden: channels of the hidden layer in every SPADE block.
    residual_blocks: residual blocks between the adaptors and theta/phi.
    adaptor_kernel: 3 or 4, the kernel size of the adaptors' two strided convolutions.
    warp_stride: image pixels per correspondence position, along each axis: 4, as in every published task, 2 or 1. The
        features are a quarter of the image's size; below 4 a detail path from the full-size planes refines them.
    patch: side of the patch that is correlated: 1, 3 or 5.
    temperature: softmax temperature of the warp.
    condition_on_label: whether the label joins the features before theta and phi (the exemplar then needs its label).
    warp_upsampling: how the warp reaches the image's size: "nearest" or "bilinear" (3 warped values a position), or
        "pixel_shuffle" (3 * warp_stride**2 values a position, laid out as pixels).
    attention: whether the generator has its self-attention block.
    position_frequencies: sine and cosine pairs per axis, of 1, 2, 4 ... half turns an image, that join the features
        before theta and phi, so that equal positions can attract each other; 0, as upstream, for none. 0 to 6.
    warp_residual: whether the output starts from the warped exemplar and its mean color in each class of the label,
        which a predicted mask blends and a predicted correction completes; the means also join the generator's
        condition. Upstream has none; region-wise pooling of a style is from arXiv 1911.12861, section 3.2.
    max_channels: channels of the generator's widest layers at most.
    """

    task: str
    label_kind: str
    label_channels: int
    image_size: int = 256
    ngf: int = 64
    nef: int = 64
    feature_channels: int = 256
    spade_hidden: int = 128
    residual_blocks: int = 4
    adaptor_kernel: int = 3
    warp_stride: int = 4
    patch: int = 3
    temperature: float = 0.01
    condition_on_label: bool = True
    warp_upsampling: str = "bilinear"
    attention: bool = True
    position_frequencies: int = 0
    warp_residual: bool = False
    max_channels: int = 1024

    def __post_init__(self) -> None:
        self._require("task", self.task.isidentifier(), "a name of letters, digits and underscores")
        self._require("label_kind", self.label_kind in LABEL_KINDS, f"one of {', '.join(LABEL_KINDS)}")
        self._require("label_channels", 1 <= self.label_channels <= 255, "1 to 255")
        size_ok = is_side(self.image_size) and self.image_size <= MAX_SIDE
        self._require("image_size", size_ok, f"a multiple of {SIZE_MULTIPLE} from {MIN_SIDE} to {MAX_SIDE}")
        self._require("position_frequencies", 0 <= self.position_frequencies <= 6, "0 to 6")
        for name in ("ngf", "nef", "feature_channels", "spade_hidden", "max_channels"):
            self._require(name, 1 <= getattr(self, name) <= 4096, "1 to 4096")
        self._require("residual_blocks", 0 <= self.residual_blocks <= 64, "0 to 64")
        self._require("adaptor_kernel", self.adaptor_kernel in (3, 4), "3 or 4")
        self._require("warp_stride", self.warp_stride in (1, 2, 4), "4, 2 or 1")
        self._require("patch", self.patch in (1, 3, 5), "1, 3 or 5")
        self._require("temperature", 1e-4 <= self.temperature <= 100.0, "0.0001 to 100")
        self._require("warp_upsampling", self.warp_upsampling in WARP_UPSAMPLINGS, f"one of {WARP_UPSAMPLINGS}")

    def _require(self, name: str, condition: bool, expected: str) -> None:
        if not condition:
            raise InputError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    @property
    def warped_channels(self) -> int:
        """Values V that the warp carries per position: 3 colors, or the 3 * warp_stride**2 pixels of a patch."""
        return 3 * self.warp_stride**2 if self.warp_upsampling == "pixel_shuffle" else 3

    def generator_channels(self, multiple: int) -> int:
        """Channels of the generator's layer that has `multiple` * ngf of them where the limit allows."""
        return min(multiple * self.ngf, self.max_channels)

    def to_json(self) -> str:
        """This configuration as a JSON object."""
        return json.dumps(msgspec.structs.asdict(self), indent=2)

    @classmethod
    def from_dict(cls, fields: Any) -> ModelConfig:
        """Build from a mapping; a missing, unknown or wrong field raises `InputError`."""
        return from_fields(cls, fields, "config")

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """The inverse of `to_json`."""
        try:
            return cls.from_dict(msgspec.json.decode(text))
        except (msgspec.DecodeError, RecursionError) as error:
            raise InputError(f"config: not JSON: {error}") from error

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ModelConfig:
        """The preset `name`, with fields replaced by `changes`; an unknown name raises `InputError`."""
        if name not in PRESETS:
            raise InputError(f"unknown preset {name!r}; available: {', '.join(PRESETS)}")
        return cls.from_dict({**msgspec.structs.asdict(PRESETS[name]), **changes})


_AVATARS = ModelConfig(
    "avatars", "classes", 12, image_size=128, ngf=12, nef=8, feature_channels=32, spade_hidden=24, residual_blocks=1,
    warp_stride=2, warp_upsampling="pixel_shuffle", attention=False, position_frequencies=4, warp_residual=True,
    max_channels=128,
)  # fmt: skip
# adaptor_kernel 4: upstream's README trains three tasks without the flag but tests them with it; the published
# checkpoints have 4, and `flashcocos convert` reads the value off the checkpoint's shapes
PRESETS: dict[str, ModelConfig] = {
    "ade20k": ModelConfig("ade20k", "classes", 151, warp_upsampling="nearest"),
    "celebahq": ModelConfig("celebahq", "classes", 19, adaptor_kernel=4),
    "celebahqedge": ModelConfig("celebahqedge", "channels", 15, adaptor_kernel=4),
    "deepfashion": ModelConfig(
        "deepfashion", "channels", 20, adaptor_kernel=4, condition_on_label=False, warp_upsampling="pixel_shuffle"
    ),
    "avatars-128": _AVATARS,
    "avatars-256": msgspec.structs.replace(_AVATARS, image_size=256),
    "tiny": ModelConfig(
        "avatars", "classes", 12, image_size=64, ngf=4, nef=4, feature_channels=16, spade_hidden=8, residual_blocks=1
    ),
    "tiny-channels": ModelConfig(
        "tiny", "channels", 5, image_size=64, ngf=4, nef=4, feature_channels=16, spade_hidden=8, residual_blocks=1,
        adaptor_kernel=4, condition_on_label=False, warp_upsampling="pixel_shuffle",
    ),
}  # fmt: skip
