"""Synthetic objects for benchmarks: smooth regions with noisy predictions, so that no loop sees constant data."""

from __future__ import annotations

import torch
from torch import Tensor

from .case import FACTOR, Shape


def discs(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits float32 [N, M, h, w] of noisy discs, and targets bool [N, H, W], each a disc nearby.

    From three objects on, the target of the first is empty and that of the last is full.
    """
    generator = torch.Generator().manual_seed(0)
    center = 0.25 + 0.5 * torch.rand(shape.objects, 1, 2, generator=generator)  # as shares of the image
    radius = 0.05 + 0.25 * torch.rand(shape.objects, 1, generator=generator)
    moved = center + 0.03 * torch.randn(shape.objects, shape.candidates, 2, generator=generator)
    logits = 40 * (radius[..., None, None] - _distance(moved, shape.side))
    logits = logits + 2 * torch.randn(logits.shape, generator=generator)
    if shape.objects >= 3:
        radius[0], radius[-1] = 0, 2
    targets = [_distance(c, FACTOR * shape.side)[0] < r for c, r in zip(center, radius, strict=True)]
    return logits.to(device), torch.stack(targets).to(device)


def moving_discs(num_frames: int, objects: int, side: int) -> Tensor:
    """Masks bool [T, N, H, W] of discs that drift to the right, all of them visible in every frame."""
    generator = torch.Generator().manual_seed(0)
    start = 0.25 + 0.4 * torch.rand(objects, 2, generator=generator)
    radius = 0.05 + 0.15 * torch.rand(objects, 1, 1, generator=generator)
    frames = [_distance(start + torch.tensor([0.01 * t, 0.0]), side) < radius for t in range(num_frames)]
    return torch.stack(frames)


def _distance(center: Tensor, side: int) -> Tensor:
    """Distance of each pixel center to the points [..., 2], as a share of the side: [..., side, side]."""
    axis = (torch.arange(side) + 0.5) / side
    return torch.hypot(axis - center[..., :1, None], axis[:, None] - center[..., 1:, None])
