"""Augmentation of clips: what is drawn, and one resampling of each frame that changes its colors on the way.

Geometry is one affine map of the pixels of a frame, or a crop and a resize, which are one too: `sam2fast_kernels.warp`
samples it bilinearly, maps colors and writes planes in one pass. An axis that shrinks is area-averaged to its final
density before, because bilinear samples alone would alias: below 3/4 under rotation or shear, always without.

Masks take the same way as numbers 0 and 1, cut at one half, as when the official trainer resizes. They have no texture
to alias, so area averaging starts at a quarter.

Nothing here depends on how it is computed: all that is drawn lies in `Geometry`, color factors and the blur's standard
deviation, so that another renderer can make the same sample of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import cv2
import numpy as np
import torch

from sam2fast_kernels.warp import warp_image, warp_masks
from sam2fast_kernels.warp.op import MASKS_AT_ONCE

from ..config import AugmentConfig

FILL = (124, 116, 104)
"""RGB outside of the image: the ImageNet mean, which normalization turns into 0."""

GRAY = np.array([0.299, 0.587, 0.114])
"""Luma of RGB (ITU-R BT.601), as in torchvision's color transforms."""
_UNCHANGED = np.eye(3, 4, dtype=np.float32)
_FILL = torch.tensor(FILL, dtype=torch.uint8)
PREFILTER_BELOW, MASK_PREFILTER_BELOW = 0.75, 0.25
"""Target pixels per source pixel."""
_BLUR_SIGMA = (0.1, 2.0)
"""Range of the blur's standard deviation in pixels of a 1024-pixel input; it scales with the input."""


@dataclass(frozen=True)
class Mosaic:
    """Two by two cells that all show the same frame of the clip at half the side, each mirrored or not.

    The objects are annotated in one cell only, for the whole clip: the look-alikes in the others must be told apart by
    their place. The paper's second version trains with it (probability 0.1); the official fine-tuning config does not.
    """

    flips: tuple[bool, bool, bool, bool]
    """Cells that are mirrored left to right, row by row."""
    cell: int
    """Number of the cell, row by row, that holds the masks."""


