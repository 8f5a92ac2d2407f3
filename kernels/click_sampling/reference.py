"""Ground truth of the click operators: upsample everything, then look for the pixel. Any dtype, any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..mask_loss.reference import upsample
from ..masks import unpack_masks


def click_uniform(logits: Tensor, targets: Tensor, packed: bool, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """A wrong pixel of each object; where none is wrong, one of the background; (0, 0) where there is none either.

    Args:
        logits: [N, h, w].
        targets: [N, H, W], or packed.
        uniform: float64 [N] in [0, 1); of the `count` pixels, row by row, it takes number floor(uniform * count).

    Returns:
        (x, y) int64 [N, 2], and bool [N]: whether the pixel is one that the prediction missed.
    """
    truth, predicted = full_resolution(logits, targets, packed)
    wrong = truth ^ predicted
    region = torch.where(wrong.flatten(1).any(1)[:, None, None], wrong, ~truth)
    objects = torch.arange(len(region), device=region.device)
    up_to_row = region.sum(2).cumsum(1)  # [N, H] pixels of the region in this row and above
    count = up_to_row[:, -1:]
    # The product may round up to the count. An empty region has rank -1, which every row and column is beyond.
    rank = torch.minimum((uniform[:, None] * count).long(), count - 1)
    y = torch.searchsorted(up_to_row, rank, right=True)
    row = region[objects, y[:, 0]]  # [N, W]
    rank_in_row = rank - (up_to_row.gather(1, y) - row.sum(1, keepdim=True))
    x = torch.searchsorted(row.cumsum(1), rank_in_row, right=True)
    return torch.cat([x, y], dim=1), (truth & ~predicted)[objects, y[:, 0], x[:, 0]]


def click_center(logits: Tensor, targets: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    """The pixel deepest inside the missed or the false pixels of each object; see `click_uniform` for the rest."""
    truth, predicted = full_resolution(logits, targets, packed)
    missed, false = (squared_depth(region).flatten(1).max(dim=1) for region in (truth & ~predicted, predicted & ~truth))
    positive = missed.values > false.values
    index = torch.where(positive, missed.indices, false.indices)
    width = truth.shape[2]
    return torch.stack([index % width, index // width], dim=-1), positive


def full_resolution(logits: Tensor, targets: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    """Truth and prediction, bool [N, H, W] both."""
    predicted = upsample(logits[:, None], targets.shape[1])[:, 0] > 0
    return (unpack_masks(targets, predicted.shape[2]) if packed else targets != 0), predicted


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
    step = max(1, max_elements // max(1, len(region) * width * width))
    depth = [(part[:, :, None, :] + across).amin(dim=-1) for part in squared.split(step, dim=1)]
    return torch.cat(depth, dim=1)[:, 1:-1, 1:-1]
