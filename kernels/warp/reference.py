"""What `sam2fast::warp_image` and `sam2fast::warp_masks` compute, in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STEPS = 256
"""Coordinates are rounded to fractions of this, weights of the four neighbors to fractions of this that sum to 1."""


class Neighbors(NamedTuple):
    """Of each output pixel, [S, S']: whether it lies inside the source, and the source pixels around it."""

    inside: Tensor
    indices: list[Tensor]
    """Four of rows of the source laid one after the other: the pixel, the one right of it, below it, and diagonal."""
    right: Tensor
    below: Tensor
    """int64, the fractions of a coordinate as STEPS-ths."""

    def weights(self) -> list[Tensor]:
        """int64, as STEPS-ths."""
        diagonal = (self.right * self.below + STEPS // 2) // STEPS
        return [STEPS - self.right - self.below + diagonal, self.right - diagonal, self.below - diagonal, diagonal]

    def exact_weights(self) -> list[Tensor]:
        """int64, as (STEPS * STEPS)-ths."""
        left, above = STEPS - self.right, STEPS - self.below
        return [left * above, self.right * above, left * self.below, self.right * self.below]


def neighbors(matrix: Tensor, size: tuple[int, int], shape: tuple[int, int]) -> Neighbors:
    """Of output pixels of `shape` in a source of `size`, both (height, width)."""
    rows, columns = (torch.arange(n, dtype=torch.float64, device=matrix.device) for n in shape)
    inside = torch.ones(shape, dtype=torch.bool, device=matrix.device)
    whole, next_one, fraction = [], [], []
    for slope, length in zip(matrix, (size[1], size[0]), strict=True):
        at = slope[0] * columns + (slope[1] * rows[:, None] + slope[2])
        inside &= (at >= -0.5) & (at < length - 0.5)
        at = at.clamp(0, length - 1)
        whole.append(at.floor().long())
        next_one.append((whole[-1] + 1).clamp(max=length - 1))
        fraction.append(((at - whole[-1]) * STEPS + 0.5).floor().long())
    (x, y), (x1, y1), (right, below) = whole, next_one, fraction
    width = size[1]
    return Neighbors(inside, [y * width + x, y * width + x1, y1 * width + x, y1 * width + x1], right, below)


def warp_image(out: Tensor, image: Tensor, matrix: Tensor, color: Tensor, fill: Tensor) -> None:
    height, width, _ = image.shape
    found = neighbors(matrix, (height, width), tuple(out.shape[1:]))
    straight = matrix[0, 1] == 0 and matrix[1, 0] == 0
    weights, unit = (found.exact_weights(), STEPS**2) if straight else (found.weights(), STEPS)
    pixels = image.reshape(-1, 3)
    sums = sum(weight[..., None] * pixels[index] for weight, index in zip(weights, found.indices, strict=True))
    color = color.double()
    values = (sums.double() / unit) @ color[:, :3].T + color[:, 3]
    values = (values + 0.5).floor().clamp(0, 255).to(torch.uint8)
    out.copy_(torch.where(found.inside[..., None], values, fill).permute(2, 0, 1))


def warp_masks(out: Tensor, codes: Tensor, matrix: Tensor) -> None:
    found = neighbors(matrix, tuple(codes.shape), tuple(out.shape[1:]))
    flat, weights = codes.reshape(-1), found.weights()
    codes_around = [flat[index] for index in found.indices]
    for n in range(len(out)):
        share = sum(weight * (code >> n & 1) for weight, code in zip(weights, codes_around, strict=True))
        out[n] = found.inside & (share >= STEPS // 2)
