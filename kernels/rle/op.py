"""`decode`: COCO run-length masks to boolean tensors, through the operator `sam2fast::rle_decode`."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import library
from . import reference
from .reference import MAX_CHARACTERS, Fault


class RleError(ValueError):
    """Counts that are no mask of the stated size; the message names the mask and what is wrong with it."""


def decode(
    counts: Sequence[bytes | str | Sequence[int]], size: tuple[int, int], backend: library.Backend = "auto"
) -> Tensor:
    """Decode the run-length masks of one image or frame.

    Args:
        counts: one entry per mask: COCO's compressed counts (bytes or str) or a list of run lengths.
        size: (H, W) in pixels, the order of "size" in the annotation files.
        backend: `auto`, `cpp` or `reference`.

    Returns:
        bool [N, H, W] on the CPU.

    Raises:
        RleError: counts with a character out of range, cut off, too long for a number, with a negative run, or whose
            runs do not cover exactly H * W pixels; names the first such mask.
        ValueError: a back end that does not exist or was not built.
    """
    if isinstance(counts, (bytes, str)):
        raise RleError(f"counts must be a sequence with one entry per mask, not a single {type(counts).__name__}")
    height, width = _check_size(size)
    texts = [_compressed(n, entry) for n, entry in enumerate(counts)]
    offsets = torch.tensor([0, *itertools.accumulate(map(len, texts))], dtype=torch.int64)
    joined = bytearray(b"".join(texts))
    stream = torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)

    masks, status = rle_decode.choose(backend, stream)(stream, offsets, height, width)
    for n, (fault, detail) in enumerate(status.tolist()):
        if fault != Fault.NONE:
            raise RleError(f"mask {n}: {_explain(Fault(fault), detail, height, width)}")
    return masks


def _check_size(size: tuple[int, int]) -> tuple[int, int]:
    try:
        height, width = (operator.index(side) for side in size)
    except (TypeError, ValueError):
        raise RleError(f"size must be two whole numbers (height, width), not {size!r}") from None
    if not 0 < height < 2**31 or not 0 < width < 2**31:
        raise RleError(f"size must be at least 1 x 1 pixel and below 2^31 a side, not {height} x {width}")
    return height, width


def _compressed(n: int, entry: bytes | str | Sequence[int]) -> bytes:
    if isinstance(entry, bytes):
        return entry
    if isinstance(entry, str):
        # Latin-1 keeps one byte a character, so that the decoder itself finds and names a stray one.
        try:
            return entry.encode("latin-1")
        except UnicodeEncodeError as error:
            stray = entry[error.start]
            raise RleError(f"mask {n}: counts have the character {stray!r}, not one of '0' to 'o'") from None
    try:
        return reference.compress([operator.index(run) for run in entry])
    except TypeError:
        raise RleError(f"mask {n}: counts must be bytes, str or a list of whole numbers, not {entry!r:.80}") from None


def _explain(fault: Fault, detail: int, height: int, width: int) -> str:
    return {
        Fault.CHARACTER: f"run {detail} of its counts has a character that is not one of '0' to 'o'",
        Fault.TRUNCATED: f"its counts end inside run {detail}; the text was cut off",
        Fault.TOO_LONG: f"run {detail} of its counts has more than {MAX_CHARACTERS} characters",
        Fault.NEGATIVE: f"run {detail} of its counts is negative",
        Fault.BEYOND: f"run {detail} of its counts goes beyond the {height} x {width} pixels of the mask",
        Fault.SHORT: f"its counts cover {detail} of the {height} x {width} = {height * width} pixels of the mask",
    }[fault]


def _fake(counts: Tensor, offsets: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    masks = offsets.shape[0] - 1
    return counts.new_empty((masks, height, width), dtype=torch.bool), offsets.new_empty((masks, 2))


rle_decode = library.Operator(
    "rle_decode",
    "(Tensor counts, Tensor offsets, int height, int width) -> (Tensor masks, Tensor status)",
    reference=reference.decode,
    fake=_fake,
    slower="about ten times slower",
)
