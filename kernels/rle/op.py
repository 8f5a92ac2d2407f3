"""COCO run-length masks to boolean or packed tensors: `parse`, then `RunLengths.decode` or `RunLengths.resample`.

They run through the operators `sam2fast::rle_parse`, `rle_decode` and `rle_resample`. Rules and cost: README.md.
"""

from __future__ import annotations

import itertools
import operator
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._ops import OpOverload

from .. import library
from . import reference
from .reference import MAX_CHARACTERS, MAX_TARGET, Fault

Counts = bytes | str | Sequence[int]
"""One mask: COCO's compressed counts, or a list of run lengths."""


_CPU = torch.empty(0)
"""Where counts are read."""


class RleError(ValueError):
    """Counts that are no mask of the stated size; the message names the mask and what is wrong with it."""


@dataclass(frozen=True)
class RunLengths:
    """The checked runs of N masks of one size; nothing is drawn yet."""

    size: tuple[int, int]
    """(H, W) in pixels."""
    ends: Tensor
    """int64 [L]: positions, counted down the columns, behind each run."""
    starts: Tensor
    """int64 [N]: where the ends of each mask start."""
    lengths: Tensor
    """int64 [N]: how many runs each mask has; 0 where it is faulty."""
    areas: Tensor
    """int64 [N]: foreground pixels; 0 where a mask is faulty."""
    faults: dict[int, str]
    """What is wrong with the masks that are faulty, which draw as empty."""

    def __len__(self) -> int:
        return len(self.starts)

    def check(self) -> RunLengths:
        """These masks.

        Raises:
            RleError: one is faulty; names the first.
        """
        for n in sorted(self.faults):
            raise RleError(f"mask {n}: {self.faults[n]}")
        return self

    def select(self, masks: Sequence[int]) -> RunLengths:
        """Some of the masks, in the order that is asked for."""
        index = torch.tensor(masks, dtype=torch.int64, device=self.starts.device)
        faults = {n: self.faults[mask] for n, mask in enumerate(masks) if mask in self.faults} if self.faults else {}
        parts = (self.starts[index], self.lengths[index], self.areas[index])
        return RunLengths(self.size, self.ends, *parts, faults)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RunLengths:
        """The masks with their tensors on `device`, where they are drawn then."""
        names = ("ends", "starts", "lengths", "areas")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=non_blocking) for name in names})

    def decode(self, *, packed: bool = False, backend: library.Backend = "auto") -> Tensor:
        """Masks at full size.

        Args:
            packed: eight pixels to a byte, as `sam2fast_kernels.pack_masks` orders them.
            backend: `auto` takes `cpp` for CPU and `triton` for CUDA tensors where they are installed.

        Returns:
            bool [N, H, W], or uint8 [N, H, ceil(W / 8)].

        Raises:
            ValueError: a back end that does not exist, was not built or does not run on this device.
        """
        run = rle_decode.choose(backend, self.ends)
        return run(self.ends, self.starts, self.lengths, *self.size, packed)

    def resample(
        self,
        source: tuple[slice, slice],
        target: tuple[slice, slice],
        side: int,
        flip: bool = False,
        *,
        packed: bool = False,
        backend: library.Backend = "auto",
    ) -> Tensor:
        """A part of each mask, resized into a part of a square; the full-size masks are never made.

        A pixel is foreground where bilinear interpolation of 0 and 1 (align_corners=False, of the part alone) reaches
        one half. Computed in whole numbers, so exact; README.md has the rule.

        Args:
            source: rows and columns of the masks that are used.
            target: rows and columns of the square that they fill; elsewhere it is empty.
            side: of the square, S.
            flip: mirror the square left to right after that.
            packed, backend: as for `decode`.

        Returns:
            bool [N, S, S], or uint8 [N, S, ceil(S / 8)].

        Raises:
            ValueError: parts that are empty or leave the mask or the square, which has at most 2^15 pixels a side.
        """
        if not 0 < side <= MAX_TARGET:
            raise ValueError(f"the side of the square must be 1 to {MAX_TARGET} pixels, not {side}")
        bounds = [
            bound
            for part, whole in ((source, self.size), (target, (side, side)))
            for rows, length in zip(part, whole, strict=True)
            for bound in _bounds(rows, length)
        ]
        run = rle_resample.choose(backend, self.ends)
        return run(self.ends, self.starts, self.lengths, *self.size, *bounds, side, flip, packed)


