"""A contact sheet: samples of a dataset with their masks, for a person to look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from ..drawing import draw_masks, shrink_mask
from ..sample import Dataset, VideoRecord

COLUMNS = 6
"""Frames of a video, or images, side by side."""
ROWS = 6
_TILE = (192, 256)  # height and width in pixels
_CAPTION, _GAP = 22, 8
_BACKGROUND, _TEXT = 24, (235, 235, 235)


def write_sheet(dataset: Dataset, indices: Sequence[int], is_video: bool, path: Path) -> None:
    """Write a PNG: of videos, a row each with annotated frames spread over it; of images, a grid.

    Args:
        indices: of sound items; the first that fit are shown.
    """
    shown = indices[: ROWS if is_video else ROWS * COLUMNS]
    tiles = [tile for index in shown for tile in _tiles(dataset[index], is_video)]
    tallest = max(picture.shape[0] for picture, _ in tiles)
    height, width = tallest + _CAPTION + _GAP, _TILE[1] + _GAP
    columns = COLUMNS if is_video else min(COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = np.full((rows * height + _GAP, columns * width + _GAP, 3), _BACKGROUND, np.uint8)
    for number, (picture, caption) in enumerate(tiles):
        top, left = number // columns * height + _GAP, number % columns * width + _GAP
        _paste(sheet, picture, top + (tallest - picture.shape[0]) // 2, left + (_TILE[1] - picture.shape[1]) // 2)
        _paste(sheet, caption, top + tallest, left)
    _, encoded = cv2.imencode(".png", sheet[..., ::-1])
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(encoded.tobytes())
    partial.replace(path)


def _tiles(record: VideoRecord, is_video: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pictures of frames with their masks, and captions; a row that is not full is filled up with empty ones."""
    annotated = record.annotated
    places = np.linspace(0, len(annotated) - 1, min(COLUMNS, len(annotated))).round().astype(int).tolist()
    for number, place in enumerate(places):
        frame = annotated[place]
        masks = record.masks(frame)
        objects = f"{len(masks)} object" + "s" * (len(masks) != 1)
        caption = _caption("" if number else record.name, f"frame {frame}, {objects}" if is_video else objects)
        yield _picture(record.frames([frame])[0], masks), caption
    nothing = np.empty((0, 0, 3), np.uint8)
    yield from ((nothing, nothing) for _ in range(COLUMNS - len(places) if is_video else 0))


def _paste(sheet: np.ndarray, picture: np.ndarray, top: int, left: int) -> None:
    sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture


def _picture(image: np.ndarray, masks: Mapping[int, np.ndarray]) -> np.ndarray:
    scale = min(_TILE[0] / image.shape[0], _TILE[1] / image.shape[1])
    size = tuple(max(1, round(side * scale)) for side in image.shape[:2])
    small = {object_id: shrink_mask(masks[object_id], size) for object_id in masks}
    return draw_masks(cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA), small)


def _caption(left: str, right: str) -> np.ndarray:
    """uint8 [_CAPTION, W, 3]; the left text gives way to the right one."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(13)
    image = Image.new("RGB", (_TILE[1], _CAPTION), (_BACKGROUND,) * 3)
    draw = ImageDraw.Draw(image)
    start = _TILE[1] - draw.textlength(right, font)
    draw.text((start, 2), right, _TEXT, font)
    while left and draw.textlength(left, font) > start - 8:
        left = f"{left[:-2].rstrip('.')}." if len(left) > 2 else ""
    draw.text((0, 2), left, _TEXT, font)
    return np.asarray(image)
