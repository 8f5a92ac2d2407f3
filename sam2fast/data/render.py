"""Plans of samples to tensors: decode the frames and masks that are wanted, augment them once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .augment import FILL, Geometry, blur, color_matrix
from .sample import Sample, VideoRecord


@dataclass(frozen=True)
class SamplePlan:
    """All that is drawn of a sample of T frames; its frames and later masks are not decoded yet."""

    record: VideoRecord
    frames: list[int]
    """Frame numbers of the record in the order in which the clip plays them."""
    hidden: list[bool]
    """Frames whose image is blanked (occlusion training)."""
    geometry: Geometry
    colors: np.ndarray
    """Factors of brightness, contrast and saturation, [T, 3]."""
    sigma: float
    """Standard deviation of the blur in pixels; 0 is none."""
    first: dict[int, np.ndarray]
    """Object id -> bool [S, S] in the first frame, where all objects of the sample are visible."""
    sample_id: str


def render(plan: SamplePlan) -> Sample:
    """Decode and augment.

    Raises:
        DataError: a file of the record is damaged.
    """
    return Sample(frames=_frames(plan), masks=render_masks(plan), object_ids=list(plan.first), sample_id=plan.sample_id)


def _frames(plan: SamplePlan) -> torch.Tensor:
    """uint8 [T, 3, S, S]; hidden frames are of one color and not decoded."""
    side = plan.geometry.side
    out = np.empty((len(plan.frames), 3, side, side), np.uint8)
    shown = [position for position, hidden in enumerate(plan.hidden) if not hidden]
    images = plan.record.frames([plan.frames[position] for position in shown])
    for position, image in zip(shown, images, strict=True):
        plan.geometry.image(image, color_matrix(image, *plan.colors[position]), out[position])
        blur(out[position], plan.sigma)
    for position in set(range(len(out))).difference(shown):
        out[position] = np.array(FILL, np.uint8)[:, None, None]
    return torch.from_numpy(out)


def render_masks(plan: SamplePlan) -> torch.Tensor:
    """bool [T, O, S, S]; objects are absent from hidden frames."""
    side = plan.geometry.side
    out = np.empty((len(plan.frames), len(plan.first), side, side), bool)
    out[0] = list(plan.first.values())
    for position, frame in enumerate(plan.frames[1:], start=1):
        if plan.hidden[position]:
            out[position] = False
        else:
            plan.record.masks(frame).resampled(list(plan.first), plan.geometry, out[position])
    return torch.from_numpy(out)
