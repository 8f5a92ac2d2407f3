"""Position encodings: sine (1-D and 2-D), random Fourier features, and axial rotary embedding."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

TEMPERATURE = 10000.0


class TableCache:
    """Constant tensors by key, kept out of the state dict and safe from a module's dtype casts.

    Encodings depend on the grid alone; building them takes about ten small kernels, and a training step asks for them
    hundreds of times. Only plain tensors are kept: a fake tensor of a tracer must not outlive its trace. Most entries
    are a few KB, those of the distances to the memories of a frame; a training step reads about ten.
    """

    def __init__(self, max_entries: int = 1024) -> None:
        self._entries: dict[Hashable, tuple[Tensor, ...]] = {}
        self._max_entries = max_entries

    def get(self, key: Hashable, build: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The tensors of `key`, built without gradient at the first call."""
        found = self._entries.get(key)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():  # training may use what evaluation built
                found = build()
            if all(type(table) is Tensor for table in found):
                if len(self._entries) >= self._max_entries:
                    self._entries.clear()
                self._entries[key] = found
        return found

    def tensors(self) -> list[Tensor]:
        """All that are kept now."""
        return [table for tables in self._entries.values() for table in tables]


def _wavelengths(count: int, device: torch.device | str | None) -> Tensor:
    """Sine and cosine of a pair share a wavelength: T^(2 floor(i/2) / count) for i < count."""
    index = torch.arange(count, dtype=torch.float32, device=device)
    return TEMPERATURE ** (2 * (index // 2) / count)


def sine_encoding_1d(positions: Tensor, dim: int) -> Tensor:
    """Sine encoding of positions [K] (any unit): [K, dim], all sines before all cosines.

    "Attention is all you need" (arXiv 1706.03762), section 3.5.
    """
    angles = positions.float().unsqueeze(-1) / _wavelengths(dim // 2, positions.device)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def sine_encoding_2d(dim: int, height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Sine encoding of a grid: [dim, height, width]; the first half of the channels encodes y, the second x.

    Coordinates run to 2 pi over the image; sine and cosine of a wavelength are neighbors (DETR, arXiv 2005.12872).
    """
    half = dim // 2
    wavelengths = _wavelengths(half, device)

    def encode(length: int) -> Tensor:
        index = torch.arange(1, length + 1, dtype=torch.float32, device=device)
        angles = (index / (length + 1e-6) * (2 * math.pi))[:, None] / wavelengths
        return torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=2).flatten(1).T  # [half, length]

    y = encode(height)[:, :, None].expand(half, height, width)
    x = encode(width)[:, None, :].expand(half, height, width)
    return torch.cat([y, x])


def rotary_tables(
    dim: int, height: int, width: int, device: torch.device | str | None = None, theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables of axial rotary embedding for a row-major grid, float32, each [height * width, dim / 2].

    Channels form neighboring pairs, with an entry each: the first dim/4 pairs turn with x, the others with y (RoPE-ViT,
    arXiv 2403.13298). Real tables instead of complex numbers: they compile and autocast.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 4, dtype=torch.float32, device=device) / dim)
    index = torch.arange(height * width, device=device)
    column, row = (index % width).float(), (index // width).float()
    angles = torch.cat([torch.outer(column, frequencies), torch.outer(row, frequencies)], dim=-1)  # [hw, dim / 2]
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [..., L, dim] by tables [hw, dim / 2]; a sequence of several grids (L = r hw) repeats the tables.

    Computed in float32 and returned in the dtype of x.
    """
    grids = x.float().unflatten(-2, (-1, cos.shape[0]))  # [..., r, hw, dim]
    a, b = grids.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    return rotated.flatten(-2).flatten(-3, -2).to(x.dtype)


class FourierEncoding(nn.Module):
    """Random Fourier features of points in the unit square (arXiv 2006.10739), as in SAM."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, dim // 2))

    def forward(self, points: Tensor) -> Tensor:
        """Encode points [..., 2] (x, y in 0..1): [..., dim], in float32."""
        x, y = (2 * points.float() - 1).split(1, dim=-1)
        # Not a matrix product: autocast would round the angles to half precision.
        frequency_x, frequency_y = self.positional_encoding_gaussian_matrix.float()
        angles = 2 * math.pi * (x * frequency_x + y * frequency_y)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def grid(self, height: int, width: int) -> Tensor:
        """Encoding of the centers of a grid's cells: [dim, height, width]."""
        device = self.positional_encoding_gaussian_matrix.device
        y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
        points = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)
        return self(points).permute(2, 0, 1)
