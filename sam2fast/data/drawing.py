"""Masks drawn over images, and pictures on disk."""

from __future__ import annotations

import colorsys
import os
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np

from .sample import DataError

_WHITE = (255, 255, 255)


def object_color(object_id: int) -> tuple[int, int, int]:
    """A vivid RGB color; steps of the golden ratio along the hue circle keep the first ids far apart."""
    hue = (0.02 + object_id * 0.618034) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.95, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_masks(image: np.ndarray, masks: Mapping[int, np.ndarray], opacity: float = 0.6) -> np.ndarray:
    """`image` (uint8 [H, W, 3] RGB) with each bool mask [H, W] tinted in its object's color and outlined in white.

    The image loses most of its own color, so that what is colorful is a mask. Small masks are drawn over large ones.
    """
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    drawn = (0.25 * image + 0.75 * gray).astype(np.uint8)
    for object_id, mask in sorted(masks.items(), key=lambda entry: -np.count_nonzero(entry[1])):
        tint = np.array(object_color(object_id), np.float32)
        drawn[mask] = (drawn[mask] * (1 - opacity) + tint * opacity).astype(np.uint8)
        contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, contours, -1, _WHITE, max(1, round(min(mask.shape) / 240)))
    return drawn


def shrink_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A bool mask at a smaller size (H, W): pixels mostly of the object, or all that it touches."""
    share = cv2.resize(mask.astype(np.uint8) * 255, size[::-1], interpolation=cv2.INTER_AREA)
    return share > 127 if (share > 127).any() else share > 0


def write_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Save uint8 [H, W, 3] RGB; the file appears when it is whole.

    Raises:
        DataError: the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(cv2.imencode(".png", image[..., ::-1])[1].tobytes())
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; choose a folder that can be written") from None
