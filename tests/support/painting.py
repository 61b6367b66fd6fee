"""What the tests of the web page paint with: a canvas in its own pixels, the page's tools in numpy, PNG files."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image


class Canvas:
    """A canvas of the page, spoken to in its own pixels."""

    def __init__(self, page: Any, selector: str, side: int = 128) -> None:
        self.mouse, self.side = page.mouse, side
        self.box = page.locator(selector).bounding_box()

    def at(self, x: float, y: float) -> tuple[float, float]:
        scale = self.box["width"] / self.side
        return self.box["x"] + (x + 0.5) * scale, self.box["y"] + (y + 0.5) * scale

    def stroke(self, *points: tuple[int, int]) -> None:
        self.mouse.move(*self.at(*points[0]))
        self.mouse.down()
        for point in points[1:]:
            self.mouse.move(*self.at(*point))
        self.mouse.up()


def random_stroke(rng: np.random.Generator) -> tuple[str, list[list[int]], int, int]:
    """Tool, points, brush and class. All but a filling may leave the picture and come back."""
    tool = str(rng.choice(["brush", "line", "rectangle", "fill"], p=[0.6, 0.2, 0.1, 0.1]))
    points = [rng.integers(0, 128, 2).tolist()]
    if tool != "fill":
        points += rng.integers(-9, 137, (int(rng.integers(1, 4)), 2)).tolist()
    return tool, points, int(rng.integers(1, 65) if rng.random() < 0.3 else rng.integers(1, 8)), int(rng.integers(12))


def replay_line(ids: np.ndarray, a: Sequence[int], b: Sequence[int], size: int, number: int) -> None:
    rows, columns = np.mgrid[:size, :size]
    inside = (2 * rows - size + 1) ** 2 + (2 * columns - size + 1) ** 2 <= size * size
    dy, dx = rows[inside] - size // 2, columns[inside] - size // 2
    steps = max(abs(b[0] - a[0]), abs(b[1] - a[1]), 1)
    for step in range(steps + 1):
        x, y = (start + (2 * step * (end - start) + steps) // (2 * steps) for start, end in zip(a, b, strict=True))
        touched = (x + dx >= 0) & (x + dx < ids.shape[1]) & (y + dy >= 0) & (y + dy < ids.shape[0])
        ids[(y + dy)[touched], (x + dx)[touched]] = number


def replay_fill(ids: np.ndarray, point: Sequence[int], number: int) -> None:
    same = np.pad(ids == ids[point[1], point[0]], 1)
    region = np.zeros_like(same)
    region[point[1] + 1, point[0] + 1] = True
    while True:
        grown = region.copy()
        for axis in (0, 1):
            for way in (-1, 1):
                grown |= np.roll(region, way, axis)
        grown &= same
        if np.array_equal(grown, region):
            ids[region[1:-1, 1:-1]] = number
            return
        region = grown


def replay(ids: np.ndarray, tool: str, points: Sequence[Sequence[int]], size: int, number: int) -> None:
    if tool == "fill":
        replay_fill(ids, points[0], number)
    elif tool == "rectangle":
        (left, right), (top, bottom) = (sorted((points[0][k], points[-1][k])) for k in (0, 1))
        ids[max(top, 0) : bottom + 1, max(left, 0) : right + 1] = number
    elif tool == "line":
        replay_line(ids, points[0], points[-1], size, number)
    else:
        for a, b in zip((points[0], *points), points, strict=False):
            replay_line(ids, a, b, size, number)


def png(array: np.ndarray, mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    if mode == "P":
        image = image.convert("P")
        image.putdata(array.ravel().tolist())
    image.save(buffer, "PNG")
    return buffer.getvalue()


def gray_png(rows: bytes, width: int, height: int) -> bytes:
    """A PNG of rows that begin with their filter."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
