"""Ground truth of the run-length operators in plain Python and PyTorch; README.md describes format and rules."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..masks import pack_masks

MAX_CHARACTERS = 12
"""Longest number: 60 bits, so that sums with a run length cannot leave int64."""
MAX_TARGET = 2**15
"""Longest side of a resampled mask, so that products of weights cannot leave int64."""


class Fault(enum.IntEnum):
    """What is wrong with a mask's counts; csrc/rle.h has the same numbers."""

    NONE = 0
    CHARACTER = 1
    TRUNCATED = 2
    TOO_LONG = 3
    NEGATIVE = 4
    BEYOND = 5
    SHORT = 6


def parse(counts: Tensor, offsets: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read and check the counts of N masks.

    Args:
        counts: of all masks, one after the other: compressed text uint8 [L], or run lengths int64 [L].
        offsets: int64 [N + 1]; mask n is counts[offsets[n] : offsets[n + 1]].

    Returns:
        ends int64 [L], from offsets[n] on the positions behind each run of mask n, and H * W where no run is left;
        lengths int64 [N], the number of runs, 0 where faulty; areas int64 [N], their foreground pixels; status int64
        [N, 2]: a `Fault`, and the index of the run it is in (for SHORT: the number of pixels covered).
    """
    if counts.dtype not in (torch.uint8, torch.int64) or counts.dim() != 1:
        raise RuntimeError("rle_parse: counts must be uint8 or int64 [L] and offsets int64 [N + 1]")
    if offsets.dtype != torch.int64 or offsets.dim() != 1:
        raise RuntimeError("rle_parse: counts must be uint8 or int64 [L] and offsets int64 [N + 1]")
    _check_size("rle_parse", height, width)
    bounds = offsets.tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] != counts.numel() or bounds != sorted(bounds):
        raise RuntimeError("rle_parse: offsets must rise from 0 to the length of counts")
    pixels, masks, values = height * width, len(bounds) - 1, counts.tolist()
    ends = torch.full((len(values),), pixels, dtype=torch.int64)
    lengths, areas = torch.zeros(2, masks, dtype=torch.int64).unbind()
    status = torch.zeros(masks, 2, dtype=torch.int64)
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        own = values[start:end]
        numbers = _from_text(bytes(own)) if counts.dtype == torch.uint8 else ((value, Fault.NONE) for value in own)
        runs, fault, detail = _check_runs(numbers, pixels)
        status[n, 0], status[n, 1] = fault, detail
        if fault == Fault.NONE:
            lengths[n], areas[n] = len(runs), sum(runs[1::2])
            ends[start : start + len(runs)] = torch.tensor(runs).cumsum(0)
    # Outputs of an operator must not share memory.
    return ends, lengths.clone(), areas.clone(), status


def decode(ends: Tensor, starts: Tensor, lengths: Tensor, height: int, width: int, packed: bool) -> Tensor:
    """Draw N masks: bool [N, H, W], or the bits of `pack_masks`.

    Args:
        ends, lengths: of `parse`.
        starts: int64 [N], where the ends of a mask start.
    """
    _check_size("rle_decode", height, width)
    masks = _masks("rle_decode", ends, starts, lengths, height, width)
    return pack_masks(masks) if packed else masks


def resample(
    ends: Tensor,
    starts: Tensor,
    lengths: Tensor,
    height: int,
    width: int,
    top: int,
    bottom: int,
    left: int,
    right: int,
    to_top: int,
    to_bottom: int,
    to_left: int,
    to_right: int,
    side: int,
    flip: bool,
    packed: bool,
) -> Tensor:
    """Part [top:bottom, left:right] of N masks, resized to [to_top:to_bottom, to_left:to_right] of a square that is
    mirrored then: bool [N, side, side], or the bits of `pack_masks`. Inputs else as for `decode`."""
    _check_size("rle_resample", height, width)
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        raise RuntimeError("rle_resample: the source must be a part of the mask")
    if not (side <= MAX_TARGET and 0 <= to_top < to_bottom <= side and 0 <= to_left < to_right <= side):
        raise RuntimeError("rle_resample: the target must be a part of the square, which is at most 2^15 a side")
    part = _masks("rle_resample", ends, starts, lengths, height, width)[:, top:bottom, left:right].long()
    square = torch.zeros(len(starts), side, side, dtype=torch.bool, device=ends.device)
    rows, columns = to_bottom - to_top, to_right - to_left
    share = _interpolate(_interpolate(part, 1, rows), 2, columns)
    square[:, to_top:to_bottom, to_left:to_right] = 2 * share >= 2 * rows * 2 * columns
    square = square.flip(2) if flip else square
    return pack_masks(square) if packed else square


def _interpolate(masks: Tensor, axis: int, to: int) -> Tensor:
    """Linear interpolation along one axis to `to` pixels, times 2 * to: whole numbers."""
    last = masks.shape[axis] - 1
    place = (2 * torch.arange(to, device=masks.device) + 1) * (last + 1) - to
    low = torch.div(place, 2 * to, rounding_mode="floor")
    fraction = place - low * 2 * to
    before, behind = (masks.index_select(axis, index.clamp(0, last)) for index in (low, low + 1))
    fraction = fraction.view([-1 if i == axis else 1 for i in range(3)])
    return (2 * to - fraction) * before + fraction * behind


def _masks(name: str, ends: Tensor, starts: Tensor, lengths: Tensor, height: int, width: int) -> Tensor:
    """bool [N, H, W]: foreground where the number of runs that end before or at a pixel is odd."""
    if any(tensor.dtype != torch.int64 or tensor.dim() != 1 for tensor in (ends, starts, lengths)):
        raise RuntimeError(f"{name}: ends must be int64 [L], starts and lengths int64 [N]")
    if len(starts) != len(lengths):
        raise RuntimeError(f"{name}: ends must be int64 [L], starts and lengths int64 [N]")
    pixels = torch.arange(height * width, device=ends.device)
    masks = torch.zeros(len(starts), height, width, dtype=torch.bool, device=ends.device)
    for n, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        if min(start, length) < 0 or start + length > len(ends):
            raise RuntimeError(f"{name}: the runs of mask {n} leave the {len(ends)} ends")
        own = ends[start : start + length].contiguous()
        if length and (own[0] < 0 or own[-1] != len(pixels) or (own.diff() < 0).any()):
            raise RuntimeError(f"{name}: the ends of mask {n} do not rise to the number of its pixels")
        masks[n] = (torch.searchsorted(own, pixels, right=True) % 2 == 1).view(width, height).t()
    return masks


def _check_size(name: str, height: int, width: int) -> None:
    if not 0 < height < 2**31 or not 0 < width < 2**31:
        raise RuntimeError(f"{name}: height and width must be 1 to 2^31 - 1, not {height} x {width}")


def _check_runs(numbers: Iterator[tuple[int, Fault]], pixels: int) -> tuple[list[int], Fault, int]:
    """Run lengths of one mask, and what is wrong with them."""
    runs: list[int] = []
    total = 0
    for value, fault in numbers:
        if fault == Fault.NONE and value < 0:
            fault = Fault.NEGATIVE
        if fault == Fault.NONE and value > pixels - total:
            fault = Fault.BEYOND
        if fault != Fault.NONE:
            return runs, fault, len(runs)
        runs.append(value)
        total += value
    return runs, Fault.NONE if total == pixels else Fault.SHORT, total if total < pixels else 0


def _from_text(text: bytes) -> Iterator[tuple[int, Fault]]:
    """Run lengths of compressed counts: signed little-endian base-32 numbers, each character 48 + 5 bits + 32 if
    another follows, from the fourth on differences; ends after a fault."""
    value = shift = 0
    runs: list[int] = []
    for character in text:
        group = character - 48
        if not 0 <= group < 64:
            yield 0, Fault.CHARACTER
            return
        if shift == 5 * MAX_CHARACTERS:
            yield 0, Fault.TOO_LONG
            return
        value |= (group & 31) << shift
        shift += 5
        if not group & 32:
            value -= 1 << shift if group & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            yield runs[-1], Fault.NONE
            value = shift = 0
    if shift:
        yield 0, Fault.TRUNCATED


def compress(runs: Sequence[int]) -> bytes:
    """The compressed form of run lengths, equal to what pycocotools writes."""
    text = bytearray()
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            group = value & 31
            value >>= 5
            more = value != (-1 if group & 16 else 0)
            text.append(48 + group + (32 if more else 0))
    return bytes(text)
