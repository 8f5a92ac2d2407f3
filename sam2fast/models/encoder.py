"""Image encoder: the Hiera trunk and the feature pyramid neck of SAM 2."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..performance import PerformanceConfig
from .architecture import Architecture
from .layers import Conv2d, fold_projections
from .trunk import HieraTrunk


class FpnNeck(nn.Module):
    """Projects every stage to one width; the stage of stride 16 also receives the upsampled stage of stride 32."""

    def __init__(self, channels: tuple[int, ...], dim: int) -> None:
        super().__init__()
        # Coarse to fine; the official name of a level is convs.{i}.conv.
        self.convs = nn.ModuleList(
            nn.Sequential(OrderedDict(conv=Conv2d(width, dim, kernel_size=1))) for width in reversed(channels)
        )

    def forward(self, features: list[Tensor], after: Sequence[Conv2d] = ()) -> tuple[Tensor, Tensor, Tensor]:
        """Stage features (fine to coarse) to maps [B, dim, ...] of strides 4, 8 and 16.

        With `after`, the 1 x 1 convolutions to dim' that follow at strides 4 and 8, these two maps are the results of
        both, [B, dim', ...]; maps of width `dim` are never made.
        """
        rows = list(zip(self.convs, reversed(features), strict=True))
        coarse, top = (conv(x) for conv, x in rows[:2])
        if after:
            middle, fine = (
                # Their weights are asked for here, after the trunk: asked for before it, their gradients would be ready
                # after its own, and hold back the all-reduce of all others.
                _project(x, conv.conv(), projection())
                for (conv, x), projection in zip(rows[2:], reversed(after), strict=True)
            )
        else:
            middle, fine = (conv(x) for conv, x in rows[2:])
        # In float32: under autocast this map starts the residual streams of memory attention and mask decoder.
        return fine, middle, top + F.interpolate(coarse.float(), scale_factor=2.0, mode="nearest")


def _project(x: Tensor, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Two 1 x 1 convolutions, each its weight [out, in, 1, 1] and bias [out], of x [B, C, h, w] as one matrix product:
    W2 (W1 x + b1) + b2 = (W2 W1) x + W2 b1 + b2."""
    weight, bias = fold_projections(*((weight.flatten(1), bias) for weight, bias in (first, second)))
    return F.linear(x.permute(0, 2, 3, 1), weight, bias + second[1]).permute(0, 3, 1, 2)


class ImageEncoder(nn.Module):
    """Images to a pyramid of features."""

    def __init__(self, arch: Architecture, performance: PerformanceConfig | None = None) -> None:
        super().__init__()
        self.trunk = HieraTrunk(arch, performance)
        self.neck = FpnNeck(arch.channels, arch.hidden_dim)

    def forward(self, images: Tensor, after: Sequence[Conv2d] = ()) -> tuple[Tensor, Tensor, Tensor]:
        """Normalized images [B, 3, H, W] to maps of strides 4, 8 and 16, each [B, 256, ...]; for `after` see the
        neck."""
        return self.neck(self.trunk(images), after)
