"""Masks of one frame: run lengths, polygons and label images, drawn only for the objects that are asked for.

Run lengths (COCO, cocodataset.org) are read, checked and drawn by `sam2fast_kernels.rle`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from sam2fast_kernels import rle
from sam2fast_kernels.rle import RunLengths

from .augment import MASK_PREFILTER_BELOW, Geometry
from .defects import tolerated
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

    def areas(self) -> tuple[list[int], int]:
        """Pixels of every object as annotated, and of the frame."""
        return list(self._areas.values()), self.size[0] * self.size[1]

    def area(self, object_id: int) -> int:
        """Pixels of an object as annotated, without decoding its mask."""
        return self._areas[object_id]

    def resampled(self, object_ids: Sequence[int], geometry: Geometry, out: np.ndarray | None = None) -> np.ndarray:
        """Objects as a sample has them: bool [O, S, S], that of `out` where it is given, S the side of `geometry`. One
        that is not visible has an empty mask.

        Each is `geometry.mask` of the object's mask. Run lengths make the same square without the mask in between, by
        exact bilinear interpolation, where `geometry` is a crop and resize that does not average areas.
        """
        return geometry.masks([self.get(object_id) for object_id in object_ids], out)


class _LabelMasks(FrameMasks):
    """Masks of an image of object numbers."""

    def __init__(self, size: Size, areas: dict[int, int], labels: np.ndarray):
        super().__init__(size, areas, lambda object_id: labels == object_id)
        self._labels = labels

    def resampled(self, object_ids: Sequence[int], geometry: Geometry, out: np.ndarray | None = None) -> np.ndarray:
        if self._labels.shape != self.size:
            return super().resampled(object_ids, geometry, out)
        return geometry.label_masks(self._labels, [number if number in self else None for number in object_ids], out)


class _RunLengthMasks(FrameMasks):
    """Masks of run lengths."""

    def __init__(self, size: Size, areas: dict[int, int], places: dict[int, tuple[RunLengths, int]]):
        """`places`: where the runs of an object are; objects whose masks have one size share one `RunLengths`."""
        super().__init__(size, areas, self._draw)
        self._places = places

    def resampled(self, object_ids: Sequence[int], geometry: Geometry, out: np.ndarray | None = None) -> np.ndarray:
        places = {row: self._places[number] for row, number in enumerate(object_ids) if number in self}
        if not places or {runs.size for runs, _ in places.values()} != {self.size} or not _is_linear(geometry):
            return super().resampled(object_ids, geometry, out)
        shared = next(iter(places.values()))[0]
        runs = shared.select([number for _, number in places.values()])
        masks = runs.resample(geometry.source, *_target(geometry)).numpy()
        if out is None and len(places) == len(object_ids):
            return masks
        out = np.empty((len(object_ids), *masks.shape[1:]), bool) if out is None else out
        out[list(set(range(len(out))).difference(places))] = False
        out[list(places)] = masks
        return out

    def _draw(self, object_id: int) -> np.ndarray:
        runs, number = self._places[object_id]
        return runs.select([number]).decode()[0].numpy()


def label_masks(labels: np.ndarray, size: Size) -> FrameMasks:
    """Masks of an image of object numbers, uint8 [h, w], 0 for none."""
    counts = cv2.calcHist([labels], [0], None, [256], [0, 256]).ravel()  # 10 times faster than np.bincount
    areas = {int(number): int(counts[number]) for number in np.flatnonzero(counts) if number}
    return _LabelMasks(size, areas, labels)


def run_length_masks(annotations: Mapping[int, tuple[Any, str]], size: Size, warn: Callable[[str], None]) -> FrameMasks:
    """Masks of the COCO run lengths of a frame.

    Everything is checked here, before anything is drawn.

    Args:
        annotations: object id -> `{"size": [h, w], "counts": string or list}` and its source, file and annotation.
        size: of the frame, (H, W).
        warn: gets what `check_size` tolerates.

    Raises:
        DataError: names the source of an annotation and what is wrong with it.
    """
    by_size: dict[Size, list[tuple[int, Any, str]]] = {}
    for object_id, (annotation, source) in annotations.items():
        with tolerated():
            mask_size, counts = _size_and_counts(annotation, source)
            by_size.setdefault(mask_size, []).append((object_id, counts, source))
    areas: dict[int, int] = {}
    places: dict[int, tuple[RunLengths, int]] = {}
    for mask_size, masks in by_size.items():
        runs = rle.parse([counts for _, counts, _ in masks], mask_size)
        for number, (area, (object_id, counts, source)) in enumerate(zip(runs.areas.tolist(), masks, strict=True)):
            with tolerated():
                if number in runs.faults:
                    fault = runs.faults[number]
                    raise DataError(f"{source}: cannot read run lengths {_brief(counts)}: {fault}; {_BROKEN}")
                check_size(mask_size, size, source, warn)
                areas[object_id], places[object_id] = area, (runs, number)
    return _RunLengthMasks(size, areas, places)


def annotated_areas(annotations: Mapping[int, tuple[Any, str]]) -> tuple[list[int], int]:
    """Pixels of the objects of COCO run lengths (see `run_length_masks`) that have any, and of their frame, taken to be
    of the size that the first annotation states."""
    if not annotations:
        return [], 1
    size, _ = _size_and_counts(*next(iter(annotations.values())))
    return run_length_masks(annotations, size, lambda warning: None).areas()


def polygons_to_rle(polygons: Any, size: Size, source: str) -> dict[str, Any]:
    """Rasterize COCO polygons `[[x0, y0, x1, y1, ...], ...]` (their union) as pycocotools does, to run lengths.

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
        return {"size": list(size), "counts": [height * width]}
    return coco.merge(coco.frPyObjects(parts, height, width))


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


def _size_and_counts(annotation: Any, source: str) -> tuple[Size, Any]:
    """The parts of a COCO run-length object."""
    try:
        height, width = (int(value) for value in annotation["size"])
        counts = annotation["counts"]
    except (KeyError, TypeError, ValueError, OverflowError):
        height, width, counts = 0, 0, None
    if not 0 < min(height, width) <= max(height, width) < 2**31:
        raise DataError(
            f"{source}: a run-length mask needs `size` [height, width] and `counts`, got {_brief(annotation)}; "
            f"{_BROKEN}"
        )
    return (height, width), counts


def _is_linear(geometry: Geometry) -> bool:
    """Whether masks are cropped and resized by linear interpolation alone."""
    return geometry.matrix is None and all(
        to.stop - to.start >= MASK_PREFILTER_BELOW * (used.stop - used.start)
        for used, to in zip(geometry.source, geometry.target, strict=True)
    )


def _target(geometry: Geometry) -> tuple[tuple[slice, slice], int, bool]:
    """The part of the square that is filled before the square is mirrored, its side, and whether it is."""
    if geometry.mosaic is None:
        return geometry.target, geometry.side, geometry.flip
    half = geometry.side // 2
    down, across = divmod(geometry.mosaic.cell, 2)
    flip = geometry.flip != geometry.mosaic.flips[geometry.mosaic.cell]
    shifts = half * down, half * (across != flip)  # mirroring the square brings a cell to the other side
    target = tuple(slice(part.start + by, part.stop + by) for part, by in zip(geometry.target, shifts, strict=True))
    return target, geometry.side, flip


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
