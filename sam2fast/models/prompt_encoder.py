"""Prompt encoder: clicks, box corners and coarse masks (SAM, arXiv 2304.02643, appendix A)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..performance import PerformanceConfig
from .layers import Conv2d, LayerNorm2d, Learned
from .position import FourierEncoding, TableCache
from .upscaling import block


class PromptEncoder(nn.Module):
    """Points become tokens, a coarse mask becomes a map that is added to the image features."""

    def __init__(self, dim: int, mask_channels: int = 16, performance: PerformanceConfig | None = None) -> None:
        super().__init__()
        self.fused_norms = (performance or PerformanceConfig()).fused_norms
        self.pe_layer = FourierEncoding(dim)
        self._tables = TableCache()
        # negative click, positive click, top left corner, bottom right corner
        self.point_embeddings = nn.ModuleList(Learned(1, dim) for _ in range(4))
        self.not_a_point_embed = Learned(1, dim)
        self.mask_downscaling = nn.Sequential(
            Conv2d(1, mask_channels // 4, kernel_size=2, stride=2),
            LayerNorm2d(mask_channels // 4),
            nn.GELU(),
            Conv2d(mask_channels // 4, mask_channels, kernel_size=2, stride=2),
            LayerNorm2d(mask_channels),
            nn.GELU(),
            Conv2d(mask_channels, dim, kernel_size=1),
        )
        self.no_mask_embed = Learned(1, dim)

    def _embed_points(self, coords: Tensor, labels: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Learned of points [N, P, 2] in pixels (x, y); label -1 marks padding."""
        height, width = image_size
        x, y = (coords.float() + 0.5).unbind(-1)  # from the index of a pixel to its center
        position = self.pe_layer(torch.stack([x / width, y / height], dim=-1))
        kinds = torch.cat([self.not_a_point_embed(), *(kind() for kind in self.point_embeddings)])  # [5, dim]
        position = torch.where((labels < 0).unsqueeze(-1), 0.0, position).to(kinds.dtype)
        return position + F.embedding(labels.long() + 1, kinds)

    def forward(
        self,
        points: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        batch: int,
        grid: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """Encode the prompts of `batch` objects on features of `grid` (h, w), stride 16.

        Args:
            points: coordinates [N, P, 2] in pixels of the 16 h x 16 w input and labels [N, P] (1 positive, 0 negative,
                2 and 3 box corners, -1 padding); None is the same as one padding point.
            mask: logits of a coarse mask [N, 1, 4 h, 4 w].

        Returns:
            tokens [N, P + 1, dim], of which the last is padding, and a map [N or 1, dim, h, w].
        """
        num_padding = 1 if points is not None else 2
        coords = self.pe_layer.positional_encoding_gaussian_matrix.new_zeros(batch, num_padding, 2)
        labels = torch.full((batch, num_padding), -1, device=coords.device)
        if points is not None:
            coords, labels = torch.cat([points[0], coords], dim=1), torch.cat([points[1], labels], dim=1)
        sparse = self._embed_points(coords, labels, (16 * grid[0], 16 * grid[1]))
        if mask is None:
            return sparse, self.no_mask_embed()[..., None, None].expand(-1, -1, *grid)
        assert mask.shape == (batch, 1, 4 * grid[0], 4 * grid[1]), f"mask prompt {tuple(mask.shape)} on grid {grid}"
        return sparse, self._embed_mask(mask, grid) if self.fused_norms else self.mask_downscaling(mask)

    def _embed_mask(self, mask: Tensor, grid: tuple[int, int]) -> Tensor:
        """`mask_downscaling`, whose convolutions do not overlap, as matrix products of the blocks of each cell."""
        conv1, norm1, _, conv2, norm2, _, conv3 = self.mask_downscaling
        rows = block(mask, 2).unflatten(2, (4, 4))  # [N, hw, blocks, pixels of a block]
        (weight1, bias1), (weight2, bias2), (weight3, bias3) = conv1(), conv2(), conv3()
        rows = norm1.gelu(F.linear(rows, weight1.flatten(1), bias1)).flatten(2)  # [N, hw, blocks * channels]
        rows = norm2.gelu(F.linear(rows, weight2.permute(0, 2, 3, 1).flatten(1), bias2))
        return F.linear(rows, weight3.flatten(1), bias3).transpose(1, 2).unflatten(2, grid)

    def grid_encoding(self, grid: tuple[int, int]) -> Tensor:
        """Position encoding of the image features [1, dim, h, w], of the same kind as that of points."""
        matrix = self.pe_layer.positional_encoding_gaussian_matrix
        if torch.compiler.is_compiling():
            return self.pe_layer.grid(*grid).unsqueeze(0)
        # It depends on a buffer, which a checkpoint overwrites in place.
        key = (grid, matrix.device, matrix.dtype, id(matrix), matrix._version)
        return self._tables.get(key, lambda: (self.pe_layer.grid(*grid).unsqueeze(0),))[0]
