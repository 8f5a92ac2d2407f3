"""A sheet that shows what augmentation does: clips of a dataset before, after each augmentation alone, and after all.

Rows are augmentations, columns the first, middle and last frame of clips with their masks, captions what was drawn. An
augmentation that training applies with some probability is always applied here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import cv2
import numpy as np

from ..config import AugmentConfig, MixItem, OcclusionConfig
from .augment import draw_blur, draw_colors, draw_geometry
from .palette import davis_palette
from .render import SamplePlan, render
from .sample import DataError, Dataset
from .sampling import plan_sample

EVERYTHING = AugmentConfig(
    degrees=25, shear=20, frame_brightness=0.1, frame_contrast=0.05, frame_saturation=0.05, grayscale=0.05, mosaic=0.1
)
"""All augmentations of the recipes: shown where no config says which of them are used."""

_OFF = AugmentConfig(flip=0, scale=(1, 1), brightness=0, contrast=0, saturation=0, blur=0)
_ALONE = {
    "flip": ("flip",),
    "crop and resize": ("scale",),
    "rotation and shear": ("degrees", "shear"),
    "color of the clip": ("brightness", "contrast", "saturation"),
    "color of each frame": ("frame_brightness", "frame_contrast", "frame_saturation"),
    "grayscale": ("grayscale",),
    "blur": ("blur",),
    "mosaic": ("mosaic",),
}
_PROBABILITIES = ("flip", "grayscale", "blur", "mosaic")
_CELL, _CAPTION, _GAP = 256, 34, 6


def draw_sheet(
    dataset: Dataset, item: MixItem, augment: AugmentConfig, image_size: int, seed: int = 0, clips: int = 3
) -> np.ndarray:
    """Draw clips of a dataset, the same for the same seed.

    Args:
        item: how clips are cut; nothing is hidden in them.
        augment: which augmentations have a row, and their strengths.
        image_size: side of the square input; cells show it at a quarter of 1024 pixels.

    Returns:
        uint8 [H, W, 3] RGB.

    Raises:
        DataError: a defect of the data, or no video with a visible object.
    """
    rng = np.random.default_rng(seed)
    plans = list(_plain_plans(dataset, item, image_size, rng, clips))
    rows = [np.hstack([_cells(plan, plan, f"before: {plan.record.name}") for plan in plans])]
    for name, config in _rows(augment):
        drawn = [_redrawn(plan, config, rng) for plan in plans]
        rows.append(np.hstack([_cells(new, old, name) for new, old in zip(drawn, plans, strict=True)]))
    if item.reverse:
        turned = [_with_masks(replace(plan, frames=plan.frames[::-1])) for plan in plans]
        rows.append(np.hstack([_cells(new, old, "time reversal") for new, old in zip(turned, plans, strict=True)]))
    return np.vstack(rows)


def _plain_plans(
    dataset: Dataset, item: MixItem, image_size: int, rng: np.random.Generator, clips: int
) -> Iterator[SamplePlan]:
    """Clips of different videos, not augmented, cut down to the frames that are shown."""
    item = item.model_copy(update={"reverse": 0.0, "occlusion": OcclusionConfig()})
    shown = sorted({0, item.frames // 2, item.frames - 1})
    found = 0
    for index in rng.permutation(len(dataset)):
        record = dataset[int(index)]
        if len(record.annotated) <= (item.frames - 1) * item.stride[0]:
            continue
        plan = plan_sample(record, item, _OFF, image_size, rng)
        if plan is not None:
            frames, hidden = ([values[n] for n in shown] for values in (plan.frames, plan.hidden))
            yield replace(plan, frames=frames, hidden=hidden, colors=plan.colors[shown])
            found += 1
        if found == clips:
            return
    if not found:
        raise DataError(
            f"none of the {len(dataset)} videos of dataset {dataset.name!r} has {item.frames} annotated frames and "
            f"shows an object of at most {item.max_area:g} of the frame; check the masks, or lower `frames`"
        )


def _rows(augment: AugmentConfig) -> Iterator[tuple[str, AugmentConfig]]:
    """Each augmentation that is on, alone, then all together; what is random takes place."""
    always = augment.model_copy(update={name: float(getattr(augment, name) > 0) for name in _PROBABILITIES})
    for name, fields in _ALONE.items():
        config = _OFF.model_copy(update={field: getattr(always, field) for field in fields})
        if config != _OFF:
            yield name, config
    mild = {name: min(0.5, getattr(augment, name)) for name in ("grayscale", "mosaic")}
    yield "all", augment.model_copy(update=mild)


def _redrawn(plan: SamplePlan, config: AugmentConfig, rng: np.random.Generator) -> SamplePlan:
    side = plan.geometry.side
    geometry = draw_geometry(config, plan.record.size, side, rng)
    colors, sigma = draw_colors(config, len(plan.frames), rng), draw_blur(config, side, rng)
    return _with_masks(replace(plan, geometry=geometry, colors=colors, sigma=sigma))


def _with_masks(plan: SamplePlan) -> SamplePlan:
    """The plan with the first masks that belong to its first frame and geometry."""
    masks, empty = plan.record.masks(plan.frames[0]), np.zeros(plan.record.size, bool)
    first = {object_id: plan.geometry.mask(masks.get(object_id, empty)) for object_id in plan.first}
    return replace(plan, first=first)


def _cells(plan: SamplePlan, before: SamplePlan, name: str) -> np.ndarray:
    """The frames of a plan side by side, each with its masks and a caption."""
    frames = _painted(plan)
    if name == "blur":  # a fine effect, so half of each cell shows the same pixels without it
        frames = [_halves(sharp, soft, plan) for sharp, soft in zip(_painted(before), frames, strict=True)]
    cells = []
    for position, frame in enumerate(frames):
        cell = np.full((_CELL + _CAPTION + _GAP, _CELL + _GAP, 3), 255, np.uint8)
        cell[:_CELL, :_CELL] = cv2.resize(frame, (_CELL, _CELL), interpolation=cv2.INTER_AREA)
        lines = (f"{name}, frame {plan.frames[position]}", _drawn(plan, position, name))
        for number, line in enumerate(lines, start=1):
            cv2.putText(cell, line, (2, _CELL + 14 * number), cv2.FONT_HERSHEY_SIMPLEX, 0.36, (0, 0, 0), 1, cv2.LINE_AA)
        cells.append(cell)
    return np.hstack(cells)


def _painted(plan: SamplePlan) -> list[np.ndarray]:
    """uint8 [S, S, 3] of each frame, its objects tinted and outlined."""
    sample, colors = render(plan), davis_palette()[1:]
    images = []
    for frame, masks in zip(sample.frames.numpy(), sample.masks.numpy(), strict=True):
        image = np.ascontiguousarray(frame.transpose(1, 2, 0))
        for mask, color in zip(masks, colors, strict=False):
            image[mask] = (0.65 * image[mask] + 0.35 * color).astype(np.uint8)
            outlines, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(image, outlines, -1, color.tolist(), max(1, len(image) // _CELL))
        images.append(image)
    return images


def _halves(sharp: np.ndarray, soft: np.ndarray, plan: SamplePlan) -> np.ndarray:
    """A detail around the first object, pixel by pixel: left as it was, right blurred."""
    rows, columns = np.nonzero(next(iter(plan.first.values())))
    size = min(_CELL // 2, len(sharp))
    top, left = (int(np.clip(axis.mean() - size / 2, 0, len(sharp) - size)) for axis in (rows, columns))
    part = slice(top, top + size), slice(left, left + size)
    both = sharp[part].copy()
    both[:, size // 2 :] = soft[part][:, size // 2 :]
    return cv2.resize(both, (_CELL, _CELL), interpolation=cv2.INTER_NEAREST)


def _drawn(plan: SamplePlan, position: int, name: str) -> str:
    """What was drawn, in the words of the config; empty where nothing was."""
    geometry, parts = plan.geometry, []
    linear = np.diag(np.array(plan.record.size)[::-1] / geometry.cell.side) @ geometry.affine()[:, :2]
    mirrored = np.linalg.det(linear) < 0
    if mirrored:
        parts.append("flip")
    if geometry.matrix is not None:
        across, down = ([-1, 1] if mirrored else [1, 1]) * linear.T
        angle, shear = np.rad2deg([np.arctan2(*across[::-1]), np.arctan(across @ down / (across @ across))])
        parts.append(f"turn {angle:.0f} shear {shear:.0f}")
    elif abs(abs(linear[0, 0]) - 1) > 1e-3:
        parts.append(f"x{abs(linear[0, 0]):.2f}")
    factors = plan.colors[position]
    parts += [f"{letter} {value:.2f}" for letter, value in zip("bcs", factors, strict=True) if abs(value - 1) > 1e-6]
    if plan.sigma:
        parts.append(f"sigma {plan.sigma:.2f} px" + (", right half" if name == "blur" else ""))
    if geometry.mosaic:
        flips = "".join("x" if flip else "-" for flip in geometry.mosaic.flips)
        parts.append(f"masks in cell {geometry.mosaic.cell}, mirrored {flips}")
    return " ".join(parts)
