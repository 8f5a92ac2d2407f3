"""A contact sheet: samples of a dataset with their masks, for a person to look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from ..drawing import draw_masks, shrink_mask, write_png
from ..sample import Dataset, VideoRecord

COLUMNS = 6
"""Frames of a video, or images, side by side."""
ROWS = 6
_LONGEST = 256  # side of a picture in pixels
_NARROWEST = 208  # column, for its caption
_CAPTION, _GAP = 22, 8
_BACKGROUND, _TEXT = 24, (235, 235, 235)


def write_sheet(dataset: Dataset, indices: Sequence[int], is_video: bool, path: Path) -> None:
    """Write a PNG: of videos, a row each with annotated frames spread over it; of images, a grid.

    Args:
        indices: of sound items; the first that fit are shown.
    """
    shown = indices[: ROWS if is_video else ROWS * COLUMNS]
    tiles = [tile for index in shown for tile in _tiles(dataset[index], is_video)]
    tallest = max(picture.shape[0] for picture, _, _ in tiles)
    widest = max(_NARROWEST, *(picture.shape[1] for picture, _, _ in tiles))
    height, width = tallest + _CAPTION + _GAP, widest + _GAP
    columns = COLUMNS if is_video else min(COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = np.full((rows * height + _GAP, columns * width + _GAP, 3), _BACKGROUND, np.uint8)
    for number, (picture, *texts) in enumerate(tiles):
        top, left = number // columns * height + _GAP, number % columns * width + _GAP
        _paste(sheet, picture, top + (tallest - picture.shape[0]) // 2, left + (widest - picture.shape[1]) // 2)
        _paste(sheet, _caption(*texts, widest), top + tallest, left)
    write_png(path, sheet)


def _tiles(record: VideoRecord, is_video: bool) -> Iterator[tuple[np.ndarray, str, str]]:
    """Pictures of frames with their masks, and what stands below them on the left and on the right; a row that is not
    full is filled up with empty ones."""
    annotated = record.annotated
    places = np.linspace(0, len(annotated) - 1, min(COLUMNS, len(annotated))).round().astype(int).tolist()
    for number, place in enumerate(places):
        frame = annotated[place]
        masks = record.masks(frame)
        objects = f"{len(masks)} object" + "s" * (len(masks) != 1)
        picture = _picture(record.frames([frame])[0], masks)
        yield picture, "" if number else record.name, f"frame {frame}, {objects}" if is_video else objects
    nothing = np.empty((0, 0, 3), np.uint8)
    yield from ((nothing, "", "") for _ in range(COLUMNS - len(places) if is_video else 0))


def _paste(sheet: np.ndarray, picture: np.ndarray, top: int, left: int) -> None:
    sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture


def _picture(image: np.ndarray, masks: Mapping[int, np.ndarray]) -> np.ndarray:
    scale = _LONGEST / max(image.shape[:2])
    size = tuple(max(1, round(side * scale)) for side in image.shape[:2])
    small = {object_id: shrink_mask(masks[object_id], size) for object_id in masks}
    return draw_masks(cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA), small)


def _caption(left: str, right: str, width: int) -> np.ndarray:
    """uint8 [_CAPTION, width, 3]; the left text gives way to the right one."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(13)
    image = Image.new("RGB", (width, _CAPTION), (_BACKGROUND,) * 3)
    draw = ImageDraw.Draw(image)
    start = width - draw.textlength(right, font)
    draw.text((start, 2), right, _TEXT, font)
    while left and draw.textlength(left, font) > start - 8:
        left = f"{left[:-2].rstrip('.')}." if len(left) > 2 else ""
    draw.text((0, 2), left, _TEXT, font)
    return np.asarray(image)
