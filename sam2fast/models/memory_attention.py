"""Memory attention: the current frame attends to itself and to the memory bank (SAM 2, arXiv 2408.00714, section 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam2fast_kernels.dropout import draw_seeds, dropout_add, relu_dropout
from sam2fast_kernels.memory_attention import memory_attention

from ..performance import PerformanceConfig, RecomputePolicy
from .layers import Attention, LayerNorm, Linear, compute_dtype, fold_projections
from .position import TableCache, apply_rotary, rotary_tables, sine_encoding_2d
from .projections import normed_linear
from .recompute import recomputed

KEEP_ALL = RecomputePolicy()
DROPOUTS = 6
"""Of a layer: the weights of both attentions, the three updates, the hidden units."""
Seeds = tuple[Tensor | None, ...]
"""Of the dropouts of a layer; None lets a kernel draw its own."""


class ValueProjection(Linear):
    """Linear map that also takes weighted sums of values, instead of the values themselves."""

    def forward(self, x: Tensor | None = None, row_sum: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x [N, L, in]; with `row_sum` [N, L], the sum of the weights that made x: their sum of projected values."""
        if x is None or row_sum is None:
            return super().forward(x)
        out = F.linear(x, self.weight)
        return torch.addcmul(out, row_sum.to(out.dtype).unsqueeze(-1), self.bias.to(out.dtype))


class RoPEAttention(Attention):
    """Attention of one head with axial rotary embedding of queries and keys."""

    def __init__(
        self, dim: int, kv_dim: int | None = None, dropout: float = 0.0, performance: PerformanceConfig | None = None
    ) -> None:
        super().__init__(dim, 1, kv_dim=kv_dim, dropout=dropout)
        self.v_proj = ValueProjection(kv_dim or dim, dim)
        self.performance = performance or PerformanceConfig()
        self.absorbs = self.performance.absorbed_values and kv_dim is not None and kv_dim < dim
        self.folds = self.absorbs and self.performance.folded_projections

    def forward(
        self,
        x: Tensor,
        norm: LayerNorm | None,
        tables: tuple[Tensor, Tensor],
        memory: tuple[Tensor, Tensor] | None = None,
        num_unrotated: int = 0,
        index: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> Tensor:
        """Attention of x [N, hw, dim], on the grid of `tables`, to itself or to a memory.

        Args:
            norm: of x, if it is to be normalized.
            memory: keys and values [N, r hw + num_unrotated, kv_dim]: r such grids, then tokens without a place in the
                image, whose keys are not rotated.
            index: int64; rows of the result are those of the projected q, k and v at these places, each with dropout of
                its own.
            seed: of the dropout, for the fused kernel.
        """
        q, k, v, key_projection = self._project(x, norm, memory)
        if index is not None:
            q, k, v = (_take(x, index) for x in (q, k, v))
        out, row_sum = self._weighted_sums(q, k, v, key_projection, tables, num_unrotated, seed)
        if self.folds:
            return self._project_sums(out, row_sum)
        return self.out_proj(self.v_proj(out, row_sum) if self.absorbs else out)

    def _project(
        self, x: Tensor, norm: LayerNorm | None, memory: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Queries, keys and values, and what is left to project the keys with."""
        if memory is not None:
            keys, values = memory
            q = project_normalized(x, norm, self.q_proj, self.performance)
            v = values.to(q.dtype) if self.absorbs else self.v_proj(values)
            if self.performance.lean_projections and self.performance.fused_memory_attention:
                weight, bias = self.k_proj()
                return q, keys.to(q.dtype), v, (weight.to(q.dtype), bias.to(q.dtype))
            return q, self.k_proj(keys), v, None
        projections = self.q_proj, self.k_proj, self.v_proj
        if not self.performance.lean_projections:
            x = norm(x) if norm is not None else x
            return *(projection(x) for projection in projections), None
        weights, biases = (torch.cat(lent) for lent in zip(*(layer() for layer in projections), strict=True))
        return *normed_linear(x, norm, weights, biases, parts=3), None

    def _project_sums(self, x: Tensor, row_sum: Tensor) -> Tensor:
        """Value and output projection of sums of memories [N, hw, kv_dim] as one matrix product:
        Wo (Wv x + s bv) + bo = (Wo Wv) x + s Wo bv + bo, s being the sum of the weights [N, hw]."""
        out_proj = self.out_proj()
        weight, value_bias = fold_projections(self.v_proj(), out_proj)
        out = F.linear(x, weight, out_proj[1])
        return torch.addcmul(out, row_sum.to(out.dtype).unsqueeze(-1), value_bias.to(out.dtype))

    def _weighted_sums(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_projection: tuple[Tensor, Tensor] | None,
        tables: tuple[Tensor, Tensor],
        num_unrotated: int,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Sums of the values [N, hw, D] by dropped attention weights, and (where values are absorbed) those of the
        weights [N, hw]."""
        dropout = self.dropout if self.training else 0.0
        if self.performance.fused_memory_attention:
            options = {"num_unrotated": num_unrotated, "dropout": dropout, "seed": seed}
            return memory_attention(q, k, v, rotary=tables, key_projection=key_projection, **options)
        q = apply_rotary(q, *tables)
        if num_unrotated:
            placed, rest = k.split([k.shape[1] - num_unrotated, num_unrotated], dim=1)
            k = torch.cat([apply_rotary(placed, *tables), rest], dim=1)
        else:
            k = apply_rotary(k, *tables)
        width = v.shape[-1]
        if self.absorbs:
            # A column of ones sums the weights; eight, as PyTorch's memory-efficient kernel wants a multiple of them.
            v = F.pad(v, (0, 8), value=1.0)
        out = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), dropout_p=dropout)
        out = out.squeeze(1)
        return (out[..., :width], out[..., width]) if self.absorbs else (out, None)


