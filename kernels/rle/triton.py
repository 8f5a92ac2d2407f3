"""Triton kernels of the run-length operators: every pixel looks up its run by binary search; see README.md."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch
from .reference import MAX_TARGET

ROWS, COLUMNS, WARPS = 16, 32, 8
"""Pixels of a program. Runs go down the columns, bytes along the rows; more pixels for a thread, and it spills."""

_VARYING = (
    "steps height width top bottom left right to_top to_bottom to_left to_right side row_tiles column_tiles".split()
)
"""Arguments for whose values nothing is compiled anew."""


@triton.jit
def _is_foreground(ends, length, position, steps):
    """Whether the number of the first `length` ends up to `position` is odd; 2^steps is more than `length`."""
    count = tl.zeros_like(position)
    step = tl.full([], 1, tl.int64) << steps
    for _ in range(0, steps):
        step = step >> 1
        more = count + step
        valid = more <= length
        end = tl.load(ends + more - 1, mask=valid, other=0)
        count = tl.where(valid & (end <= position), more, count)
    return count & 1


@triton.jit
def _place(row_tiles, column_tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Mask, rows and columns of a program, int64."""
    program = tl.program_id(0).to(tl.int64)
    tile = program // column_tiles
    rows = tile % row_tiles * ROWS + tl.arange(0, ROWS)
    return tile // row_tiles, rows[:, None], (program % column_tiles * COLUMNS + tl.arange(0, COLUMNS))[None, :]


@triton.jit
def _store(masks, n, rows, columns, height, width, inside, PACKED: tl.constexpr):
    """Write pixels, 0 or 1, of mask n."""
    if PACKED:
        count: tl.constexpr = columns.shape[1] // 8
        bits = tl.reshape(inside.to(tl.int32), [rows.shape[0], count, 8]) << tl.arange(0, 8)[None, None, :]
        stride = (width + 7) // 8
        # The first columns of the bytes: those of a tile are a multiple of 8.
        bytes = tl.min(columns, axis=1, keep_dims=True) // 8 + tl.arange(0, count)[None, :]
        place = (n * height + rows) * stride + bytes
        tl.store(masks + place, tl.sum(bits, axis=2).to(tl.uint8), mask=(rows < height) & (bytes < stride))
    else:
        place = (n * height + rows) * width + columns
        tl.store(masks + place, inside.to(tl.int8), mask=(rows < height) & (columns < width))


