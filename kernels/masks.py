"""Ground-truth masks as the operators take them: bool, uint8, or eight pixels to a byte."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_masks(masks: Tensor) -> Tensor:
    """Masks [..., H, W] (bool, or uint8 with foreground not 0) to bits: uint8 [..., H, ceil(W / 8)].

    Pixel x of a row is bit x % 8 (lowest first) of byte x // 8; bits behind the last pixel are 0.
    """
    bits = F.pad((masks != 0).to(torch.uint8), (0, -masks.shape[-1] % 8)).unflatten(-1, (-1, 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=masks.device)
    return (bits * weights).sum(-1, dtype=torch.uint8)


def unpack_masks(packed: Tensor, width: int) -> Tensor:
    """The inverse of `pack_masks`: uint8 [..., H, ceil(W / 8)] to bool [..., H, W], W = `width` pixels."""
    if not 8 * packed.shape[-1] - 8 < width <= 8 * packed.shape[-1]:
        raise ValueError(f"packed masks of {packed.shape[-1]} bytes a row cannot be {width} pixels wide")
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :width].bool()


def upsampling_factor(logits: Tensor, targets: Tensor, packed: bool) -> int:
    """How many pixels of targets [N, H, W] (packed: [N, H, ceil(W / 8)]) one of logits [N, ..., h, w] spans a side.

    Raises:
        ValueError: dtypes, devices or shapes that do not go together.
    """
    if not logits.is_floating_point() or logits.dim() < 3:
        raise ValueError(f"logits must be floating point [N, ..., h, w], not {logits.dtype} {list(logits.shape)}")
    if 0 in logits.shape[-2:]:
        raise ValueError(f"logits have no pixels: {list(logits.shape)}; h and w must be at least 1")
    if targets.dtype not in ((torch.uint8,) if packed else (torch.bool, torch.uint8)) or targets.dim() != 3:
        want = "packed targets must be uint8 [N, H, ceil(W/8)]" if packed else "targets must be bool or uint8 [N, H, W]"
        raise ValueError(f"{want}, not {targets.dtype} {list(targets.shape)}")
    if logits.device != targets.device:
        raise ValueError(f"logits are on {logits.device}, targets on {targets.device}: move one of them")
    n, (low_height, low_width) = logits.shape[0], logits.shape[-2:]
    factor = targets.shape[1] // max(1, low_height)
    columns = -(-factor * low_width // 8) if packed else factor * low_width
    if factor < 1 or tuple(targets.shape) != (n, factor * low_height, columns):
        expected = "[N, s * h, ceil(s * w / 8)]" if packed else "[N, s * h, s * w]"
        raise ValueError(
            f"targets {list(targets.shape)} do not fit logits {list(logits.shape)}: they must be {expected} for one "
            "whole number s; resize the masks first"
        )
    return factor
