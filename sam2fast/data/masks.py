"""Masks of one frame, decoded one object at a time: run lengths, polygons and label images.

COCO run lengths (cocodataset.org, `maskApi`): column by column, alternating lengths of background and object, starting
with background; `counts` is the list of lengths or a string of 5-bit groups that stores differences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import cv2
import numpy as np

from .sample import DataError, SizeMismatch

Size = tuple[int, int]
_BROKEN = "fix the annotation, or name the video or image in the dataset's `exclude`"


class FrameMasks(Mapping[int, np.ndarray]):
    """Object id -> bool [H, W] of the objects visible in a frame. Decoding happens at access, and is not kept."""

    def __init__(self, size: Size, areas: dict[int, int], decode: Callable[[int], np.ndarray]):
        """`areas`: pixels per object as annotated (objects of none are left out); `decode`: id -> bool [h, w], where
        h, w may differ from `size` = (H, W) by what the caller tolerates; it is resized by nearest neighbor then."""
        self.size = size
        self.empty = [object_id for object_id, area in areas.items() if area <= 0]
        """Objects that are annotated, with no pixel."""
        self._areas = {object_id: area for object_id, area in areas.items() if area > 0}
        self._decode = decode

    def __getitem__(self, object_id: int) -> np.ndarray:
        if object_id not in self._areas:
            raise KeyError(object_id)
        return resize_nearest(self._decode(object_id), self.size)

    def __iter__(self) -> Iterator[int]:
        return iter(self._areas)

    def __len__(self) -> int:
        return len(self._areas)

    def area(self, object_id: int) -> int:
        """Pixels of an object as annotated, without decoding its mask."""
        return self._areas[object_id]


def label_masks(labels: np.ndarray, size: Size) -> FrameMasks:
    """Masks of an image of object numbers, uint8 [h, w], 0 for none."""
    counts = cv2.calcHist([labels], [0], None, [256], [0, 256]).ravel()  # 10 times faster than np.bincount
    areas = {int(number): int(counts[number]) for number in np.flatnonzero(counts) if number}
    return FrameMasks(size, areas, lambda object_id: labels == object_id)


def run_length_masks(runs: dict[int, tuple[Size, np.ndarray]], size: Size) -> FrameMasks:
    """Masks of validated run lengths (`parse_rle`)."""
    areas = {object_id: int(lengths[1::2].sum()) for object_id, (_, lengths) in runs.items()}
    return FrameMasks(size, areas, lambda object_id: decode_runs(*runs[object_id]))


def parse_rle(rle: Any, source: str) -> tuple[Size, np.ndarray]:
    """Validate a COCO run-length object `{"size": [h, w], "counts": string or list}`.

    Every length is checked before anything is drawn, so that no broken annotation can write outside an image.

    Returns:
        (h, w) and the int64 run lengths, which sum to h * w.

    Raises:
        DataError: names `source` (file and annotation) and what is wrong.
    """
    try:
        height, width = (int(value) for value in rle["size"])
        counts = rle["counts"]
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"{source}: a run-length mask needs `size` [height, width] and `counts`, got {_brief(rle)}; {_BROKEN}"
        ) from None
    if isinstance(counts, (str, bytes)):
        lengths = _unpack_counts(counts, source)
    else:
        try:
            lengths = np.asarray(counts, dtype=np.int64).reshape(-1)
        except (TypeError, ValueError, OverflowError):
            raise DataError(f"{source}: run lengths must be whole numbers, got {_brief(counts)}; {_BROKEN}") from None
    pixels = height * width if min(height, width) > 0 else -1
    if (lengths < 0).any() or (lengths > pixels).any() or lengths.sum() != pixels:
        raise DataError(
            f"{source}: run lengths cover {lengths.sum()} pixels of a {height} x {width} mask: cut off, or "
            f"of another size; {_BROKEN}"
        )
    return (height, width), lengths


def decode_runs(size: Size, lengths: np.ndarray) -> np.ndarray:
    """Run lengths (`parse_rle`) to bool [h, w]."""
    is_object = np.zeros(len(lengths), dtype=bool)
    is_object[1::2] = True
    columns = np.repeat(is_object, lengths).reshape(size[1], size[0])
    return cv2.transpose(columns.view(np.uint8)).view(bool)  # contiguous, and 6 times faster than numpy's copy


def polygons_to_runs(polygons: Any, size: Size, source: str) -> tuple[Size, np.ndarray]:
    """Rasterize COCO polygons `[[x0, y0, x1, y1, ...], ...]` (their union) as pycocotools does.

    Polygons of less than three points cover nothing and are skipped.

    Raises:
        DataError: coordinates that are not finite numbers in pairs, or that lie further than the image's own size
            outside of it.
    """
    from pycocotools import mask as coco

    height, width = size
    parts = []
    for polygon in polygons if isinstance(polygons, list) else [None]:
        try:
            points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
        except (TypeError, ValueError):
            raise DataError(f"{source}: a polygon must list x, y pairs, got {_brief(polygon)}; {_BROKEN}") from None
        # not (inside) instead of outside: NaN compares false
        if not ((points >= (-width, -height)) & (points <= (2 * width, 2 * height))).all():
            raise DataError(f"{source}: polygon leaves the {height} x {width} image: {_brief(polygon)}; {_BROKEN}")
        if len(points) >= 3:
            parts.append(points.reshape(-1).tolist())
    if not parts:
        return size, np.array([height * width])
    return parse_rle(coco.merge(coco.frPyObjects(parts, height, width)), source)


def check_size(mask: Size, frame: Size, source: str, warn: Callable[[str], None]) -> None:
    """Accept a mask of the frame's size; one pixel more or less a side (seen in DAVIS 2017) warns, more is an error."""
    if mask == frame:
        return
    sizes = f"{source}: the mask is {mask[1]} x {mask[0]}, its frame {frame[1]} x {frame[0]} (width x height)"
    if abs(mask[0] - frame[0]) > 1 or abs(mask[1] - frame[1]) > 1:
        raise SizeMismatch(f"{sizes}; give masks and frames of one size, or name the video or image in `exclude`")
    warn(f"{sizes}; masks that differ by one pixel are resized (said once per dataset)")


