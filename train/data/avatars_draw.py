"""Drawing one avatar: a structure (which drawing, where) as a map of classes, and under any look as an image.

The drawings come from the packages dicebear-core and dicebear-styles (extra `avatars`) and are rasterized by resvg.
Every fill and stroke of a style is rewritten twice: the label copy has one flat color per class and no soft edges;
the look copy has a sentinel color per class, exchanged for the look's paint in the finished SVG. The same structure
gives the same shapes in both. Fixed colors (eye white, teeth, shadows) stay as the artist chose them.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.resources
import io
import json
import random
from typing import Any

import numpy as np
from PIL import Image

from ...errors import BackendError, InputError
from .avatars_paint import CLASSES, Look

STYLES = ("open-peeps", "lorelei", "personas", "micah", "adventurer", "toon-head")
PACKAGES = ("dicebear-core", "dicebear-styles", "resvg")
HELD_OUT_SHARE = 0.1  # of the hair variants of each style

# flat colors of the label copy, far apart, for clip paths blend a few pixels; pictures of labels have the palette of
# preprocess.palette instead
_FLAT = np.array(
    [
        (16, 16, 24), (240, 176, 128), (128, 64, 0), (0, 192, 255), (255, 0, 192), (255, 128, 0), (255, 0, 0),
        (0, 64, 255), (192, 192, 255), (255, 224, 0), (0, 255, 128), (64, 64, 64),
    ],
    dtype=np.uint8,
)  # fmt: skip

# a part's class: the component it belongs to, else the style's named color, else what the component is made of
_BY_COMPONENT = {
    "eyes": "eyes", "eyebrows": "brows", "nose": "nose", "freckles": "nose", "details": "nose", "mouth": "mouth",
    "expression": "mouth", "glasses": "glasses", "accessories": "glasses", "mask": "glasses", "earrings": "hat",
    "hairAccessories": "hat",
}  # fmt: skip
_BY_COLOR = {
    "skin": "skin", "base": "skin", "hair": "hair", "facialHair": "hair", "headContrast": "hair",
    "clothing": "clothes", "shirt": "clothes", "clothes": "clothes", "ink": "ink", "outline": "ink", "stroke": "ink",
}  # fmt: skip
_BY_MATERIAL = {
    "canvas": "skin", "head": "skin", "ears": "skin", "hair": "hair", "rearHair": "hair", "facialHair": "hair",
    "beard": "hair", "clothes": "trim", "body": "clothes",
}  # fmt: skip
_FIXED_COLORS = frozenset({"sclera", "teeth", "throat", "tongue", "uvula", "lips", "eyeShadow"})
_BLACK = frozenset({"black", "#000", "#000000"})
_NOT_PAINTED = frozenset({"mask", "clipPath", "defs", "linearGradient", "radialGradient", "filter"})
_TRANSLUCENT = 0.6  # parts under this opacity shade what lies below and have no class of their own


@dataclasses.dataclass(frozen=True)
class Structure:
    """One drawing without its colors.

    style: one of `STYLES`. seed: picks every variant but the hair. hair: the hair variant, by the style's name.
    rotation in degrees, scale as a factor, shift_x and shift_y in percent of the canvas.
    """

    style: str
    seed: str
    hair: str
    flip: bool = False
    rotation: float = 0.0
    scale: float = 1.0
    shift_x: float = 0.0
    shift_y: float = 0.0


def random_structure(key: str, *, style: str | None = None, held_out: bool | None = None) -> Structure:
    """The structure that belongs to `key`; the same on every machine.

    held_out: True draws only hair variants that training never shows, False only the others, None from all.
    Raises `InputError` for an unknown style, `BackendError` where the extra `avatars` is not installed.
    """
    rng = random.Random(key)
    style = rng.choice(STYLES) if style is None else style
    kept, held = hair_variants(style)
    pool = (*kept, *held) if held_out is None else held if held_out else kept
    return Structure(
        style,
        seed=key,
        hair=rng.choice(sorted(pool)),
        flip=rng.random() < 0.5,
        rotation=round(rng.uniform(-8, 8), 2),
        scale=round(rng.uniform(0.88, 1.05), 3),
        shift_x=round(rng.uniform(-5, 5), 2),
        shift_y=round(rng.uniform(-3, 5), 2),
    )


@functools.cache
def hair_variants(style: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of a style's hair variants: those for training, and those held out of it (at least one)."""
    names = sorted(_definition(style)["components"][_hair_component(style)]["variants"])
    random.Random(f"held out {style}").shuffle(names)
    held = max(1, round(HELD_OUT_SHARE * len(names)))
    return tuple(names[held:]), tuple(names[:held])


def render_label(structure: Structure, size: int) -> np.ndarray:
    """The structure as class ids, uint8 (size, size): positions in `CLASSES`."""
    flat = _rasterize(_svg(structure, "label"), size)
    codes = flat.astype(np.int32) @ _CODE
    label: np.ndarray = _class_of_code()[codes]
    mixed = label == len(CLASSES)  # a few pixels where clip paths are soft
    if mixed.any():
        distance = np.square(flat[mixed][:, None].astype(np.int32) - _FLAT).sum(-1)
        label[mixed] = distance.argmin(-1)
    return label


def render_image(structure: Structure, look: Look, size: int) -> np.ndarray:
    """The structure under `look`, uint8 (size, size, 3) RGB."""
    svg = _svg(structure, "look")
    width = _definition(structure.style)["canvas"]["width"]
    servers = []
    for name, sentinel, paint in zip(CLASSES, _SENTINELS, look.paints, strict=True):
        if sentinel in svg:
            svg = svg.replace(sentinel, paint.value(f"paint-{name}"))
            servers.append(paint.server(f"paint-{name}", width))
    head, body = svg.split(">", 1)
    return _rasterize(f"{head}><defs>{''.join(servers)}</defs>{body}", size)


