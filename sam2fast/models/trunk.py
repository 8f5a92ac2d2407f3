"""Hiera, the trunk of SAM 2's image encoder: timm's architecture and parameters under a leaner forward pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from .. import compat  # noqa: F401  must come before timm, which imports torchvision
from ..performance import PerformanceConfig, RecomputePolicy
from .architecture import Architecture
from .layers import Linear
from .position import TableCache
from .projections import GeluLinear, NormedLinear, adopt, adopt_norm
from .recompute import recomputed
from .windows import WindowGroup, WindowLayout, max_pool

from timm.layers import DropPath  # isort: skip
from timm.models.hieradet_sam2 import HieraDet, MultiScaleBlock  # isort: skip

Kept = Tensor | None
"""What stochastic depth does to a branch. int64 [K]: it runs on these samples alone. Floating point [B, 1, 1]: it runs
on all and is multiplied by this, 0 or the scale. None: it runs on all, and its module of stochastic depth masks it."""


class HieraTrunk(HieraDet):
    """Hiera (arXiv 2306.00989) as SAM 2 uses it, without the classifier.

    With `performance.unpadded_windows` the tokens stay in the order of attention windows through all blocks that share
    a grid of windows, and window attention neither projects nor stores the padding: its tokens are zero before the
    projection, so a key and a value made of the biases stand for all of them.

    With `performance.skip_dropped_paths` stochastic depth runs a branch on the samples that keep it. Torch's CPU
    generator draws them, so that their number is known without waiting for the device. Where sizes must not vary from
    step to step, and for fake tensors, it multiplies by masks instead, which the generator of the device draws.
    """

    recompute = RecomputePolicy()
    """Whether the backward pass computes the inside of every block again instead of keeping its activations."""
    fixed_sizes = False
    """Whether sizes must not vary from step to step, as blocks are compiled or steps recorded."""
    stream_dtype: torch.dtype | None = None
    """Of the tokens between blocks; None leaves what autocast makes of them, float32."""

    def __init__(self, arch: Architecture, performance: PerformanceConfig | None = None) -> None:
        super().__init__(
            num_classes=0,
            embed_dim=arch.embed_dim,
            num_heads=arch.num_heads,
            stages=arch.stages,
            global_pos_size=arch.position_size,
            window_spec=arch.window_sizes,
            global_att_blocks=arch.global_attention_blocks,
            drop_path_rate=arch.drop_path,
        )
        self.head = nn.Identity()
        self.performance = performance or PerformanceConfig()
        self._tables = TableCache()
        switches = self.performance
        self.is_lean = switches.unpadded_windows or switches.skip_dropped_paths or switches.lean_projections
        if self.is_lean:
            self.blocks = nn.Sequential(*(TrunkBlock(block, self.performance) for block in self.blocks))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features [B, C_i, H_i, W_i] of the four stages, strides 4 to 32, of images [B, 3, H, W].

        Raises:
            ValueError: a side of the images is no multiple of 32.
        """
        if images.shape[-2] % 32 or images.shape[-1] % 32:
            raise ValueError(
                f"both sides of an image must be multiples of 32, got {list(images.shape[-2:])}; resize it"
            )
        if not self.is_lean:
            self.grad_checkpointing = self.recompute.trunk and torch.is_grad_enabled()
            return self.forward_intermediates(images, stop_early=False, intermediates_only=True)
        grid = self.patch_embed(images)
        layout = WindowLayout(
            *grid.shape[1:3], window=self.blocks[0].window if self.performance.unpadded_windows else 0
        )
        position = self._pos_embed(grid.new_zeros(1, *grid.shape[1:3], 1))
        x = layout.to_tokens(grid) + layout.to_tokens(position)
        x = x if self.stream_dtype is None else x.to(self.stream_dtype)
        features = []
        for index, (block, kept) in enumerate(zip(self.blocks, self._draw_kept(images), strict=True)):
            x, layout = self._arrange(x, layout, block)
            run = block
            if self.recompute.trunk:
                # Nothing in a block is random but timm's stochastic depth, which its module draws.
                run = recomputed(block, self.recompute.selective, random=not self.performance.skip_dropped_paths)
            x = run(x, layout, *kept)
            layout = layout.pooled() if block.pools else layout
            if index in self.stage_ends:
                features.append(layout.to_grid(x).permute(0, 3, 1, 2))
        return features

    def _arrange(self, x: Tensor, layout: WindowLayout, block: TrunkBlock) -> tuple[Tensor, WindowLayout]:
        """Tokens in an order that the block can work in; most often they are already."""
        if not self.performance.unpadded_windows or block.window in (0, layout.window):
            return x, layout  # attention over the whole image takes any order
        target = WindowLayout(layout.height, layout.width, block.window)
        return target.to_tokens(layout.to_grid(x)), target

    def _draw_kept(self, images: Tensor) -> list[tuple[Kept, Kept]]:
        """For the two branches of every block, the samples that stochastic depth keeps."""
        drops = [drop for block in self.blocks for drop in (block.drop_path1, block.drop_path2)]
        rates = [drop.drop_prob if isinstance(drop, DropPath) and drop.training else 0.0 for drop in drops]
        if not (self.performance.skip_dropped_paths and any(rates)):
            return [(None, None)] * len(self.blocks)
        if self.fixed_sizes or torch.compiler.is_compiling() or isinstance(images, FakeTensor):
            masks = self._draw_masks(tuple(rates), images)
            return list(zip(masks[::2], masks[1::2], strict=True))
        draws = torch.rand(len(rates), len(images), device="cpu")
        keep = draws >= torch.tensor(rates, device="cpu").unsqueeze(1)
        kept = keep.nonzero()[:, 1]
        if images.is_cuda:
            kept = kept.pin_memory()
        branches = kept.to(images.device, non_blocking=True).split(keep.sum(dim=1).tolist())
        return list(zip(branches[::2], branches[1::2], strict=True))

    def _draw_masks(self, rates: tuple[float, ...], images: Tensor) -> tuple[Tensor, ...]:
        """For each branch [B, 1, 1], the factor of every sample: 0 with the probability of its rate."""

        def build() -> tuple[Tensor, ...]:
            rate = torch.tensor(rates, device=images.device)
            return rate, torch.where(rate < 1, 1 / (1 - rate), 1.0)

        rate, scale = (x.view(-1, 1, 1, 1) for x in self._tables.get((rates, images.device), build))
        draws = torch.rand(len(rates), len(images), 1, 1, device=images.device)
        return torch.where(draws >= rate, scale, 0.0).unbind()


