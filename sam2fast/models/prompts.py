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

Points = tuple[Tensor, Tensor]
"""Coordinates float32 [N, P, 2] and labels int32 [N, P] of P points for each of N objects."""

MASK_PROMPT_STRIDE = 4
"""The prompt encoder reads mask prompts at this fraction of the input resolution."""


def is_ambiguous(points: Points | None) -> bool:
    """Whether a prompt may mean the part or the whole, so that three candidate masks are predicted instead of one.

    That is so up to one point; tracking without points counts as 0, a box as 2.
    """
    return points is None or points[1].shape[1] <= 1


def sample_click(truth: Tensor, predicted: Tensor | None, method: Literal["uniform", "center"] = "uniform") -> Points:
    """The next click on each object: where the prediction is wrong, positive on missed pixels, negative on false ones.

    Args:
        truth: bool [N, H, W].
        predicted: bool [N, H, W], or None for a first click, which falls on the object.
        method: `uniform` over all wrong pixels, or the `center` of the error region (see `center_click`).

    Returns:
        One point for each object.
    """
    if predicted is None:
        predicted = torch.zeros_like(truth)
    return uniform_click(truth, predicted) if method == "uniform" else center_click(truth, predicted)


def uniform_click(truth: Tensor, predicted: Tensor) -> Points:
    """A pixel drawn uniformly from all wrong pixels; where none is wrong, a negative click in the background.

    `truth` and `predicted` are bool [N, H, W]. An object that fills the image and is predicted perfectly has neither
    wrong pixels nor background: its click is negative at (0, 0), as in the official trainer.
    """
    wrong = truth ^ predicted
    region = torch.where(wrong.flatten(1).any(1)[:, None, None], wrong, ~truth)
    objects = torch.arange(len(region), device=region.device)
    up_to_row = region.sum(2).cumsum(1)  # [N, H] pixels of the region in this row and above
    count = up_to_row[:, -1:]
    # Double precision: float32 has 2^24 steps, too few to be even over the 2^20 pixels of a 1024 x 1024 mask.
    rank = (torch.rand(count.shape, dtype=torch.float64, device=count.device) * count).long()
    y = torch.searchsorted(up_to_row, rank, right=True).clamp(max=region.shape[1] - 1)
    row = region[objects, y[:, 0]]  # [N, W]
    rank_in_row = rank - (up_to_row.gather(1, y) - row.sum(1, keepdim=True))
    x = torch.searchsorted(row.cumsum(1), rank_in_row, right=True).clamp(max=region.shape[2] - 1)
    x, y = x * (count > 0), y * (count > 0)
    labels = (truth & ~predicted)[objects, y[:, 0], x[:, 0]]
    return torch.stack([x, y], dim=-1).float(), labels[:, None].int()


def center_click(truth: Tensor, predicted: Tensor) -> Points:
    """The pixel deepest inside an error region, that of the false or that of the missed pixels, whichever is deeper.

    `truth` and `predicted` are bool [N, H, W]. This is the click of the RITM benchmark (Sofiiuk et al. 2022, section 4)
    and of SAM's evaluation. Without any error it is negative at (0, 0).
    """
    missed, false = (squared_depth(region).flatten(1).max(dim=1) for region in (truth & ~predicted, predicted & ~truth))
    positive = missed.values > false.values
    index = torch.where(positive, missed.indices, false.indices)
    width = truth.shape[2]
    return torch.stack([index % width, index // width], dim=-1)[:, None].float(), positive[:, None].int()


def squared_depth(region: Tensor, max_elements: int = 2**26) -> Tensor:
    """Squared Euclidean distance of each pixel to the nearest one outside its region (or outside the image).

    Exact and separable (Felzenszwalb and Huttenlocher 2012): d(x, y)^2 = min over x' of (x - x')^2 + v(x', y)^2, where
    v is the distance within a column. Integers below 2^24, so float32 holds them exactly.

    Args:
        region: bool [N, H, W].
        max_elements: bound of the intermediate result, which is built for some rows at a time.

    Returns:
        float32 [N, H, W], 0 outside the region.
    """
    padded = F.pad(region, (1, 1, 1, 1))
    _, height, width = padded.shape
    rows = torch.arange(height, device=region.device)[:, None]
    above = torch.where(padded, -1, rows).cummax(dim=1).values
    below = torch.where(padded, height, rows).flip(1).cummin(dim=1).values.flip(1)
    squared = torch.minimum(rows - above, below - rows).float().square()
    columns = torch.arange(width, device=region.device, dtype=torch.float32)
    across = (columns[:, None] - columns).square()  # [W, W']
    step = max(1, max_elements // (len(region) * width * width))
    depth = [(part[:, :, None, :] + across).amin(dim=-1) for part in squared.split(step, dim=1)]
    return torch.cat(depth, dim=1)[:, 1:-1, 1:-1]


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
