"""Memory encoder: a frame's features and its predicted mask become a memory of 64 channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..performance import PerformanceConfig
from .layers import LayerNorm2d
from .projections import GeluLinear, NormedLinear


class MaskDownSampler(nn.Module):
    """Mask [N, 1, H, W] to [N, dim, H/16, W/16] in four strided convolutions, each four times as wide."""

    def __init__(self, dim: int, fused: bool = True) -> None:
        super().__init__()
        self.fused = fused
        layers: list[nn.Module] = []
        for channels in (1, 4, 16, 64):
            layers += [
                nn.Conv2d(channels, 4 * channels, kernel_size=3, stride=2, padding=1),
                LayerNorm2d(4 * channels),
                nn.GELU(),
            ]
        self.encoder = nn.Sequential(*layers, nn.Conv2d(256, dim, kernel_size=1))

    def forward(self, mask: Tensor) -> Tensor:
        if not self.fused:
            return self.encoder(mask)
        *levels, last = self.encoder
        for conv, norm in zip(levels[::3], levels[1::3], strict=True):
            # Rows of channels in, channels-last out: the next convolution reads and writes that layout.
            mask = norm.gelu(conv(mask).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return last(mask)


class CXBlock(nn.Module):
    """ConvNeXt block (arXiv 2201.03545): depthwise 7x7, norm, 4x wide pointwise MLP, layer scale."""

    def __init__(self, dim: int, layer_scale: float = 1e-6, fused: bool = True) -> None:
        super().__init__()
        self.fused = fused
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = LayerNorm2d(dim)
        self.pwconv1 = (NormedLinear if fused else nn.Linear)(dim, 4 * dim)
        self.pwconv2 = (GeluLinear if fused else nn.Linear)(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            if x.device.type == "cpu":
                # Depthwise, [2, 256, 32, 32] in float32 takes a third of the time so; not measured on a GPU.
                x = x.contiguous(memory_format=torch.channels_last)
            (hidden,) = self.pwconv1(self.dwconv(x).permute(0, 2, 3, 1), self.norm)
            update = self.pwconv2(hidden)
            return torch.addcmul(x.permute(0, 2, 3, 1), self.gamma, update).permute(0, 3, 1, 2)
        out = self.norm(self.dwconv(x)).permute(0, 2, 3, 1)
        out = self.gamma * self.pwconv2(F.gelu(self.pwconv1(out)))
        return x + out.permute(0, 3, 1, 2)


class Fuser(nn.Module):
    """A stack of ConvNeXt blocks."""

    def __init__(self, dim: int, num_layers: int = 2, fused: bool = True) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(CXBlock(dim, fused=fused) for _ in range(num_layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class MemoryEncoder(nn.Module):
    """Fuses mask and features of a frame into its spatial memory."""

    def __init__(self, dim: int, memory_dim: int, performance: PerformanceConfig | None = None) -> None:
        super().__init__()
        fused = (performance or PerformanceConfig()).fused_norms
        self.mask_downsampler = MaskDownSampler(dim, fused)
        self.pix_feat_proj = nn.Conv2d(dim, dim, kernel_size=1)
        self.fuser = Fuser(dim, fused=fused)
        self.out_proj = nn.Conv2d(dim, memory_dim, kernel_size=1)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Features [N, dim, h, w] (not conditioned on memory) and mask [N, 1, 16 h, 16 w]: [N, memory_dim, h, w]."""
        return self.out_proj(self.fuser(self.pix_feat_proj(features) + self.mask_downsampler(mask)))