class TrunkBlock(nn.Module):
    """A block of Hiera that takes over the parts of timm's, on tokens [B, N, C] in the order of a layout."""

    def __init__(self, block: MultiScaleBlock, performance: PerformanceConfig) -> None:
        super().__init__()
        self._tables = TableCache()
        for name, part in block.named_children():
            self.add_module(name, part)
        self.window = block.window_size[0]
        """Side of the attention windows; 0 is attention over the whole image."""
        self.pools = block.q_stride is not None
        self.lean = performance.lean_projections
        if self.lean:
            self.norm1, self.norm2 = adopt_norm(self.norm1), adopt_norm(self.norm2)
            self.attn.qkv = adopt(NormedLinear, self.attn.qkv)
            self.mlp.fc1 = adopt(NormedLinear, self.mlp.fc1)
            self.mlp.fc2 = adopt(GeluLinear, self.mlp.fc2)
            if self.pools:
                self.proj = adopt(NormedLinear, self.proj)
        else:
            self.attn.qkv = adopt(Linear, self.attn.qkv)

    def forward(self, x: Tensor, layout: WindowLayout, kept_attention: Kept = None, kept_mlp: Kept = None) -> Tensor:
        """Tokens [B, N, C] to [B, N, C], or [B, N / 4, 2 C] where a stage begins.

        Windowed attention on tokens in plain order pads its windows, as timm's does.
        """
        shortcut = _pool(self._project_shortcut(x), layout) if self.pools else x
        branch = self.attention(_take(x, kept_attention), layout)
        x = _add(shortcut, self.ls1(branch), self.drop_path1, kept_attention)
        branch = self._feed_forward(_take(x, kept_mlp))
        return _add(x, self.ls2(branch), self.drop_path2, kept_mlp)

    def attention(self, x: Tensor, layout: WindowLayout) -> Tensor:
        """Attention inside the windows, or over all tokens, of the normalized tokens."""
        if not self.window:
            q, k, v = self._project(x)
            return self.attn.proj(self._attend(q, k, v, WindowGroup(1, 1, 1, x.shape[1], padding=0)))
        if self.window == layout.window:
            return self._attend_windows(x, layout)
        grid = layout.to_grid(self.norm1(x))
        grid = F.pad(grid, (0, 0, 0, -layout.width % self.window, 0, -layout.height % self.window))
        padded = WindowLayout(*grid.shape[1:3], self.window)
        out = self._attend_windows(padded.to_tokens(grid), padded, normalize=False)
        if self.pools:
            layout, padded = layout.pooled(), padded.pooled()
        return padded.to_grid(out)[:, : layout.height, : layout.width].flatten(1, 2)

    def _attend_windows(self, x: Tensor, layout: WindowLayout, normalize: bool = True) -> Tensor:
        """All windows are projected at once; a token of padding, zero, would give the biases."""
        q, k, v = self._project(x, normalize)
        virtual = (None, None, None)
        if any(group.padding for group in layout.groups):
            _, bias = self.attn.qkv()
            virtual = (None, *bias.to(k.dtype).chunk(3)[1:])
        windows = [layout.split(part, token) for part, token in zip((q, k, v), virtual, strict=True)]
        if len(layout.groups) > 1:  # a group that happens to be a view would keep the tokens of all
            windows = [[part.contiguous() for part in parts] for parts in windows]
        del q, k, v
        outputs = [self._attend(*parts, group) for *parts, group in zip(*windows, layout.groups, strict=True)]
        return self.attn.proj((layout.pooled() if self.pools else layout).join(outputs))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, group: WindowGroup) -> Tensor:
        """Attention inside windows [M, L, C], whose padding has virtual keys."""
        if self.pools:
            # Copies of their own: as parts of one tensor, k and v would keep the queries before pooling.
            q, k, v = max_pool(q, group), k.contiguous(), v.contiguous()
        heads = self.attn.num_heads, v.shape[-1] // self.attn.num_heads
        q, k, v = (x.unflatten(-1, heads).transpose(1, 2) for x in (q, k, v))
        if len(q):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._score_bias(group, q))
        else:  # all samples skip the block; the fused attention of cuDNN returns None then
            out = q @ k.transpose(-2, -1) @ v
        return out.transpose(1, 2).flatten(2)

    def _score_bias(self, group: WindowGroup, q: Tensor) -> Tensor | None:
        if not group.padding or torch.compiler.is_compiling():
            return group.score_bias(q)
        key = (group.padding, group.tokens, q.dtype, q.device)
        return self._tables.get(key, lambda: (group.score_bias(q),))[0]

    def _project(self, x: Tensor, normalize: bool = True) -> tuple[Tensor, ...]:
        """Queries, keys and values [B, N, C'] of tokens [B, N, C]."""
        if self.lean:
            return self.attn.qkv(x, self.norm1 if normalize else None, parts=3)
        return self.attn.qkv(self.norm1(x) if normalize else x).chunk(3, dim=-1)

    def _project_shortcut(self, x: Tensor) -> Tensor:
        return self.proj(x, self.norm1)[0] if self.lean else self.proj(self.norm1(x))

    def _feed_forward(self, x: Tensor) -> Tensor:
        if not self.lean:
            return self.mlp(self.norm2(x))
        return self.mlp.fc2(self.mlp.fc1(x, self.norm2)[0])


def _pool(tokens: Tensor, layout: WindowLayout) -> Tensor:
    """Largest of each 2 x 2 neighbors, tokens [B, N, C] to [B, N / 4, C] in the order of the pooled layout."""
    pooled = [max_pool(windows, group) for windows, group in zip(layout.split(tokens), layout.groups, strict=True)]
    return layout.pooled().join(pooled)


def _take(x: Tensor, kept: Kept) -> Tensor:
    return x if kept is None or kept.is_floating_point() or len(kept) == len(x) else x.index_select(0, kept)


def _add(x: Tensor, branch: Tensor, drop: nn.Module, kept: Kept) -> Tensor:
    """Add a branch [K, ...] to the samples that it ran on, scaled so that the mean over all draws is that of all."""
    if kept is None:
        return x + drop(branch)
    if kept.is_floating_point():
        return torch.addcmul(x, branch, kept.to(x.dtype))
    rate = getattr(drop, "drop_prob", 0.0)
    scale = 1 / (1 - rate) if rate < 1 else 1.0
    if len(kept) == len(x):
        return torch.add(x, branch, alpha=scale)
    return x.index_add(0, kept, branch.to(x.dtype), alpha=scale)