def parse(counts: Sequence[Counts], size: tuple[int, int], backend: library.Backend = "auto") -> RunLengths:
    """Read, check and measure the run-length masks of one image or frame without drawing them.

    Args:
        counts: one entry per mask.
        size: (H, W) in pixels, the order of "size" in the annotation files.
        backend: `auto`, `cpp` or `reference`.

    Returns:
        The masks, on the CPU. Those with a fault (a character out of range, cut off, too long for a number, a negative
        run, or runs that do not cover exactly H * W pixels) are listed in `RunLengths.faults`; nothing is raised.

    Raises:
        RleError: an impossible size, or counts that are not a sequence.
    """
    return _read(counts, size, rle_parse.choose(backend, _CPU))


def _read(counts: Sequence[Counts], size: tuple[int, int], run: OpOverload) -> RunLengths:
    """`parse` with one back end."""
    if isinstance(counts, (bytes, str)):
        raise RleError(f"counts must be a sequence with one entry per mask, not a single {type(counts).__name__}")
    height, width = _check_size(size)
    faults: dict[int, str] = {}
    entries = [_entry(n, entry, faults) for n, entry in enumerate(counts)]
    # Texts and lists lie in tensors of different dtypes; few files have both.
    groups = [[n for n, entry in enumerate(entries) if type(entry) is kind] for kind in (bytes, array)]
    groups = [masks for masks in groups if masks] or [[]]
    parts = [_parse(masks, [entries[n] for n in masks], height, width, run, faults) for masks in groups]
    ends, starts, lengths, areas = parts[0]
    if len(parts) == 2:
        parts[1][1].add_(len(ends))
        order = torch.tensor([n for masks in groups for n in masks]).argsort()
        ends, starts, lengths, areas = (torch.cat(pair) for pair in zip(*parts, strict=True))
        starts, lengths, areas = starts[order], lengths[order], areas[order]
    return RunLengths((height, width), ends, starts, lengths, areas, faults)


def decode(
    counts: Sequence[Counts], size: tuple[int, int], backend: library.Backend = "auto", *, packed: bool = False
) -> Tensor:
    """Decode the run-length masks of one image or frame.

    Args:
        counts, size: as for `parse`.
        backend: `auto`, `cpp`, `reference`, or `triton` where it runs on CPU tensors.
        packed: eight pixels to a byte, as `sam2fast_kernels.pack_masks` orders them.

    Returns:
        bool [N, H, W] or uint8 [N, H, ceil(W / 8)], on the CPU.

    Raises:
        RleError: a mask is faulty (see `parse`); names the first.
        ValueError: a back end that does not exist or was not built.
    """
    draw = rle_decode.choose(backend, _CPU)
    runs = _read(counts, size, rle_parse.choose(backend if backend != "triton" else "auto", _CPU)).check()
    return draw(runs.ends, runs.starts, runs.lengths, *runs.size, packed)


