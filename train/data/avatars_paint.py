"""Looks of the avatars data set: one paint (solid, gradient or pattern) per class, as SVG paint servers.

A look says nothing of any drawing, so the same look can be put on any structure: that makes the exact target of
(mask, exemplar) known. Pattern periods are at least 9 % of the canvas, because finer ones alias at 128 pixels.
"""

from __future__ import annotations

import colorsys
import dataclasses
import random

from ...preprocess.palette import CLASS_NAMES

CLASSES = CLASS_NAMES["avatars"]
KINDS = ("solid", "gradient", "stripes", "columns", "diagonals", "dots", "checks", "zigzag")
PERIODS = (0.09, 0.13, 0.18)  # of the canvas width

_SKIN_TONES = (
    "#f9d3b4", "#edb98a", "#d08b5b", "#ae5d29", "#694d3d", "#ffdbb4", "#eeb4a4", "#b16a5b", "#623d36",
)  # fmt: skip
_FEATURES = ("eyes", "brows", "nose", "mouth")  # small and line-like: dark, or they vanish on the skin
_PATTERN_CHANCE = {"background": 0.4, "clothes": 0.4, "hat": 0.4, "hair": 0.25}


@dataclasses.dataclass(frozen=True)
class Paint:
    """One of `KINDS`. Colors are "#rrggbb"; a solid uses no `second` and no `period`, which is a share of the width."""

    kind: str
    first: str
    second: str = "#000000"
    period: float = PERIODS[-1]

    def value(self, name: str) -> str:
        """What goes into a fill or stroke attribute: the color, or a reference to the server called `name`."""
        return self.first if self.kind == "solid" else f"url(#{name})"

    def server(self, name: str, width: float) -> str:
        """The SVG paint server `name` for a canvas `width` units wide; empty for a solid."""
        if self.kind == "solid":
            return ""
        if self.kind == "gradient":
            stops = f'<stop offset="0" stop-color="{self.first}"/><stop offset="1" stop-color="{self.second}"/>'
            return f'<linearGradient id="{name}" x1="0" y1="0" x2="0" y2="1">{stops}</linearGradient>'
        tile = round(width * self.period, 4)
        half = tile / 2
        second = f'fill="{self.second}"'
        shapes = {
            "stripes": f'<rect width="{tile}" height="{half}" {second}/>',
            "columns": f'<rect width="{half}" height="{tile}" {second}/>',
            "diagonals": f'<rect width="{half}" height="{tile}" {second}/>',
            "dots": f'<circle cx="{half}" cy="{half}" r="{tile * 0.28}" {second}/>',
            "checks": f'<path d="M0 0h{half}v{tile}h{half}v-{half}h-{tile}z" {second}/>',
            "zigzag": f'<path d="M0 {half}L{half} 0L{tile} {half}" stroke="{self.second}" '
            f'stroke-width="{tile * 0.22}" fill="none"/>',
        }
        turn = ' patternTransform="rotate(45)"' if self.kind == "diagonals" else ""
        ground = f'<rect width="{tile}" height="{tile}" fill="{self.first}"/>'
        return (
            f'<pattern id="{name}" patternUnits="userSpaceOnUse" width="{tile}" height="{tile}"{turn}>'
            f"{ground}{shapes[self.kind]}</pattern>"
        )


@dataclasses.dataclass(frozen=True)
class Look:
    """One paint per class, in the order of `CLASSES`."""

    paints: tuple[Paint, ...]

    def replace(self, name: str, paint: Paint) -> Look:
        """This look with the paint of class `name` exchanged."""
        place = CLASSES.index(name)
        return Look((*self.paints[:place], paint, *self.paints[place + 1 :]))


def random_look(key: str) -> Look:
    """The look that belongs to `key`; the same on every machine."""
    rng = random.Random(key)
    return Look(tuple(_random_paint(rng, name) for name in CLASSES))


def _random_paint(rng: random.Random, name: str) -> Paint:
    if name == "skin":
        return Paint("solid", rng.choice(_SKIN_TONES))
    if name == "ink" or name in _FEATURES:
        return Paint("solid", _random_color(rng, (0.3, 0.8), (0.05, 0.25)))
    first = _random_color(rng)
    if rng.random() >= _PATTERN_CHANCE.get(name, 0.0):
        return Paint("solid", first)
    return Paint(rng.choice(KINDS[1:]), first, _random_color(rng), rng.choice(PERIODS))


def _random_color(
    rng: random.Random, saturation: tuple[float, float] = (0.3, 0.9), value: tuple[float, float] = (0.35, 0.98)
) -> str:
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))
    return f"#{int(red * 255):02x}{int(green * 255):02x}{int(blue * 255):02x}"


DEFAULT_LOOK = Look(
    tuple(
        Paint("solid", color)
        for color in (
            "#d8dee9", "#edb98a", "#5a3b28", "#20242c", "#2a2320", "#3a2a26", "#3a1f24", "#4a6fa5", "#f4f4f4",
            "#8a5a83", "#35424f", "#181818",
        )
    )
)  # fmt: skip
