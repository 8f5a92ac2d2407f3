"""Image encoder: the Hiera trunk and the feature pyramid neck of SAM 2."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from ..performance import PerformanceConfig
from .architecture import Architecture
from .trunk import HieraTrunk


class FpnNeck(nn.Module):
    """Projects every stage to one width; the stage of stride 16 also receives the upsampled stage of stride 32."""

    def __init__(self, channels: tuple[int, ...], dim: int) -> None:
        super().__init__()
        # Coarse to fine; the official name of a level is convs.{i}.conv.
        self.convs = nn.ModuleList(
            nn.Sequential(OrderedDict(conv=nn.Conv2d(width, dim, kernel_size=1))) for width in reversed(channels)
        )

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Stage features (fine to coarse) to maps [B, dim, ...] of strides 4, 8 and 16."""
        coarse, top, middle, fine = (conv(x) for conv, x in zip(self.convs, reversed(features), strict=True))
        # In float32: under autocast this map starts the residual streams of memory attention and mask decoder.
        return fine, middle, top + F.interpolate(coarse.float(), scale_factor=2.0, mode="nearest")


class ImageEncoder(nn.Module):
    """Images to a pyramid of features."""

    def __init__(self, arch: Architecture, performance: PerformanceConfig | None = None) -> None:
        super().__init__()
        self.trunk = HieraTrunk(arch, performance)
        self.neck = FpnNeck(arch.channels, arch.hidden_dim)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalized images [B, 3, H, W] to maps of strides 4, 8 and 16, each [B, 256, ...]."""
        return self.neck(self.trunk(images))
