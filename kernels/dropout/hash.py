"""The random bits of all dropout: a counter hash, the same in every back end and cheap enough to compute twice."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """An int64 scalar from torch's global generator of `device`, without waiting for the device."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def draw_seeds(count: int, device: torch.device) -> tuple[Tensor, ...]:
    """As many of these in one draw. They lie 16 bytes apart, an alignment that kernels are compiled for."""
    return torch.randint(2**63 - 1, (count, 2), dtype=torch.int64, device=device)[:, 0].unbind()


def threshold(probability: float) -> int:
    """Bits below this are dropped.

    Raises:
        ValueError: a probability outside [0, 1).
    """
    if not 0 <= probability < 1:
        raise ValueError(f"the probability of dropout must be at least 0 and below 1, not {probability!r}")
    return int(probability * 2**32)


def random_bits(seed: Tensor, rows: int, columns: int) -> Tensor:
    """int64 [rows, columns] of 32 random bits each, for elements (row, column) of `seed`.

    With mix an invertible mixing of 32 bits, key(row) = mix(mix(low(seed) ^ row) + high(seed)) and
    bits(row, column) = mix(key(row) + column * 0x9E3779B9), all modulo 2^32.
    """
    row = torch.arange(rows, dtype=torch.int64, device=seed.device) & _MASK
    column = torch.arange(columns, dtype=torch.int64, device=seed.device)
    key = _mix(_mix((seed & _MASK) ^ row) + (seed >> 32 & _MASK) & _MASK)
    return _mix(key.unsqueeze(1) + column * 0x9E3779B9 & _MASK)


def _mix(x: Tensor) -> Tensor:
    # int64 products of two 32-bit numbers wrap around, which leaves their low 32 bits right.
    x = (x ^ x >> 16) * 0x7FEB352D & _MASK
    x = (x ^ x >> 15) * 0x846CA68B & _MASK
    return x ^ x >> 16
