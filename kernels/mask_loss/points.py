"""`sampled_mask_loss`: focal and dice on some pixels of each mask, after PointRend: another objective."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import library
from ..masks import upsampling_factor
from .op import MaskLosses, mask_loss
from .reference import focal_elements

OVERSAMPLING = 3
"""Pixels drawn for each one that is kept, to choose the most uncertain from."""
IMPORTANCE = 0.75
"""Share of the kept pixels that are chosen for being uncertain; the others are uniform."""


def sampled_mask_loss(
    logits: Tensor,
    targets: Tensor,
    pred_ious: Tensor | None,
    num_points: int,
    *,
    gamma: float = 2.0,
    alpha: float | None = 0.25,
    iou_loss: Literal["l1", "mse"] = "l1",
    packed: bool = False,
    importance: float = IMPORTANCE,
    generator: torch.Generator | None = None,
    backend: library.Backend = "auto",
) -> MaskLosses:
    """`mask_loss` whose focal and dice are means and sums over `num_points` random pixels of each mask.

    Pixels are drawn with replacement; a share `importance` of them are the most uncertain (lowest |logit|) of three
    times as many (arXiv 1912.08193, section 3.1 and 4.1). That weights the outlines more than the loss over all pixels
    does and makes it random. With an importance of 0 the expectation of focal is that of all pixels; dice is no mean
    and differs anyway. IoU, intersection, union and presence are exact, from all pixels.

    Args:
        generator: of the draw; None is the global one.

    The other arguments, the result and the errors are those of `mask_loss`.
    """
    if num_points < 1:
        raise ValueError(f"num_points must be at least 1, not {num_points}; mask_loss takes all pixels")
    if not 0 <= importance <= 1:
        raise ValueError(f"importance must lie in 0..1, not {importance!r}")
    options = {"gamma": gamma, "alpha": alpha, "iou_loss": iou_loss, "packed": packed, "backend": backend}
    exact = mask_loss(logits.detach(), targets, pred_ious, **options)
    factor = upsampling_factor(logits, targets, packed)
    size = factor * logits.shape[-2], factor * logits.shape[-1]
    with torch.no_grad():
        pixels = _choose_pixels(logits, size, num_points, importance, generator)  # [N, M, P]
    x = _logits_at(logits, pixels, size)
    truth = _targets_at(targets, pixels, size[1], packed)
    p = x.sigmoid()
    return exact._replace(
        focal=focal_elements(x, truth, gamma, -1.0 if alpha is None else alpha).mean(-1),
        dice=1 - (2 * (p * truth).sum(-1) + 1) / (p.sum(-1) + truth.sum(-1) + 1),
    )


def _choose_pixels(
    logits: Tensor, size: tuple[int, int], num_points: int, importance: float, generator: torch.Generator | None
) -> Tensor:
    """Flat indices of pixels at full resolution, int64 [N, M, P]."""

    def draw(count: int) -> Tensor:
        shape = (*logits.shape[:2], count)
        return torch.randint(size[0] * size[1], shape, device=logits.device, generator=generator)

    uncertain = round(importance * num_points)
    drawn = draw(OVERSAMPLING * uncertain)
    certainty = _logits_at(logits, drawn, size).abs()
    chosen = drawn.gather(-1, certainty.topk(uncertain, dim=-1, largest=False).indices)
    return torch.cat([chosen, draw(num_points - uncertain)], dim=-1)


def _logits_at(logits: Tensor, pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Upsampled logits at flat full-resolution indices [N, M, P], at least in float32; [N, M, P]."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    height, width = size
    # Centers of pixels in the coordinates of grid_sample, where the image spans -1 to 1.
    x = (2 * (pixels % width) + 1).to(logits.dtype) / width - 1
    y = (2 * (pixels // width) + 1).to(logits.dtype) / height - 1
    grid = torch.stack([x, y], dim=-1).flatten(0, 1).unsqueeze(2)  # [N M, P, 1, 2]
    planes = logits.flatten(0, 1).unsqueeze(1)
    sampled = F.grid_sample(planes, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.view(pixels.shape)


def _targets_at(targets: Tensor, pixels: Tensor, width: int, packed: bool) -> Tensor:
    """Whether the target has each flat full-resolution index, bool [N, M, P]."""
    objects = torch.arange(len(targets), device=targets.device)[:, None, None]
    x, y = pixels % width, pixels // width
    if packed:
        return (targets[objects, y, x // 8] >> (x % 8)) & 1 != 0
    return targets[objects, y, x] != 0
