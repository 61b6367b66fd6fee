"""A contact sheet: label, exemplar, warped exemplar, result and true picture of the first pairs."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from ...config import ModelConfig
from ...files import atomic_path
from ...preprocess.images import PathLike, UInt8Array, to_uint8
from ...preprocess.palette import label_colors
from ...train.data import Item
from .predictors import Prediction

CAPTIONS = ("label", "exemplar", "warped", "result", "true")
_HEADER = 16


class ContactSheet:
    """Rows of at most `count` pairs; `write` lays them out in up to three columns under captions."""

    def __init__(self, config: ModelConfig, count: int = 24) -> None:
        self.config, self.count = config, count
        self.rows: list[UInt8Array] = []

    def add(self, item: Item, prediction: Prediction) -> None:
        """Take one pair, unless the sheet is full."""
        if len(self.rows) < self.count:
            label = label_colors(self.config, item["label"])
            exemplar, image = to_uint8(item["exemplar"]), to_uint8(item["image"])
            self.rows.append(np.concatenate([label, exemplar, prediction.warped, prediction.image, image], axis=1))

    def write(self, path: PathLike) -> None:
        """Write the sheet as a picture, atomically."""
        per_column = -(-len(self.rows) // 3)
        columns = -(-len(self.rows) // per_column)
        height, width = self.rows[0].shape[:2]
        sheet = Image.new("RGB", (columns * width, _HEADER + per_column * height), "white")
        draw = ImageDraw.Draw(sheet)
        for index, row in enumerate(self.rows):
            column, line = divmod(index, per_column)
            sheet.paste(Image.fromarray(row), (column * width, _HEADER + line * height))
        for column in range(columns):
            for place, caption in enumerate(CAPTIONS):
                draw.text((column * width + place * width // len(CAPTIONS) + 4, 2), caption, fill="black")
        with atomic_path(path) as temporary:
            sheet.save(temporary)