def project_normalized(x: Tensor, norm: LayerNorm | None, linear: Linear, performance: PerformanceConfig) -> Tensor:
    """`linear` of x, normalized if `norm` is given."""
    if performance.lean_projections:
        return normed_linear(x, norm, *linear())[0]
    return linear(norm(x) if norm is not None else x)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x[index]; of one row only, a view."""
    return x.expand(len(index), *x.shape[1:]) if len(x) == 1 else x[index]


class MemoryAttentionLayer(nn.Module):
    """Pre-norm block: self-attention, cross-attention to memory, feed-forward."""

    def __init__(
        self, dim: int, memory_dim: int, hidden_dim: int, dropout: float, performance: PerformanceConfig
    ) -> None:
        super().__init__()
        self.performance = performance
        self.self_attn = RoPEAttention(dim, dropout=dropout, performance=performance)
        self.cross_attn_image = RoPEAttention(dim, kv_dim=memory_dim, dropout=dropout, performance=performance)
        self.linear1 = Linear(dim, hidden_dim)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(hidden_dim, dim)
        self.norm1 = LayerNorm(dim)
        self.norm2 = LayerNorm(dim)
        self.norm3 = LayerNorm(dim)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.dropout3 = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: tuple[Tensor, Tensor],
        num_unrotated: int,
        index: Tensor | None = None,
        seeds: Seeds = (None,) * DROPOUTS,
    ) -> Tensor:
        """x [N, hw, dim]; with `index` (int64 [N]) x [B, hw, dim], what image each of N objects starts from."""
        x = self._attend_to_itself(x, tables, index, seeds)
        update = self.cross_attn_image(x, self.norm2, tables, (keys, values), num_unrotated, seed=seeds[2])
        x = self._add(x, update, self.dropout2, seeds[3])
        hidden = self._rectify(project_normalized(x, self.norm3, self.linear1, self.performance), seeds[4])
        return self._add(x, self.linear2(hidden), self.dropout3, seeds[5])

    def _attend_to_itself(self, x: Tensor, tables: tuple[Tensor, Tensor], index: Tensor | None, seeds: Seeds) -> Tensor:
        # Without dropout objects of an image differ in nothing so far.
        differs = self.training and self.self_attn.dropout > 0
        out = self.self_attn(x, self.norm1, tables, index=index if differs else None, seed=seeds[0])
        if index is None:
            return self._add(x, out, self.dropout1, seeds[1])
        return self._add(_take(x, index), out if differs else _take(out, index), self.dropout1, seeds[1])

    def _add(self, x: Tensor, update: Tensor, dropout: nn.Dropout, seed: Tensor | None) -> Tensor:
        if self.performance.fused_dropout and self.training and dropout.p > 0:
            return dropout_add(x, update, dropout.p, seed=seed)
        return x + dropout(update)

    def _rectify(self, x: Tensor, seed: Tensor | None) -> Tensor:
        if self.performance.fused_dropout and self.training and self.dropout.p > 0:
            return relu_dropout(x, self.dropout.p, seed=seed)
        return self.dropout(F.relu(x))


class MemoryAttention(nn.Module):
    """Conditions the features of a frame on the memories of other frames and on object pointers."""

    def __init__(
        self,
        dim: int,
        memory_dim: int,
        num_layers: int,
        dropout: float,
        performance: PerformanceConfig,
        hidden_dim: int = 2048,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.dropout = dropout
        self.shares = performance.shared_self_attention
        # All of a layer's random numbers follow from seeds, so that none are drawn when it is computed again.
        self.seeded = performance.fused_dropout and performance.fused_memory_attention
        self.layers = nn.ModuleList(
            MemoryAttentionLayer(dim, memory_dim, hidden_dim, dropout, performance) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self._tables = TableCache()

    def _draw_seeds(self, device: torch.device) -> list[Seeds]:
        """Of every layer, in one draw."""
        if not (self.seeded and self.training and self.dropout > 0):
            return [(None,) * DROPOUTS] * len(self.layers)
        seeds = draw_seeds(DROPOUTS * len(self.layers), device)
        return [seeds[start : start + DROPOUTS] for start in range(0, len(seeds), DROPOUTS)]

    def _grid_tables(self, height: int, width: int, device: torch.device) -> tuple[Tensor, ...]:
        def build() -> tuple[Tensor, ...]:
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

    def forward(
        self,
        features: Tensor,
        memory: Tensor,
        memory_position: Tensor,
        num_pointer_tokens: int,
        index: Tensor | None = None,
        recompute: RecomputePolicy = KEEP_ALL,
    ) -> Tensor:
        """Condition features on the memories of N objects: [N, dim, h, w].

        Args:
            features: [N, dim, h, w] of objects, or with `index` [B, dim, h, w] of images.
            memory: [N, r h w + num_pointer_tokens, memory_dim]; pointer tokens come last.
            memory_position: [1 or N, same, memory_dim], added to the keys alone.
            index: int64 [N], the image of each object.
            recompute: whether the layers' activations are kept.
        """
        height, width = features.shape[-2:]
        position, cos, sin = self._grid_tables(height, width, features.device)
        x = features.flatten(2).transpose(1, 2)  # [B, hw, dim]
        x = x + position.to(x.dtype)
        if index is not None and not self.shares:
            x, index = x[index], None
        # Cast here once, not by autocast in every layer.
        dtype = compute_dtype(memory)
        keys, values = (memory + memory_position).to(dtype), memory.to(dtype)
        for layer, seeds in zip(self.layers, self._draw_seeds(x.device), strict=True):
            run = recomputed(layer, recompute.selective, not self.seeded) if recompute.memory else layer
            x, index = run(x, keys, values, (cos, sin), num_pointer_tokens, index, seeds), None
        return self.norm(x).to(x.dtype).transpose(1, 2).unflatten(-1, (height, width))
