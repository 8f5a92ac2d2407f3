"""Memory attention: the current frame attends to itself and to the memory bank (SAM 2, arXiv 2408.00714, section 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Attention
from .position import TableCache, apply_rotary, rotary_tables, sine_encoding_2d


class RoPEAttention(Attention):
    """Attention with axial rotary embedding of queries and keys."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tables: tuple[Tensor, Tensor], num_unrotated: int = 0) -> Tensor:
        """q [N, hw, dim] on the grid of `tables`; k, v [N, r hw + num_unrotated, kv_dim]: r such grids, then tokens
        without a place in the image, whose keys are not rotated."""
        q = apply_rotary(self._heads(self.q_proj(q)), *tables)
        k = self._heads(self.k_proj(k))
        if num_unrotated:
            placed, rest = k.split([k.shape[2] - num_unrotated, num_unrotated], dim=2)
            k = torch.cat([apply_rotary(placed, *tables), rest], dim=2)
        else:
            k = apply_rotary(k, *tables)
        return self._attend(q, k, self._heads(self.v_proj(v)))


class MemoryAttentionLayer(nn.Module):
    """Pre-norm block: self-attention, cross-attention to memory, feed-forward."""

    def __init__(self, dim: int, memory_dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = RoPEAttention(dim, 1, dropout=dropout)
        self.cross_attn_image = RoPEAttention(dim, 1, kv_dim=memory_dim, dropout=dropout)
        self.linear1 = nn.Linear(dim, hidden_dim)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(hidden_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.dropout3 = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, tables: tuple[Tensor, Tensor], num_unrotated: int
    ) -> Tensor:
        normed = self.norm1(x)
        x = x + self.dropout1(self.self_attn(normed, normed, normed, tables))
        x = x + self.dropout2(self.cross_attn_image(self.norm2(x), keys, values, tables, num_unrotated))
        return x + self.dropout3(self.linear2(self.dropout(F.relu(self.linear1(self.norm3(x))))))


class MemoryAttention(nn.Module):
    """Conditions the features of a frame on the memories of other frames and on object pointers."""

    def __init__(self, dim: int, memory_dim: int, num_layers: int, dropout: float, hidden_dim: int = 2048) -> None:
        super().__init__()
        self.dim = dim
        self.layers = nn.ModuleList(
            MemoryAttentionLayer(dim, memory_dim, hidden_dim, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self._tables = TableCache()

    def _grid_tables(self, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        def build() -> tuple[Tensor, Tensor, Tensor]:
            position = sine_encoding_2d(self.dim, height, width, device).flatten(1).T  # [hw, dim]
            return 0.1 * position, *rotary_tables(self.dim, height, width, device)

        return self._tables.get((height, width, device), build)

    @torch.no_grad()
    def attend_locally(self, strength: float = 4.0, share: float = 0.25) -> None:
        """Start cross-attention at the same place of the memory, where the object most likely still is.

        Random projections give no place a preference, and learning one takes long. Equal biases b of queries and keys
        add
        sum_p b^2 cos(d theta_p) / sqrt(dim) to the score of two tokens at distance d, a peak at d = 0.

        Args:
            strength: b, on the first entry of each chosen pair.
            share: of each axis' channel pairs that get it, the fastest turning first: slow ones hardly fall with
            distance.
        """
        half = self.dim // 2  # channels of an axis
        chosen = torch.arange(0, int(share * half), 2)
        for layer in self.layers:
            for projection in (layer.cross_attn_image.q_proj, layer.cross_attn_image.k_proj):
                projection.bias[chosen] = strength
                projection.bias[half + chosen] = strength

    def forward(self, features: Tensor, memory: Tensor, memory_position: Tensor, num_pointer_tokens: int) -> Tensor:
        """Condition features [N, dim, h, w] on memory [N, r h w + num_pointer_tokens, memory_dim].

        `memory_position` ([1 or N, same, memory_dim]) is added to the keys alone; pointer tokens come last.
        """
        height, width = features.shape[-2:]
        position, cos, sin = self._grid_tables(height, width, features.device)
        x = features.flatten(2).transpose(1, 2)  # [N, hw, dim]
        x = x + position.to(x.dtype)
        keys = memory + memory_position
        for layer in self.layers:
            x = layer(x, keys, memory, (cos, sin), num_pointer_tokens)
        return self.norm(x).transpose(1, 2).unflatten(-1, (height, width))