@dataclass(frozen=True)
class Geometry:
    """Map of an image [H, W] onto the square [S, S], the same for the frames and masks of a clip."""

    side: int
    source: tuple[slice, slice]
    """Rows and columns of the image that are used."""
    target: tuple[slice, slice]
    """Rows and columns of the square that they fill."""
    flip: bool = False
    """Mirrors the square, after the crop and resize; `matrix` includes it."""
    matrix: np.ndarray | None = None
    """With rotation or shear, instead of the above: [2, 3], pixel (x, y) of the image to pixel of the square."""
    mosaic: Mosaic | None = None
    """`target` and `matrix` lead to a cell of S/2 then."""

    @property
    def cell(self) -> Geometry:
        """The map onto one cell of the mosaic, or this one where there is none."""
        return replace(self, side=self.side // 2, mosaic=None) if self.mosaic else self

    def affine(self) -> np.ndarray:
        """[2, 3], pixel (x, y) of the image to pixel of the square, or of a cell of the mosaic. (0, 0) is a pixel's
        center."""
        if self.matrix is not None:
            return self.matrix
        rows = []
        for source, target in zip(self.source[::-1], self.target[::-1], strict=True):
            scale = (target.stop - target.start) / (source.stop - source.start)
            rows.append([scale, target.start + (0.5 - source.start) * scale - 0.5])
        (scale_x, shift_x), (scale_y, shift_y) = rows
        if self.flip:
            scale_x, shift_x = -scale_x, self.cell.side - 1 - shift_x
        return np.array([[scale_x, 0, shift_x], [0, scale_y, shift_y]])

    def image(self, image: np.ndarray, colors: np.ndarray = _UNCHANGED, out: np.ndarray | None = None) -> np.ndarray:
        """uint8 [H, W, 3] to planes [3, S, S], those of `out` where it is given; colors are mapped by `color_matrix`
        before."""
        out = np.empty((3, self.side, self.side), np.uint8) if out is None else out
        if self.mosaic:
            cell = self.cell.image(image, colors)
            for place, flip in zip(self._cells(), self.mosaic.flips, strict=True):
                out[:, *place] = cell[..., ::-1] if flip else cell
            return out
        part, sampling = self._prepare(image[self.source], PREFILTER_BELOW if self.matrix is not None else 1.0)
        warp_image(*map(torch.from_numpy, (out, part, sampling, colors)), _FILL)
        return out

    def masks(self, masks: Sequence[np.ndarray | None], out: np.ndarray | None = None) -> np.ndarray:
        """bool [H, W] of each of N objects, None where one is absent, to [N, S, S], that of `out` where it is given."""

        def warp(cell: Geometry, part: slice, target: np.ndarray) -> None:
            cell._warp([None if mask is None else mask[cell.source] for mask in masks[part]], target)

        return self._place(warp, len(masks), out)

    def label_masks(
        self, labels: np.ndarray, numbers: Sequence[int | None], out: np.ndarray | None = None
    ) -> np.ndarray:
        """What `masks` makes of `labels == number`, labels uint8 [H, W], None where an object is absent."""

        def warp(cell: Geometry, part: slice, target: np.ndarray) -> None:
            cell._warp_labels(labels[cell.source], numbers[part], target)

        return self._place(warp, len(numbers), out)

    def _place(
        self, warp: Callable[[Geometry, slice, np.ndarray], None], count: int, out: np.ndarray | None
    ) -> np.ndarray:
        """Fill [count, S, S] with masks, as many at once as a code has bits."""
        out = np.empty((count, self.side, self.side), bool) if out is None else out
        cell = self.cell
        moved = np.empty((count, cell.side, cell.side), bool) if self.mosaic else out
        for first in range(0, count, MASKS_AT_ONCE):
            part = slice(first, first + MASKS_AT_ONCE)
            warp(cell, part, moved[part])
        if self.mosaic:
            out.fill(False)
            flips = self.mosaic.flips[self.mosaic.cell]
            out[:, *self._cells()[self.mosaic.cell]] = moved[..., ::-1] if flips else moved
        return out

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """bool [H, W] to [S, S]."""
        return self.masks([mask])[0]

    def _warp(self, masks: Sequence[np.ndarray | None], out: np.ndarray) -> None:
        """Masks of the part that is used, as in `_warp_labels`."""
        codes = None
        for bit, mask in enumerate(masks):
            if mask is None:
                continue
            part, sampling = self._prepare(np.ascontiguousarray(mask).view(np.uint8), MASK_PREFILTER_BELOW)
            code = part * np.uint8(1 << bit)  # numpy shifts bytes one at a time
            codes = code if codes is None else np.bitwise_or(codes, code, out=codes)
        if codes is None:
            out.fill(False)
        else:
            warp_masks(*map(torch.from_numpy, (out, codes, sampling)))

    def _warp_labels(self, labels: np.ndarray, numbers: Sequence[int | None], out: np.ndarray) -> None:
        shrunk, sampling = self._sampling(labels.shape, MASK_PREFILTER_BELOW)
        if shrunk:
            self._warp([labels == number if number is not None else None for number in numbers], out)
            return
        bits = np.zeros(256, np.uint8)
        for bit, number in enumerate(numbers):
            if number is not None:
                bits[number] |= 1 << bit
        warp_masks(*map(torch.from_numpy, (out, cv2.LUT(labels, bits), sampling)))

    def _cells(self) -> list[tuple[slice, slice]]:
        """Rows and columns of the cells of a mosaic."""
        halves = slice(0, self.side // 2), slice(self.side // 2, self.side)
        return [(rows, columns) for rows in halves for columns in halves]

    def _prepare(self, part: np.ndarray, area_below: float) -> tuple[np.ndarray, np.ndarray]:
        """What is sampled of the part of an image [H, W, ...] that is used, and float64 [2, 3], pixel of the square to
        pixel of that.

        Axes of fewer than `area_below` target pixels a source pixel are area-averaged to one.
        """
        shrunk, sampling = self._sampling(part.shape[:2], area_below)
        return cv2.resize(part, shrunk, interpolation=cv2.INTER_AREA) if shrunk else part, sampling

    def _sampling(self, shape: tuple[int, int], area_below: float) -> tuple[tuple[int, int] | None, np.ndarray]:
        """See `_prepare`, of the part's [H, W]: the size (W, H) that it shrinks to, if it does, and the map. The same
        for all frames and masks of a clip."""
        key = (shape, area_below)
        if key not in self._samplings:
            self._samplings[key] = self._new_sampling(shape, area_below)
        return self._samplings[key]

    @cached_property
    def _samplings(self) -> dict[tuple[tuple[int, int], float], tuple[tuple[int, int] | None, np.ndarray]]:
        return {}

    def _new_sampling(self, shape: tuple[int, int], area_below: float) -> tuple[tuple[int, int] | None, np.ndarray]:
        linear, offset = np.split(self.affine(), [2], axis=1)
        offset = offset[:, 0] + linear @ [self.source[1].start, self.source[0].start]
        size = np.array(shape[::-1])
        density = np.linalg.norm(linear, axis=0)
        shrunk = np.where(density < area_below, np.maximum(1, np.round(size * density)), size).astype(int)
        shrinks = bool((shrunk != size).any())
        if shrinks:
            back = size / shrunk  # pixels of the image per pixel of the smaller one
            linear, offset = linear * back, offset + linear @ (back / 2 - 0.5)
        inverse = np.linalg.inv(linear)
        return tuple(shrunk.tolist()) if shrinks else None, np.column_stack([inverse, -inverse @ offset])


def plain_geometry(size: tuple[int, int], side: int) -> Geometry:
    """Resize of an image [H, W] = `size` to the square; the aspect is not kept, as in the official trainer."""
    whole = slice(0, side)
    return Geometry(side, (slice(0, size[0]), slice(0, size[1])), (whole, whole))


def draw_geometry(config: AugmentConfig, size: tuple[int, int], side: int, rng: np.random.Generator) -> Geometry:
    """Random flip, rotation, shear, resize and crop of an image [H, W] = `size`.

    Larger than the square, the image is cropped at a random place; smaller, it is put at a random place of the square.
    In a mosaic "square" is one of its cells.
    """
    mosaic = None
    if config.mosaic and rng.random() < config.mosaic:
        mosaic = Mosaic(tuple(bool(flip) for flip in rng.random(4) < 0.5), int(rng.integers(4)))
        side //= 2
    geometry = _draw_map(config, size, side, rng)
    return replace(geometry, side=2 * side, mosaic=mosaic) if mosaic else geometry


def _draw_map(config: AugmentConfig, size: tuple[int, int], side: int, rng: np.random.Generator) -> Geometry:
    flip = bool(rng.random() < config.flip)
    scale = rng.uniform(*config.scale)
    place_y, place_x = rng.random(2)
    if config.degrees or config.shear:
        angle = np.deg2rad(rng.uniform(-config.degrees, config.degrees))
        shear = np.tan(np.deg2rad(rng.uniform(-config.shear, config.shear)))
        matrix = _affine(size, side, flip, angle, shear, scale, place_y, place_x)
        return Geometry(side, (slice(0, size[0]), slice(0, size[1])), (slice(0, side), slice(0, side)), matrix=matrix)
    if scale >= 1:
        rows, columns = _span(size[0], round(size[0] / scale), place_y), _span(size[1], round(size[1] / scale), place_x)
        return Geometry(side, (rows, columns), (slice(0, side), slice(0, side)), flip)
    target = _span(side, round(side * scale), place_y), _span(side, round(side * scale), place_x)
    return Geometry(side, (slice(0, size[0]), slice(0, size[1])), target, flip)


def draw_colors(config: AugmentConfig, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """Factors of brightness, contrast and saturation for each frame, [T, 3]: one draw for the clip times one per frame.

    A factor lies in [1 - strength, 1 + strength]; grayscale is a saturation of 0.
    """
    clip = np.array([config.brightness, config.contrast, config.saturation]) * rng.uniform(-1, 1, 3)
    frame = np.array([config.frame_brightness, config.frame_contrast, config.frame_saturation])
    factors = np.maximum(0, 1 + clip) * np.maximum(0, 1 + frame * rng.uniform(-1, 1, (num_frames, 3)))
    if rng.random() < config.grayscale:
        factors[:, 2] = 0
    return factors


def color_matrix(image: np.ndarray, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """Scale an image, then its distance to its mean gray, then that of each pixel to its own gray: float32 [3, 4].

    The three are one map of (R, G, B, 1), so values are rounded and clipped once.

    Args:
        image: uint8 [H, W, 3] RGB, of which the mean is taken.
    """
    mean = brightness * (np.array(cv2.mean(image)[:3]) @ GRAY) if contrast != 1 else 0.0
    matrix = np.column_stack([brightness * contrast * color_mix(saturation), np.full(3, (1 - contrast) * mean)])
    return matrix.astype(np.float32)


def color_mix(saturation: float) -> np.ndarray:
    """Matrix [3, 3] that scales the distance of RGB to its gray."""
    return saturation * np.eye(3) + (1 - saturation) * np.tile(GRAY, (3, 1))


def draw_blur(config: AugmentConfig, side: int, rng: np.random.Generator) -> float:
    """Standard deviation in pixels of the Gaussian blur of a clip; 0 is none."""
    sigma = rng.uniform(*_BLUR_SIGMA) * side / 1024
    return float(sigma) if rng.random() < config.blur else 0.0


def blur(planes: np.ndarray, sigma: float) -> None:
    """Gaussian blur of uint8 [C, H, W] in place; `sigma` in pixels, 0 is none."""
    if sigma > 0:
        for plane in planes:
            cv2.GaussianBlur(plane, (0, 0), sigma, dst=plane)


def _span(whole: int, part: int, place: float) -> slice:
    """`part` of `whole` pixels, at `place` (0 to 1) of the positions it can have."""
    part = min(max(1, part), whole)
    start = int(place * (whole - part + 1))
    return slice(start, start + part)


def _affine(
    size: tuple[int, int],
    side: int,
    flip: bool,
    angle: float,
    shear: float,
    scale: float,
    place_y: float,
    place_x: float,
) -> np.ndarray:
    """Rotation and shear about the image's center at its own aspect, then resize to the square, flip and shift."""
    height, width = size
    rotate = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    resize = np.diag([(-1 if flip else 1) * scale * side / width, scale * side / height])
    linear = resize @ rotate @ np.array([[1, shear], [0, 1]])
    room = abs(scale - 1) * side
    center = side / 2 + room * (np.array([place_x, place_y]) - 0.5)
    # pixel i covers [i, i + 1): centers are half a pixel on, before and after
    offset = center - linear @ (np.array([width, height]) / 2 - 0.5) - 0.5
    return np.column_stack([linear, offset])