@triton.jit(do_not_specialize=_VARYING)
def decode_kernel(
    ends, starts, lengths, masks, steps, height, width, row_tiles, column_tiles,
    PACKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of one mask at full size."""
    n, rows, columns = _place(row_tiles, column_tiles, ROWS, COLUMNS)
    own = ends + tl.load(starts + n)
    inside = _is_foreground(own, tl.load(lengths + n), columns * height + rows, steps)
    inside = tl.where((rows < height) & (columns < width), inside, 0)
    _store(masks, n, rows, columns, height, width, inside, PACKED)


@triton.jit
def _neighbors(target, length, source):
    """The two source pixels around target pixels of a resize of `source` to `length`, and the share of the second one,
    of 2 * length."""
    place = (2 * target + 1) * source - length
    # Division of what is never negative: below 0 it would round towards 0.
    low = tl.where(place < 0, -1, tl.maximum(place, 0) // (2 * length))
    share = place - low * 2 * length
    return tl.maximum(low, 0), tl.minimum(low + 1, source - 1), share


@triton.jit(do_not_specialize=_VARYING)
def resample_kernel(
    ends, starts, lengths, masks, steps, height, top, bottom, left, right, to_top, to_bottom, to_left, to_right, side,
    row_tiles, column_tiles,
    FLIP: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of the square."""
    n, rows, columns = _place(row_tiles, column_tiles, ROWS, COLUMNS)
    own = ends + tl.load(starts + n)
    length = tl.load(lengths + n)
    x = columns
    if FLIP:
        x = side - 1 - columns
    filled = (rows >= to_top) & (rows < to_bottom) & (x >= to_left) & (x < to_right)
    tall, wide = tl.cast(to_bottom - to_top, tl.int64), tl.cast(to_right - to_left, tl.int64)
    y = tl.minimum(tl.maximum(rows - to_top, 0), tall - 1)
    x = tl.minimum(tl.maximum(x - to_left, 0), wide - 1)
    above, below, down = _neighbors(y, tall, bottom - top)
    before, behind, across = _neighbors(x, wide, right - left)
    first, second = (left + before) * height + top, (left + behind) * height + top
    upper = (2 * wide - across) * _is_foreground(own, length, first + above, steps)
    upper += across * _is_foreground(own, length, second + above, steps)
    lower = (2 * wide - across) * _is_foreground(own, length, first + below, steps)
    lower += across * _is_foreground(own, length, second + below, steps)
    share = (2 * tall - down) * upper + down * lower
    inside = tl.where(filled & (2 * share >= 4 * tall * wide), 1, 0)
    _store(masks, n, rows, columns, side, side, inside, PACKED)


def decode(ends: Tensor, starts: Tensor, lengths: Tensor, height: int, width: int, packed: bool) -> Tensor:
    """See `reference.decode`; the ends must be those of `parse`, else the masks are meaningless."""
    launch = decode_launch(ends, starts, lengths, height, width, packed)
    launch.run()
    return launch.arguments["masks"]


def resample(ends: Tensor, starts: Tensor, lengths: Tensor, height: int, width: int, *place: int) -> Tensor:
    """See `reference.resample`; the ends must be those of `parse`, else the masks are meaningless."""
    launch = resample_launch(ends, starts, lengths, height, width, *place)
    launch.run()
    return launch.arguments["masks"]


def decode_launch(ends: Tensor, starts: Tensor, lengths: Tensor, height: int, width: int, packed: bool) -> Launch:
    """Leaves `masks` [N, H, W or bytes]."""
    _check("rle_decode", ends, starts, lengths, height, width)
    arguments, programs = _arguments(ends, starts, lengths, height, width, packed)
    return Launch(decode_kernel, programs, arguments | {"height": height, "width": width}, WARPS)


def resample_launch(
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
) -> Launch:
    """Leaves `masks` [N, side, side or bytes]."""
    _check("rle_resample", ends, starts, lengths, height, width)
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        raise RuntimeError("rle_resample: the source must be a part of the mask")
    if not (side <= MAX_TARGET and 0 <= to_top < to_bottom <= side and 0 <= to_left < to_right <= side):
        raise RuntimeError("rle_resample: the target must be a part of the square, which is at most 2^15 a side")
    arguments, programs = _arguments(ends, starts, lengths, side, side, packed)
    place = {"height": height, "top": top, "bottom": bottom, "left": left, "right": right, "side": side, "FLIP": flip}
    place |= {"to_top": to_top, "to_bottom": to_bottom, "to_left": to_left, "to_right": to_right}
    return Launch(resample_kernel, programs, arguments | place, WARPS)


def _check(name: str, ends: Tensor, starts: Tensor, lengths: Tensor, height: int, width: int) -> None:
    """What the host can see without waiting for the device."""
    fits = len(starts) == len(lengths) if starts.dim() == lengths.dim() == ends.dim() == 1 else False
    if not fits or any(tensor.dtype != torch.int64 for tensor in (ends, starts, lengths)):
        raise RuntimeError(f"{name}: ends must be int64 [L], starts and lengths int64 [N]")
    if not 0 < height < 2**31 or not 0 < width < 2**31:
        raise RuntimeError(f"{name}: height and width must be 1 to 2^31 - 1, not {height} x {width}")


def _arguments(
    ends: Tensor, starts: Tensor, lengths: Tensor, rows: int, columns: int, packed: bool
) -> tuple[dict, int]:
    """Arguments of both kernels for masks of `rows` x `columns`, and the number of programs."""
    row_tiles, column_tiles = triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS)
    shape, dtype = (len(starts), rows, -(-columns // 8) if packed else columns), torch.uint8 if packed else torch.bool
    arguments = {
        "ends": ends.contiguous(),
        "starts": starts.contiguous(),
        "lengths": lengths.contiguous(),
        "masks": ends.new_empty(shape, dtype=dtype),
        "steps": ends.numel().bit_length(),
        "row_tiles": row_tiles,
        "column_tiles": column_tiles,
        "PACKED": packed,
        "ROWS": ROWS,
        "COLUMNS": COLUMNS,
    }
    return arguments, len(starts) * row_tiles * column_tiles