def _parse(
    masks: list[int],
    entries: list[bytes] | list[array],
    height: int,
    width: int,
    run: OpOverload,
    faults: dict[int, str],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ends, starts, lengths and areas of masks whose counts are of one kind."""
    offsets = torch.tensor([0, *itertools.accumulate(map(len, entries))], dtype=torch.int64)
    if entries and isinstance(entries[0], array):
        joined, dtype = array("q", itertools.chain.from_iterable(entries)), torch.int64
    else:
        joined, dtype = bytearray(b"".join(entries)), torch.uint8
    stream = torch.frombuffer(joined, dtype=dtype) if joined else torch.empty(0, dtype=dtype)
    ends, lengths, areas, status = run(stream, offsets, height, width)
    for n, (fault, detail) in zip(masks, status.tolist(), strict=True):
        if fault:
            faults.setdefault(n, _explain(Fault(fault), detail, height, width))
    return ends, offsets[:-1], lengths, areas


def _check_size(size: tuple[int, int]) -> tuple[int, int]:
    try:
        height, width = (operator.index(side) for side in size)
    except (TypeError, ValueError):
        raise RleError(f"size must be two whole numbers (height, width), not {size!r}") from None
    if not 0 < height < 2**31 or not 0 < width < 2**31:
        raise RleError(f"size must be at least 1 x 1 pixel and below 2^31 a side, not {height} x {width}")
    return height, width


def _bounds(part: slice, length: int) -> tuple[int, int]:
    start, stop = part.start, part.stop
    if not (isinstance(start, int) and isinstance(stop, int) and 0 <= start < stop <= length):
        raise ValueError(f"a part must be slice(start, stop) with 0 <= start < stop <= {length}, not {part}")
    return start, stop


def _entry(n: int, entry: Counts, faults: dict[int, str]) -> bytes | array:
    """The counts of mask n as bytes or int64; empty, with a fault noted, where they are neither."""
    if isinstance(entry, (bytes, bytearray)):
        return bytes(entry)
    if isinstance(entry, str):
        # Latin-1 keeps one byte a character, so that the decoder itself finds and names a stray one.
        try:
            return entry.encode("latin-1")
        except UnicodeEncodeError as error:
            faults[n] = f"counts have the character {entry[error.start]!r}, not one of '0' to 'o'"
            return b""
    try:
        try:
            return array("q", entry)
        except OverflowError:
            # Negative, or beyond any mask, as they are.
            return array("q", [min(max(-1, run), 2**62) for run in entry])
    except TypeError:
        faults[n] = f"counts must be bytes, str or a list of whole numbers, not {entry!r:.80}"
        return b""


def _explain(fault: Fault, detail: int, height: int, width: int) -> str:
    return {
        Fault.CHARACTER: f"run {detail} of its counts has a character that is not one of '0' to 'o'",
        Fault.TRUNCATED: f"its counts end inside run {detail}; the text was cut off",
        Fault.TOO_LONG: f"run {detail} of its counts has more than {MAX_CHARACTERS} characters",
        Fault.NEGATIVE: f"run {detail} of its counts is negative",
        Fault.BEYOND: f"run {detail} of its counts goes beyond the {height} x {width} pixels of the mask",
        Fault.SHORT: f"its counts cover {detail} of the {height} x {width} = {height * width} pixels of the mask",
    }[fault]


def _fake_parse(counts: Tensor, offsets: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    masks = offsets.shape[0] - 1
    shapes = ((counts.shape[0],), (masks,), (masks,), (masks, 2))
    return tuple(offsets.new_empty(shape) for shape in shapes)


def _fake_masks(ends: Tensor, masks: int, rows: int, columns: int, packed: bool) -> Tensor:
    dtype = torch.uint8 if packed else torch.bool
    return ends.new_empty((masks, rows, -(-columns // 8) if packed else columns), dtype=dtype)


def _fake_decode(ends: Tensor, starts: Tensor, lengths: Tensor, height: int, width: int, packed: bool) -> Tensor:
    return _fake_masks(ends, starts.shape[0], height, width, packed)


def _fake_resample(ends: Tensor, starts: Tensor, *rest) -> Tensor:
    *_, side, _, packed = rest
    return _fake_masks(ends, starts.shape[0], side, side, packed)


rle_parse = library.Operator(
    "rle_parse",
    "(Tensor counts, Tensor offsets, int height, int width)"
    " -> (Tensor ends, Tensor lengths, Tensor areas, Tensor status)",
    reference=reference.parse,
    fake=_fake_parse,
    slower="a hundred times slower",
)
rle_decode = library.Operator(
    "rle_decode",
    "(Tensor ends, Tensor starts, Tensor lengths, int height, int width, bool packed) -> Tensor",
    reference=reference.decode,
    fake=_fake_decode,
    triton=library.lazy(__package__, "triton:decode"),
    slower="about ten times slower",
)
rle_resample = library.Operator(
    "rle_resample",
    "(Tensor ends, Tensor starts, Tensor lengths, int height, int width, int top, int bottom, int left, int right, "
    "int to_top, int to_bottom, int to_left, int to_right, int side, bool flip, bool packed) -> Tensor",
    reference=reference.resample,
    fake=_fake_resample,
    triton=library.lazy(__package__, "triton:resample"),
    slower="a hundred times slower",
)
