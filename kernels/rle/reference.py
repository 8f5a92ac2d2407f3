"""Ground truth of `sam2fast::rle_decode` in plain Python and PyTorch; README.md describes the format."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

MAX_CHARACTERS = 12
"""Longest number: 60 bits, so that sums with a run length cannot leave int64."""


class Fault(enum.IntEnum):
    """What is wrong with a mask's counts; csrc/rle.cpp has the same numbers."""

    NONE = 0
    CHARACTER = 1
    TRUNCATED = 2
    TOO_LONG = 3
    NEGATIVE = 4
    BEYOND = 5
    SHORT = 6


def decode(counts: Tensor, offsets: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Decode N masks.

    Args:
        counts: uint8 [L], the compressed run lengths of all masks, one after the other.
        offsets: int64 [N + 1]; mask n is counts[offsets[n] : offsets[n + 1]].

    Returns:
        masks bool [N, H, W], all False where faulty, and status int64 [N, 2]: a `Fault`, and the index of the run it
        is in (for SHORT: the number of pixels covered).
    """
    check_inputs(counts, offsets, height, width)
    stream = bytes(counts.tolist())
    bounds = offsets.tolist()
    masks = torch.zeros(len(bounds) - 1, height, width, dtype=torch.bool)
    status = torch.zeros(len(bounds) - 1, 2, dtype=torch.int64)
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        runs, fault, detail = parse(stream[start:end], height * width)
        status[n, 0], status[n, 1] = fault, detail
        if fault == Fault.NONE:
            masks[n] = expand(runs, height, width)
    return masks, status


def check_inputs(counts: Tensor, offsets: Tensor, height: int, width: int) -> None:
    """Refuse what the caller may not pass: wrong types, offsets that leave `counts`, an empty image."""
    if counts.dtype != torch.uint8 or counts.dim() != 1 or offsets.dtype != torch.int64 or offsets.dim() != 1:
        raise RuntimeError("rle_decode: counts must be uint8 [L] and offsets int64 [N + 1]")
    if not 0 < height < 2**31 or not 0 < width < 2**31:
        raise RuntimeError(f"rle_decode: height and width must be 1 to 2^31 - 1, not {height} x {width}")
    bounds = offsets.tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] != counts.numel() or bounds != sorted(bounds):
        raise RuntimeError("rle_decode: offsets must rise from 0 to the length of counts")


def parse(text: bytes, area: int) -> tuple[list[int], Fault, int]:
    """Run lengths of one mask of `area` pixels, alternating background and foreground, and what is wrong with them."""
    runs: list[int] = []
    total = 0
    for value, fault in _numbers(text):
        if len(runs) > 2:
            value += runs[-2]
        if fault == Fault.NONE and value < 0:
            fault = Fault.NEGATIVE
        if fault == Fault.NONE and value > area - total:
            fault = Fault.BEYOND
        if fault != Fault.NONE:
            return runs, fault, len(runs)
        runs.append(value)
        total += value
    return runs, Fault.NONE if total == area else Fault.SHORT, total if total < area else 0


def _numbers(text: bytes) -> Iterator[tuple[int, Fault]]:
    """Signed little-endian base-32 numbers, each character 48 + 5 bits + 32 if another follows; ends after a fault."""
    value = shift = 0
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
            yield value - (1 << shift if group & 16 else 0), Fault.NONE
            value = shift = 0
    if shift:
        yield 0, Fault.TRUNCATED


def expand(runs: Sequence[int], height: int, width: int) -> Tensor:
    """Mask bool [H, W] of run lengths that count pixels down the columns."""
    foreground = torch.arange(len(runs)) % 2 == 1
    pixels = torch.repeat_interleave(foreground, torch.tensor(runs, dtype=torch.int64))
    return pixels.view(width, height).t()


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
