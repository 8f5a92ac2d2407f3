"""Weights and inputs behind a parity file: every tensor is a function of its name, so that none needs to be stored."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

_EMBEDDINGS = frozenset(
    ("maskmem_tpos_enc", "no_mem_embed", "no_mem_pos_enc", "no_obj_ptr", "no_obj_embed_spatial")
    + ("pos_embed", "pos_embed_window")
)


def det_np(name: str, shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """Standard normal float32 values of `shape`, drawn from PCG64 seeded with [seed, crc32(name)]."""
    bits = np.random.PCG64([seed, zlib.crc32(name.encode())])
    return np.random.Generator(bits).standard_normal(tuple(shape), dtype=np.float32)


def det_tensor(name: str, shape: Sequence[int], seed: int = 0) -> torch.Tensor:
    """Value of the state-dict entry `name` in a case with this seed, scaled by what kind of parameter it is."""
    leaf = name.split(".")[-1]
    normal = torch.from_numpy(det_np(name, shape, seed))
    if leaf == "gamma":
        return torch.full_like(normal, 0.5)
    if leaf == "positional_encoding_gaussian_matrix":
        return normal
    if normal.dim() < 2:
        return 1 + 0.1 * normal if leaf == "weight" else 0.05 * normal
    if leaf in _EMBEDDINGS:
        return 0.2 * normal
    return normal / math.sqrt(math.prod(shape[1:]))


def det_images(num_frames: int, num_clips: int, size: int, seed: int) -> torch.Tensor:
    """Normalized frames float32 [T, B, 3, S, S] of a step case: box-filtered noise."""
    shape = (num_frames, num_clips, 3, size, size)
    noise = np.random.Generator(np.random.PCG64(100 + seed)).standard_normal(shape, dtype=np.float32)
    smooth = F.avg_pool2d(torch.from_numpy(noise).flatten(0, 1), kernel_size=5, stride=1, padding=2)
    return 3 * smooth.view(shape)