def resize_nearest(mask: np.ndarray, size: Size) -> np.ndarray:
    """Nearest-neighbor resize of a mask [h, w] to `size` = (H, W); the same array where it has that size already."""
    if mask.shape == size:
        return mask
    rows, columns = ((np.arange(new) * old + old // 2) // new for new, old in zip(size, mask.shape, strict=True))
    return mask[rows[:, None], columns[None, :]]


def _unpack_counts(counts: str | bytes, source: str) -> np.ndarray:
    """The string form: little-endian 5-bit groups + 48, bit 5 says more follow, the top bit of the last is the sign;
    from the fourth on, each length is stored as the difference to the one two before."""
    raw = np.frombuffer(counts if isinstance(counts, bytes) else counts.encode("utf-8"), np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(~(raw & 0x20).astype(bool))
    if len(raw) == 0 or (raw < 0).any() or (raw > 63).any() or len(last) == 0 or last[-1] != len(raw) - 1:
        raise DataError(
            f"{source}: cannot read run lengths {_brief(counts)}: empty, cut off or of another coding; {_BROKEN}"
        )
    first = np.concatenate([[0], last[:-1] + 1])
    groups = last - first + 1
    if groups.max() > 8:
        raise DataError(f"{source}: cannot read run lengths {_brief(counts)}: a length of over 40 bits; {_BROKEN}")
    shift = 5 * (np.arange(len(raw)) - np.repeat(first, groups))
    values = np.add.reduceat((raw & 0x1F) << shift, first)
    values -= ((raw[last] & 0x10) != 0).astype(np.int64) << (5 * groups)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
