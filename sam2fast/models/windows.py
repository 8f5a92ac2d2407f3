"""Tokens of an image in the order of attention windows, without the padding of the windows.

A trunk that keeps its tokens in this order cuts windows by views: normalization, MLP and global attention do not depend
on the order, and pooling 2 x 2 leaves windows of half the side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

VIRTUAL_KEYS = 2
"""Tokens that stand for the whole padding of a window."""


@dataclass(frozen=True)
class WindowGroup:
    """The windows of one shape: inner ones, or those that the right border, the lower one or both cut off."""

    rows: int
    columns: int
    height: int
    width: int
    padding: int
    """Padded tokens of a window."""

    @property
    def windows(self) -> int:
        return self.rows * self.columns

    @property
    def tokens(self) -> int:
        """Of a window, without padding."""
        return self.height * self.width

    def score_bias(self, q: Tensor) -> Tensor | None:
        """What attention adds to its scores [1, 1, 1, tokens + 2], so that two keys count as all the padding does.

        exp(coarse) + exp(fine) = padding. One key would do but for low precision, where the logarithm of the padding
        is off by up to one part in a hundred of it; `coarse` is exact in bfloat16 and leaves `fine` little to round.
        """
        if not self.padding:
            return None
        coarse = math.floor(32 * math.log(self.padding)) / 32
        fine = math.log(max(self.padding - math.exp(coarse), 1e-30))
        bias = q.new_zeros(1, 1, 1, self.tokens + VIRTUAL_KEYS)
        bias[..., -2].fill_(coarse)
        bias[..., -1].fill_(fine)
        return bias


@dataclass(frozen=True)
class WindowLayout:
    """Order of the tokens of a grid: by group, then window, then row and column inside the window."""

    height: int
    width: int
    window: int
    """Side of the windows; 0 is one window, that is, the plain order of rows and columns."""

    @property
    def _rows(self) -> list[tuple[int, int]]:
        return _spans(self.height, self.window)

    @property
    def _columns(self) -> list[tuple[int, int]]:
        return _spans(self.width, self.window)

    @property
    def groups(self) -> tuple[WindowGroup, ...]:
        whole = self.window**2 or self.height * self.width
        return tuple(
            WindowGroup(rows, columns, height, width, whole - height * width)
            for rows, height in self._rows
            for columns, width in self._columns
        )

    def split(self, tokens: Tensor, virtual: Tensor | None = None) -> tuple[Tensor, ...]:
        """Tokens [B, N, C] by group, [B * windows, tokens of a window, C] each.

        With `virtual` [C], windows with padding have VIRTUAL_KEYS tokens more, at their end, which are this one.
        """
        if len(self.groups) == 1:
            parts = (tokens,)
        else:
            parts = tokens.split([group.windows * group.tokens for group in self.groups], dim=1)
        batch, channels = tokens.shape[0], tokens.shape[-1]  # no -1 below: a batch may be empty

        def windows(part: Tensor, group: WindowGroup) -> Tensor:
            if virtual is None or not group.padding:
                return part.reshape(batch * group.windows, group.tokens, channels)
            added = virtual.expand(batch, group.windows, VIRTUAL_KEYS, channels)
            return torch.cat([part.unflatten(1, (group.windows, group.tokens)), added], dim=2).flatten(0, 1)

        return tuple(windows(part, group) for group, part in zip(self.groups, parts, strict=True))

    def join(self, parts: list[Tensor]) -> Tensor:
        """Inverse of `split`."""
        joined = [
            part.reshape(
                math.prod(part.shape[:-1]) // (group.windows * group.tokens),
                group.windows * group.tokens,
                part.shape[-1],
            )
            for group, part in zip(self.groups, parts, strict=True)
        ]
        return joined[0] if len(joined) == 1 else torch.cat(joined, dim=1)

    def to_tokens(self, grid: Tensor) -> Tensor:
        """A grid [B, H, W, C] to tokens [B, H * W, C]."""
        if not self.window:
            return grid.flatten(1, 2)
        strips = grid.split([count * size for count, size in self._rows], dim=1)
        columns = [count * size for count, size in self._columns]
        parts = [part for strip in strips for part in strip.split(columns, dim=2)]
        return self.join(
            [
                part.unflatten(1, (group.rows, group.height)).unflatten(3, (group.columns, group.width)).transpose(2, 3)
                for group, part in zip(self.groups, parts, strict=True)
            ]
        )

    def to_grid(self, tokens: Tensor) -> Tensor:
        """Inverse of `to_tokens`."""
        if not self.window:
            return tokens.unflatten(1, (self.height, self.width))
        parts = [
            part.unflatten(1, (group.height, group.width))
            .unflatten(0, (len(tokens), group.rows, group.columns))
            .transpose(2, 3)
            .flatten(1, 2)
            .flatten(2, 3)
            for group, part in zip(self.groups, self.split(tokens), strict=True)
        ]
        width = len(self._columns)
        strips = [_cat(parts[start : start + width], dim=2) for start in range(0, len(parts), width)]
        return _cat(strips, dim=1)

    def pooled(self) -> WindowLayout:
        """Order of the tokens after `max_pool` of every window."""
        return WindowLayout(self.height // 2, self.width // 2, self.window // 2)


def _spans(length: int, window: int) -> list[tuple[int, int]]:
    """Number and size of the whole windows along a side, then of the one that the border cuts off."""
    if not window:
        return [(1, length)]
    whole, rest = length // window, length % window  # torch.compile knows no divmod of symbolic sizes
    return [span for span in ((whole, window), (1, rest)) if span[0] * span[1]]


def _cat(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def max_pool(windows: Tensor, group: WindowGroup) -> Tensor:
    """Largest of each 2 x 2 tokens: windows [M, tokens, C] to [M, tokens / 4, C]."""
    grid = windows.unflatten(1, (group.height, group.width))
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        pooled = F.max_pool2d(grid.permute(0, 3, 1, 2), kernel_size=2).permute(0, 2, 3, 1)
    else:
        pooled = _MaxPool.apply(grid)
    return pooled.flatten(1, 2)


class _MaxPool(torch.autograd.Function):
    """Of grids [M, H, W, C]. Keeps one byte per output for the backward pass, where `F.max_pool2d` keeps an index of
    eight and its input; of equal tokens the first is taken, as there."""

    @staticmethod
    def forward(ctx: FunctionCtx, grid: Tensor) -> Tensor:
        largest, *others = _corners(grid)
        place = torch.zeros_like(largest, dtype=torch.uint8, memory_format=torch.contiguous_format)
        for number, corner in enumerate(others, start=1):
            place.masked_fill_(corner > largest, number)
            largest = torch.maximum(largest, corner)
        ctx.save_for_backward(place)
        return largest

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        (place,) = ctx.saved_tensors
        count, height, width, channels = grad.shape
        grad_grid = grad.new_empty(count, 2 * height, 2 * width, channels)
        for number, corner in enumerate(_corners(grad_grid)):
            torch.mul(grad, place == number, out=corner)
        return grad_grid


def _corners(grid: Tensor) -> list[Tensor]:
    """Views of a grid [M, H, W, C]: the four tokens [M, H / 2, W / 2, C] of each 2 x 2, row by row."""
    return [grid[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]
