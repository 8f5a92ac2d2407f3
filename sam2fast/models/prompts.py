"""Prompts that a simulated user gives: clicks, boxes and coarse masks, drawn from ground-truth masks.

Everything runs as torch operations on the device of the masks and never waits for it. Randomness comes from the global
generator of torch. Coordinates are (x, y) in pixels of the mask; labels are 1 for a positive click, 0 for a negative
one, 2 and 3 for the top left and the bottom right corner of a box.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sam2fast_kernels.click_sampling import center_click, uniform_click

Points = tuple[Tensor, Tensor]
"""Coordinates float32 [N, P, 2] and labels int32 [N, P] of P points for each of N objects."""

MASK_PROMPT_STRIDE = 4
"""The prompt encoder reads mask prompts at this fraction of the input resolution."""


def is_ambiguous(points: Points | None) -> bool:
    """Whether a prompt may mean the part or the whole, so that three candidate masks are predicted instead of one.

    That is so up to one point; tracking without points counts as 0, a box as 2.
    """
    return points is None or points[1].shape[1] <= 1


def sample_click(truth: Tensor, logits: Tensor | None, method: Literal["uniform", "center"] = "uniform") -> Points:
    """The next click on each object: where the prediction is wrong, positive on missed pixels, negative on false ones.

    Args:
        truth: bool [N, H, W].
        logits: predicted, [N, h, w] or [N, 1, h, w] at the same or a lower resolution; None for a first click, which
            falls on the object.
        method: `uniform` over all wrong pixels, or the `center` of the error region (see sam2fast_kernels).

    Returns:
        One point for each object.
    """
    return uniform_click(truth, logits) if method == "uniform" else center_click(truth, logits)


def mask_to_box(masks: Tensor) -> Tensor:
    """Inclusive bounding boxes (x0, y0, x1, y1) in pixels, int64 [N, 4], of masks bool [N, H, W].

    An empty mask has the box (W, H, -1, -1), as in the official code.
    """
    edges = []
    for occupied in (masks.any(dim=1), masks.any(dim=2)):  # along x, then along y
        index = torch.arange(occupied.shape[1], device=masks.device)
        edges.append((torch.where(occupied, index, len(index)).amin(1), torch.where(occupied, index, -1).amax(1)))
    (left, right), (top, bottom) = edges
    return torch.stack([left, top, right, bottom], dim=1)


def sample_box(masks: Tensor, noise: float, bound: float) -> Points:
    """The two corners of a box around each mask, each coordinate moved by uniform noise.

    Args:
        masks: bool [N, H, W].
        noise: largest shift as a share of the width or height of the box; 0 gives the exact box.
        bound: largest shift in pixels.

    Returns:
        Two points for each object, with labels 2 and 3. An empty mask has no box: its corners are out of order.
    """
    boxes = mask_to_box(masks).float()
    if noise > 0:
        size = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        shift = (2 * torch.rand_like(boxes) - 1) * (size * noise).clamp(max=bound)
        height, width = masks.shape[1:]
        x, y = (boxes + shift).view(-1, 2, 2).unbind(-1)
        boxes = torch.stack([x.clamp(0, width - 1), y.clamp(0, height - 1)], dim=-1)
    labels = torch.arange(2, 4, dtype=torch.int32, device=masks.device)
    return boxes.view(-1, 2, 2), labels.expand(len(masks), 2)


def coarse_mask(masks: Tensor, noise: float, bound: float, max_radius: int = 4) -> Tensor:
    """A sloppy drawing of each mask as a mask prompt: details lost or gaps filled, and shifted.

    Each object is opened or closed (morphology) with a random radius, then shifted like a corner of `sample_box`. An
    object that opening would erase keeps its shape.

    Args:
        masks: bool [N, H, W].
        noise: largest shift as a share of the width or height of the object, and largest radius as a share of the
            square root of its area; 0 only lowers the resolution.
        bound: largest shift in pixels of the mask.
        max_radius: largest radius in pixels of the prompt.

    Returns:
        Logits of -10 and 10, float32 [N, 1, H/4, W/4].
    """
    shape = (len(masks), 1, 1, 1)
    share = F.avg_pool2d(masks[:, None].float(), MASK_PROMPT_STRIDE)
    small = share >= share.flatten(1).amax(1).clamp(1e-6, 0.5).view(shape)  # also objects smaller than half a pixel
    opening = torch.rand(shape, device=masks.device) < 0.5
    limit = (noise * small.flatten(1).sum(1).sqrt()).clamp(max=max_radius).view(shape)
    radius = (torch.rand(shape, device=masks.device) * limit).round()
    # Opening is the closing of the complement.
    changed = _close((small ^ opening).float(), radius, max_radius) > 0.5
    changed = changed ^ opening
    changed = torch.where(changed.flatten(1).any(1).view(shape), changed, small)[:, 0]
    boxes = mask_to_box(changed).float()
    limit = ((boxes[:, 2:] - boxes[:, :2]) * noise).clamp(0, bound / MASK_PROMPT_STRIDE)
    shift = ((2 * torch.rand_like(limit) - 1) * limit).round().long()
    return _shift(changed, shift)[:, None] * 20.0 - 10.0


def _close(masks: Tensor, radius: Tensor, max_radius: int) -> Tensor:
    """Dilate, then erode, each mask float [N, 1, h, w] by its own radius [N, 1, 1, 1] with a square of side 2 r + 1."""
    for sign in (1, -1):
        for step in range(1, max_radius + 1):
            grown = sign * F.max_pool2d(sign * masks, 3, stride=1, padding=1)
            masks = torch.where(radius >= step, grown, masks)
    return masks


def _shift(masks: Tensor, shift: Tensor) -> Tensor:
    """Move masks bool [N, h, w] by (dx, dy) int64 [N, 2]; what enters from outside is empty."""
    count, height, width = masks.shape
    x = torch.arange(width, device=masks.device) - shift[:, :1]  # [N, w] where each column comes from
    y = torch.arange(height, device=masks.device) - shift[:, 1:]
    inside = ((x >= 0) & (x < width))[:, None, :] & ((y >= 0) & (y < height))[:, :, None]
    objects = torch.arange(count, device=masks.device)[:, None, None]
    return masks[objects, y.clamp(0, height - 1)[:, :, None], x.clamp(0, width - 1)[:, None, :]] & inside
