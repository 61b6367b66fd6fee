"""The names of the classes of each task, and the one palette: the color that stands for a class in every picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import ModelConfig
from ..errors import InputError
from .images import PathLike, UInt8Array, load_rgb, open_image

# names by id; those of ade20k are the data set's own, in its order, after 0 for what it leaves unlabeled
_AVATARS = "background, skin, hair, eyes, brows, nose, mouth, clothes, trim, hat, glasses, ink"
_CELEBAHQ = (
    "background, hair, skin, left brow, right brow, left eye, right eye, left ear, right ear, nose, upper lip, mouth, "
    "lower lip, neck, clothes, hat, glasses, earring, necklace"
)
_ADE20K = (
    "unlabeled, wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, "
    "earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, "
    "field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, "
    "signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, "
    "runway, case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, "
    "flower, book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, "
    "arcade machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, "
    "television receiver, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, "
    "poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, "
    "basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, "
    "bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, "
    "pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag"
)
CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "avatars": tuple(_AVATARS.split(", ")),
    "celebahq": tuple(_CELEBAHQ.split(", ")),
    "ade20k": tuple(_ADE20K.split(", ")),
}


def class_names(config: ModelConfig) -> tuple[str, ...]:
    """The name of each class of a network of `config`, by id; "class 7" where its task has none in `CLASS_NAMES`."""
    names = CLASS_NAMES.get(config.task, ())
    if len(names) == config.label_channels:
        return names
    return tuple(f"class {number}" for number in range(config.label_channels))


def legend(config: ModelConfig) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]]:
    """The names and the colors of the classes, as a bundle's manifest states them; empty for labels of planes."""
    if config.label_kind != "classes":
        return (), ()
    return class_names(config), tuple((int(r), int(g), int(b)) for r, g, b in palette(config.label_channels))


def palette(count: int) -> UInt8Array:
    """The colors of the first `count` classes.

    Args:
        count: how many, up to 512.

    Returns:
        uint8 (count, 3), RGB, no color twice, class 0 black: the bits of the id spread over the channels, as the data
        set PASCAL VOC does.
    """
    ids = np.arange(count)
    colors = np.zeros((count, 3), np.uint8)
    for bit in range(3):
        for channel in range(3):
            colors[:, channel] |= ((ids >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colors


def hexadecimal(color: npt.ArrayLike) -> str:
    """A color (red, green, blue) as "#rrggbb"."""
    return "#{:02x}{:02x}{:02x}".format(*np.asarray(color))


def read_drawing(path: PathLike, count: int, *, nearest: bool = False) -> UInt8Array:
    """The class ids that a drawing in the palette stands for.

    Args:
        path: picture file, each class in its color; anything but a JPEG, which alters colors.
        count: of classes.
        nearest: whether any other color stands for the class whose color is nearest to it.

    Returns:
        uint8 (H, W), ids below `count`.

    Raises:
        InputError: a color is not in the palette, with its first pixel and the nearest color; a translucent pixel.
    """
    image = open_image(path)
    if image.format == "JPEG":
        raise InputError(f"{path}: JPEG alters colors; save the drawing as a PNG")
    if np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        raise InputError(f"{path}: has transparent pixels, which stand for no class; fill them and save it again")
    pixels = np.asarray(load_rgb(image))
    codes = pixels.reshape(-1, 3) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    shown_codes, places, inverse = np.unique(codes, return_index=True, return_inverse=True)
    shown = shown_codes[:, None] >> np.array([16, 8, 0]) & 255
    colors = palette(count).astype(np.int64)
    parts = [shown[start : start + 4096] for start in range(0, len(shown), 4096)]  # a photograph has a million colors
    ids = np.concatenate([np.square(part[:, None] - colors).sum(-1).argmin(1) for part in parts])
    wrong = (colors[ids] != shown).any(1)
    if wrong.any() and not nearest:
        first = np.flatnonzero(wrong)[places[wrong].argmin()]
        y, x = divmod(int(places[first]), pixels.shape[1])
        raise InputError(
            f"{path}: color {hexadecimal(shown[first])} at pixel ({x}, {y}) is not in the palette "
            f"({int(wrong.sum())} such colors); the nearest is {hexadecimal(colors[ids[first]])}, class {ids[first]}; "
            "draw without soft edges, or accept the nearest with --nearest"
        )
    return np.asarray(ids[inverse].reshape(pixels.shape[:2]), np.uint8)


def label_colors(config: ModelConfig, label: npt.NDArray[Any]) -> UInt8Array:
    """A label as a picture to look at.

    Args:
        config: of the network that the label is for.
        label: as `preprocess.load_label` returns it, ids uint8 (H, W) or planes float32 (channels, H, W).

    Returns:
        uint8 (H, W, 3): a color a class, or the planes' colors weighted by their values.
    """
    if config.label_kind == "classes":
        return np.asarray(palette(256)[label])
    if config.task == "deepfashion":  # its first planes are the drawn pose itself, in RGB
        mixed = label[:3]
    elif config.task == "celebahqedge":  # plane 0 holds all edges; the distance maps would hide them
        mixed = label[:1].repeat(3, 0)
    else:
        colors = palette(config.label_channels + 1)[1:].astype(np.float32) / 255
        mixed = np.einsum("nhw,nc->chw", label, colors).clip(0, 1)
    return np.asarray(np.rint(mixed * 255).transpose(1, 2, 0), np.uint8)