def package_versions() -> dict[str, str]:
    """Versions of the packages a drawing depends on; `BackendError` where one is missing."""
    try:
        return {name: importlib.metadata.version(name) for name in PACKAGES}
    except importlib.metadata.PackageNotFoundError as error:
        raise _missing(str(error.name)) from error


_CODE = np.array([1 << 16, 1 << 8, 1], dtype=np.int32)
_SENTINELS = tuple(f"#a17b{16 + 3 * index:02x}" for index in range(len(CLASSES)))


@functools.cache
def _class_of_code() -> np.ndarray:
    table = np.full(1 << 24, len(CLASSES), dtype=np.uint8)
    table[_FLAT.astype(np.int32) @ _CODE] = np.arange(len(CLASSES), dtype=np.uint8)
    return table


def _missing(package: str) -> BackendError:
    return BackendError(
        f"the avatars data set needs the package {package}: pip install 'flashcocos[avatars]' to train on it, "
        "'flashcocos[eval]' to evaluate"
    )


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise _missing(package) from error


@functools.cache
def _definition(style: str) -> dict[str, Any]:
    if style not in STYLES:
        raise InputError(f"avatar style: expected one of {', '.join(STYLES)}, got {style!r}")
    _module("dicebear_styles", "dicebear-styles")
    text = importlib.resources.files("dicebear_styles").joinpath(f"{style}.json").read_text(encoding="utf-8")
    definition: dict[str, Any] = json.loads(text)
    return definition


def _hair_component(style: str) -> str:
    return "head" if style == "open-peeps" else "hair"


@functools.cache
def _style(style: str, purpose: str) -> Any:
    dicebear = _module("dicebear", "dicebear-core")
    definition = copy.deepcopy(_definition(style))
    _rewrite(definition["canvas"]["elements"], style, "canvas", purpose)
    for name, component in definition["components"].items():
        for variant in component["variants"].values():
            _rewrite(variant["elements"], style, name, purpose)
    return dicebear.Style(definition)


def _rewrite(elements: list[dict[str, Any]], style: str, component: str, purpose: str, opacity: float = 1.0) -> None:
    """Recolor the painted `elements` in place; `opacity` is what the enclosing groups leave of them."""
    for element in elements:
        if element.get("type") != "element" or element["name"] in _NOT_PAINTED:
            continue
        attributes = element.get("attributes") or {}
        blended = "mix-blend" in str(attributes.get("style", ""))
        own = 0.0 if blended else opacity * float(attributes.get("opacity", 1))
        for key in ("fill", "stroke"):
            value = attributes.get(key)
            if value is not None and value != "none":
                visible = own * float(attributes.get(f"{key}-opacity", 1)) >= _TRANSLUCENT
                attributes[key] = _recolor(value, style, component, purpose, visible)
        _rewrite(element.get("children") or [], style, component, purpose, own)


def _recolor(value: Any, style: str, component: str, purpose: str, visible: bool) -> Any:
    color = value["name"] if isinstance(value, dict) else None
    index = CLASSES.index(_class_name(style, component, color, value))
    if purpose == "label":
        return "#{:02x}{:02x}{:02x}".format(*_FLAT[index]) if visible else "none"
    # a translucent line shades a part of another class, so it must not follow the look's ink
    fixed = color is None or color in _FIXED_COLORS or (not visible and CLASSES[index] == "ink")
    return value if fixed else _SENTINELS[index]


def _class_name(style: str, component: str, color: str | None, value: Any) -> str:
    if component in _BY_COMPONENT:
        return _BY_COMPONENT[component]
    if style == "open-peeps" and component == "head" and color == "clothing":
        return "hat"
    if color in _BY_COLOR:
        return _BY_COLOR[color]
    if str(value).lower() in _BLACK:
        return "ink"
    return _BY_MATERIAL[component]


@functools.lru_cache(maxsize=16)
def _svg(structure: Structure, purpose: str) -> str:
    ground = "#{:02x}{:02x}{:02x}".format(*_FLAT[0]) if purpose == "label" else _SENTINELS[0]
    options = {
        "seed": structure.seed,
        f"{_hair_component(structure.style)}Variant": structure.hair,
        "flip": "horizontal" if structure.flip else "none",
        "rotate": structure.rotation,
        "scale": structure.scale,
        "translateX": structure.shift_x,
        "translateY": structure.shift_y,
        "backgroundColor": [ground],
        "backgroundColorFill": "solid",
    }
    style = _style(structure.style, purpose)
    svg: str = _module("dicebear", "dicebear-core").Avatar(style, options).to_string()
    return svg.replace('shape-rendering="auto"', 'shape-rendering="crispEdges"') if purpose == "label" else svg


def _rasterize(svg: str, size: int) -> np.ndarray:
    if not 8 <= size <= 4096:
        raise InputError(f"avatar size: expected 8 to 4096 pixels, got {size}")
    resvg = _module("resvg", "resvg")
    sized = svg.replace("<svg ", f'<svg width="{size}" height="{size}" ', 1)
    tree = resvg.usvg.Tree.from_str(sized, resvg.usvg.Options.default())
    png = resvg.render(tree, (1, 0, 0, 0, 1, 0), bg_color=(255, 255, 255, 255))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
