"""Augmentation of clips with OpenCV: one geometric resampling and one color transform per frame.

Crop, resize and flip without rotation become one `cv2.resize` of an integer crop: area averaging along an axis that
shrinks, linear along one that grows. With rotation or shear everything is one affine warp (linear), before which an
axis that shrinks to under 3/4 is area-averaged to its final density, because a warp alone would alias.

Masks take the same way as numbers 0 and 1 and are rounded: a threshold at one half, as when the official trainer
resizes. They have no texture to alias, so area averaging, which is 10 times slower, starts at a quarter.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from ..config import AugmentConfig

FILL = (124, 116, 104)
"""RGB outside of the image: the ImageNet mean, which normalization turns into 0."""

GRAY = np.array([0.299, 0.587, 0.114])
"""Luma of RGB (ITU-R BT.601), as in torchvision's color transforms."""
_PREFILTER_BELOW = 0.75
_BLUR_SIGMA = (0.1, 2.0)
"""Range of the blur's standard deviation in pixels of a 1024-pixel input; it scales with the input."""


@dataclass(frozen=True)
class Geometry:
    """Map of an image [H, W] onto the square [S, S], the same for the frames and masks of a clip."""

    side: int
    source: tuple[slice, slice]
    """Rows and columns of the image that are used."""
    target: tuple[slice, slice]
    """Rows and columns of the square that they fill."""
    flip: bool = False
    matrix: np.ndarray | None = None
    """With rotation or shear, instead of the above: [2, 3], pixel (x, y) of the image to pixel of the square."""

    def image(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] to [S, S, 3]."""
        return self._apply(image, FILL, area_below=1.0)

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """bool [H, W] to [S, S]."""
        return self._apply(np.ascontiguousarray(mask).view(np.uint8), 0, area_below=0.25).view(bool)

    def _apply(self, array: np.ndarray, fill: tuple[int, ...] | int, area_below: float) -> np.ndarray:
        if self.matrix is not None:
            return _warp(array, self.matrix, self.side, fill, min(area_below, _PREFILTER_BELOW))
        rows, columns = self.target
        result = _resize(array[self.source], rows.stop - rows.start, columns.stop - columns.start, area_below)
        if result.shape[:2] != (self.side, self.side):
            border = (rows.start, self.side - rows.stop, columns.start, self.side - columns.stop)
            result = cv2.copyMakeBorder(result, *border, cv2.BORDER_CONSTANT, value=fill)
        return cv2.flip(result, 1) if self.flip else result


def plain_geometry(size: tuple[int, int], side: int) -> Geometry:
    """Resize of an image [H, W] = `size` to the square; the aspect is not kept, as in the official trainer."""
    whole = slice(0, side)
    return Geometry(side, (slice(0, size[0]), slice(0, size[1])), (whole, whole))


def draw_geometry(config: AugmentConfig, size: tuple[int, int], side: int, rng: np.random.Generator) -> Geometry:
    """Random flip, rotation, shear, resize and crop of an image [H, W] = `size`.

    Larger than the square, the image is cropped at a random place; smaller, it is put at a random place of the square.
    """
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


def adjust_colors(image: np.ndarray, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """Scale an image, then its distance to its mean gray, then that of each pixel to its own gray.

    The three are one 3 x 4 matrix, so values are rounded and clipped once, at the end.

    Args:
        image: uint8 [H, W, 3] RGB.
    """
    if brightness == contrast == saturation == 1:
        return image
    mean = brightness * (np.array(cv2.mean(image)[:3]) @ GRAY)
    matrix = np.column_stack([brightness * contrast * color_mix(saturation), np.full(3, (1 - contrast) * mean)])
    return cv2.transform(image, matrix.astype(np.float32))


def color_mix(saturation: float) -> np.ndarray:
    """Matrix [3, 3] that scales the distance of RGB to its gray."""
    return saturation * np.eye(3) + (1 - saturation) * np.tile(GRAY, (3, 1))


def draw_blur(config: AugmentConfig, side: int, rng: np.random.Generator) -> float:
    """Standard deviation in pixels of the Gaussian blur of a clip; 0 is none."""
    sigma = rng.uniform(*_BLUR_SIGMA) * side / 1024
    return float(sigma) if rng.random() < config.blur else 0.0


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur; `sigma` in pixels, 0 is none."""
    return cv2.GaussianBlur(image, (0, 0), sigma) if sigma > 0 else image


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


def _resize(array: np.ndarray, height: int, width: int, area_below: float = 1.0) -> np.ndarray:
    """Area-average the axes that shrink to under `area_below` of their length, then resize linearly."""
    shrunk = tuple(
        new if new < area_below * old else old for new, old in zip((width, height), array.shape[1::-1], strict=True)
    )
    if shrunk != array.shape[1::-1]:
        array = cv2.resize(array, shrunk, interpolation=cv2.INTER_AREA)
    if shrunk != (width, height):
        array = cv2.resize(array, (width, height), interpolation=cv2.INTER_LINEAR)
    return array


def _warp(
    array: np.ndarray, matrix: np.ndarray, side: int, fill: tuple[int, ...] | int, area_below: float
) -> np.ndarray:
    height, width = array.shape[:2]
    density_x, density_y = np.linalg.norm(matrix[:, :2], axis=0)  # target pixels per source pixel
    new_width = max(1, round(width * density_x)) if density_x < area_below else width
    new_height = max(1, round(height * density_y)) if density_y < area_below else height
    if (new_height, new_width) != (height, width):
        array = _resize(array, new_height, new_width)
        back = np.array([width / new_width, height / new_height])  # pixels of the image per pixel of the smaller one
        matrix = np.column_stack([matrix[:, :2] * back, matrix[:, 2] + matrix[:, :2] @ (back / 2 - 0.5)])
    return cv2.warpAffine(
        array, matrix, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=fill
    )
