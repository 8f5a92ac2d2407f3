"""Surfaces of the synthetic scenes: vivid two-colour patterns for objects, muted clutter for backgrounds."""

from __future__ import annotations

import colorsys

import cv2
import numpy as np

PATTERNS = ("noise", "stripes", "checker", "dots")


def value_noise(rng: np.random.Generator, height: int, width: int, cell: float, octaves: int = 3) -> np.ndarray:
    """Smooth random field, float32 [height, width] in [0, 1]; `cell` is the size in pixels of the coarsest detail."""
    field = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        step = max(1.0, cell / 2**octave)
        grid = rng.random((int(height / step) + 2, int(width / step) + 2), dtype=np.float32)
        field += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC) / 2**octave
    low, high = float(field.min()), float(field.max())
    return (field - low) / max(high - low, 1e-6)


def object_texture(rng: np.random.Generator, side: int, hue: float) -> np.ndarray:
    """A vivid pattern of two colours near `hue` (0 to 1), uint8 [side, side, 3] RGB.

    Both colours are saturated where backgrounds are not, so that even a very small network can tell an object apart.
    """
    bright = _rgb(hue, rng.uniform(0.75, 1.0), rng.uniform(0.8, 1.0))
    if rng.random() < 0.5:
        second = _rgb(hue + rng.uniform(-0.04, 0.04), rng.uniform(0.8, 1.0), rng.uniform(0.35, 0.55))
    else:
        second = _rgb(hue + rng.uniform(-0.04, 0.04), rng.uniform(0.4, 0.5), 1.0)
    weight = _pattern(rng, side)[..., None]
    grain = 0.92 + 0.16 * (value_noise(rng, side, side, 8.0, octaves=2)[..., None] - 0.5)
    return np.clip((bright * (1 - weight) + second * weight) * grain, 0, 255).astype(np.uint8)


def background_texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Three muted colours mixed by noise, with unannotated shapes as clutter, uint8 [height, width, 3] RGB."""
    level = rng.uniform(0.3, 0.7)
    colors = [
        _rgb(rng.random(), rng.uniform(0.05, 0.25), np.clip(level + offset, 0.1, 0.9))
        for offset in rng.permutation([-0.3, 0.0, 0.3]) * rng.uniform(0.6, 1.0)
    ]
    cell = 0.3 * min(height, width)
    first, second = (value_noise(rng, height, width, cell, octaves=4)[..., None] for _ in range(2))
    canvas = colors[0] * (1 - first) + (colors[1] * (1 - second) + colors[2] * second) * first
    grain = 0.88 + 0.24 * value_noise(rng, height, width, 6.0, octaves=2)[..., None]
    canvas = np.ascontiguousarray(np.clip(canvas * grain, 0, 255).astype(np.uint8))
    for _ in range(rng.integers(6, 13)):
        center = rng.random(2) * (width, height)
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(4, 9)))
        radii = rng.uniform(0.03, 0.12) * min(height, width) * rng.uniform(0.6, 1.4, len(angles))
        points = center + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        color = _rgb(rng.random(), rng.uniform(0.05, 0.3), np.clip(level + rng.uniform(-0.3, 0.3), 0.08, 0.92))
        cv2.fillPoly(canvas, [np.round(points * 16).astype(np.int32)], color.tolist(), cv2.LINE_AA, shift=4)
    return canvas


def _pattern(rng: np.random.Generator, side: int) -> np.ndarray:
    """Weight of the second colour, float32 [side, side] in [0, 1], with soft edges."""
    kind = PATTERNS[rng.integers(len(PATTERNS))]
    if kind == "noise":
        field = value_noise(rng, side, side, side / 4, octaves=2) - 0.5
        return np.clip(field * 8 + 0.5, 0, 1)
    y, x = np.mgrid[:side, :side].astype(np.float32)
    wave = 2 * np.pi / (side * rng.uniform(0.14, 0.26))
    angle = rng.uniform(0, np.pi)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    if kind == "stripes":
        field = np.sin(u * wave)
    elif kind == "checker":
        field = np.sin(u * wave) * np.sin(v * wave) * 2
    else:
        field = (np.sin(u * wave) + np.sin(v * wave) - 1) * 1.5
    return np.clip(field * 2 + 0.5, 0, 1)


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), np.float32) * 255
