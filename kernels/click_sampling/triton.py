"""Triton kernels of the click operators: uniform clicks in two passes, centers by column depths and a search of rows.

README.md has the derivation; reference.py is the ground truth; ../bilinear.py the geometry.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bilinear import blend, lanes_for, load_samples, warps_for
from ..launch import Launch

PIXELS = 1024
"""Pixels of a row that a program counts together."""
BLOCK = 256
"""Rows or pixels that the search passes together."""
ROWS = 8
"""Full-resolution rows that a program counts."""
COLUMNS = 128
"""Columns whose depths a program follows up and down the image, and pixels of a row whose depth it finds together."""
OTHERS = 32
"""Pixels that they are compared with at a time."""

_RUNTIME = ("height", "width")
"""Compiled once for all values."""


@triton.jit
def _classify(
    logits, logits_y, logits_x, targets, targets_y, targets_x, y, columns, height, width,
    FACTOR: tl.constexpr, PACKED: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Pixels of full-resolution row `y` around low-resolution columns: predicted, in the target, in the image; flat.

    Each column has `SPAN` of them, a power of two; those from `FACTOR` on are not in the image.
    """
    row = y // FACTOR
    samples = tl.minimum(columns, width - 1)
    # In samples, from the sample to this row of pixels and to the pixels of each lane.
    down = tl.cast(2 * (y % FACTOR) + 1 - FACTOR, tl.float32) * (0.5 / FACTOR)
    index = tl.arange(0, SPAN)[None, :]
    across = tl.cast(2 * index + 1 - FACTOR, tl.float32) * (0.5 / FACTOR)
    beside = tl.where(down < 0, tl.maximum(row - 1, 0), tl.minimum(row + 1, height - 1))
    own, left, right = load_samples(logits, row, logits_y, logits_x, samples, width, FACTOR)
    other, other_left, other_right = load_samples(logits, beside, logits_y, logits_x, samples, width, FACTOR)
    own, left, right = blend(own, left, right, other, other_left, other_right, tl.abs(down), FACTOR)
    step = tl.where(across < 0, left[:, None], right[:, None])
    predicted = own[:, None] + tl.abs(across) * step > 0

    x = columns[:, None] * FACTOR + index
    valid = (columns < width)[:, None] & (index < FACTOR)
    truth = targets + y.to(tl.int64) * targets_y
    if PACKED:
        byte = tl.load(truth + (x >> 3).to(tl.int64) * targets_x, mask=valid, other=0)
        inside = (byte.to(tl.int32) >> (x & 7)) & 1
    else:
        inside = tl.load(truth + x.to(tl.int64) * targets_x, mask=valid, other=0)
    size: tl.constexpr = columns.shape[0] * SPAN
    return tl.reshape(predicted, [size]), tl.reshape(inside != 0, [size]), tl.reshape(valid, [size])


@triton.jit(do_not_specialize=_RUNTIME)
def count_kernel(
    logits, logits_n, logits_y, logits_x, targets, targets_n, targets_y, targets_x, counts, height, width,
    FACTOR: tl.constexpr, PACKED: tl.constexpr, SPAN: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Wrong and background pixels of `ROWS` full-resolution rows, int32 [N, H, 2]; `height`, `width` of the logits."""
    full_height = height * FACTOR
    blocks = tl.cdiv(full_height, ROWS)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    plane, truth = logits + n * logits_n, targets + n * targets_n
    y = tl.program_id(0) % blocks * ROWS
    for _ in range(0, tl.minimum(ROWS, full_height - y)):
        wrong = tl.zeros([LANES * SPAN], tl.int32)
        background = tl.zeros([LANES * SPAN], tl.int32)
        for first in range(0, width, LANES):
            columns = first + tl.arange(0, LANES)
            predicted, inside, valid = _classify(
                plane, logits_y, logits_x, truth, targets_y, targets_x, y, columns, height, width, FACTOR, PACKED, SPAN
            )
            wrong += (valid & (predicted != inside)).to(tl.int32)
            background += (valid & (inside == 0)).to(tl.int32)
        out = counts + (n * full_height + y) * 2
        tl.store(out, tl.sum(wrong))
        tl.store(out + 1, tl.sum(background))
        y += 1


@triton.jit(do_not_specialize=_RUNTIME)
def pick_kernel(
    logits, logits_n, logits_y, logits_x, targets, targets_n, targets_y, targets_x,
    counts, uniform, coords, positive, height, width,
    FACTOR: tl.constexpr, PACKED: tl.constexpr, SPAN: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The pixel of one object whose rank among those of its region is floor(uniform * size)."""
    full_height = height * FACTOR
    n = tl.program_id(0).to(tl.int64)
    counts += n * full_height * 2
    rows = tl.arange(0, BLOCK)
    wrong = tl.zeros([BLOCK], tl.int64)
    background = tl.zeros([BLOCK], tl.int64)
    for first in range(0, full_height, BLOCK):
        valid = first + rows < full_height
        wrong += tl.load(counts + (first + rows) * 2, mask=valid, other=0)
        background += tl.load(counts + (first + rows) * 2 + 1, mask=valid, other=0)
    any_wrong = tl.sum(wrong) > 0
    size = tl.where(any_wrong, tl.sum(wrong), tl.sum(background))
    # The product may round up to the size. An empty region has rank -1, which every row and column is beyond.
    rank = tl.minimum((tl.load(uniform + n) * size.to(tl.float64)).to(tl.int64), size - 1)

    counts += tl.where(any_wrong, 0, 1)
    y, above, seen = tl.zeros([], tl.int32), tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    for first in range(0, full_height, BLOCK):
        valid = first + rows < full_height
        pixels = tl.load(counts + (first + rows) * 2, mask=valid, other=0).to(tl.int64)
        passed = valid & (seen + tl.cumsum(pixels) <= rank)
        y += tl.sum(passed.to(tl.int32))
        above += tl.sum(tl.where(passed, pixels, 0))
        seen += tl.sum(pixels)

    plane, truth = logits + n * logits_n, targets + n * targets_n
    x, seen, missed = tl.zeros([], tl.int32), tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    rank = (rank - above).to(tl.int32)
    for first in range(0, width, LANES):
        columns = first + tl.arange(0, LANES)
        predicted, inside, valid = _classify(
            plane, logits_y, logits_x, truth, targets_y, targets_x, y, columns, height, width, FACTOR, PACKED, SPAN
        )
        chosen = valid & tl.where(any_wrong, predicted != inside, inside == 0)
        pixels = chosen.to(tl.int32)
        up_to = seen + tl.cumsum(pixels)
        x += tl.sum((valid & (up_to <= rank)).to(tl.int32))
        missed += tl.sum((chosen & inside & (up_to == rank + 1)).to(tl.int32))
        seen += tl.sum(pixels)
    # Compiled for itself, this kernel might round a logit to another side of 0 than the counting did.
    tl.store(coords + 2 * n, tl.minimum(x, width * FACTOR - 1))
    tl.store(coords + 2 * n + 1, y)
    tl.store(positive + n, any_wrong & (missed > 0))


@triton.jit
def _deepen(kind, neighbor):
    """Column depth of pixels of `kind` 1 (missed), -1 (false) or 0 beside pixels of depth `neighbor`."""
    same = ((kind > 0) & (neighbor > 0)) | ((kind < 0) & (neighbor < 0))
    return kind + tl.where(same, neighbor, 0)


@triton.jit(do_not_specialize=_RUNTIME)
def column_depth_kernel(
    logits, logits_n, logits_y, logits_x, targets, targets_n, targets_y, targets_x, depth, height, width,
    FACTOR: tl.constexpr, PACKED: tl.constexpr, SPAN: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Depth of wrong pixels within their columns, [N, H, W]: positive for missed, negative for false ones, else 0."""
    full_height, full_width = height * FACTOR, width * FACTOR
    blocks = tl.cdiv(width, LANES)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    plane, truth = logits + n * logits_n, targets + n * targets_n
    columns = tl.program_id(0) % blocks * LANES + tl.arange(0, LANES)
    x = tl.reshape(columns[:, None] * FACTOR + tl.arange(0, SPAN)[None, :], [LANES * SPAN])
    inside_image = tl.reshape((columns < width)[:, None] & (tl.arange(0, SPAN) < FACTOR)[None, :], [LANES * SPAN])
    depth += n * full_height * full_width + x
    y = tl.zeros([], tl.int32)
    above = tl.zeros([LANES * SPAN], tl.int32)
    for _ in range(0, full_height):
        predicted, inside, valid = _classify(
            plane, logits_y, logits_x, truth, targets_y, targets_x, y, columns, height, width, FACTOR, PACKED, SPAN
        )
        above = _deepen(inside.to(tl.int32) - predicted.to(tl.int32), above)
        tl.store(depth + y.to(tl.int64) * full_width, above, mask=valid)
        y += 1
    tl.debug_barrier()  # what one thread stored, another may load
    below = tl.zeros([LANES * SPAN], tl.int32)
    for _ in range(0, full_height):
        y -= 1
        place = depth + y.to(tl.int64) * full_width
        value = tl.load(place, mask=inside_image, other=0).to(tl.int32)
        kind = (value > 0).to(tl.int32) - (value < 0).to(tl.int32)
        below = _deepen(kind, below)
        below = tl.where(value * kind > below * kind, below, value)
        tl.store(place, below, mask=inside_image)


@triton.jit(do_not_specialize=_RUNTIME)
def deepest_in_row_kernel(depth, squared, columns, height, width, BLOCK: tl.constexpr, OTHERS: tl.constexpr):
    """Largest squared depth of missed and false pixels in one row, float32 [N, 2, H], and its first column, int64."""
    row = tl.program_id(0).to(tl.int64)
    depth += row * width
    deepest_missed, deepest_false = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    column_missed, column_false = tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    for first in range(0, width, BLOCK):
        x = first + tl.arange(0, BLOCK)
        value = tl.load(depth + x, mask=x < width, other=0).to(tl.float32)
        if tl.max(tl.abs(value)) > 0:
            # The pixels beside the image.
            edge = tl.minimum(x + 1, width - x).to(tl.float32)
            lowest = edge * edge
            for start in range(0, width, OTHERS):
                other = start + tl.arange(0, OTHERS)
                beside = tl.load(depth + other, mask=other < width, other=0).to(tl.float32)
                # 0 where the other pixel is of another kind.
                within = tl.where(value[:, None] > 0, tl.maximum(beside, 0)[None, :], tl.minimum(beside, 0)[None, :])
                across = (x[:, None] - other[None, :]).to(tl.float32)
                candidate = tl.where(other[None, :] < width, within * within + across * across, float("inf"))
                lowest = tl.minimum(lowest, tl.min(candidate, axis=1))
            missed = tl.where(value > 0, lowest, 0)
            if tl.max(missed) > deepest_missed:
                deepest_missed = tl.max(missed)
                column_missed = (first + tl.argmax(missed, axis=0)).to(tl.int64)
            false = tl.where(value < 0, lowest, 0)
            if tl.max(false) > deepest_false:
                deepest_false = tl.max(false)
                column_false = (first + tl.argmax(false, axis=0)).to(tl.int64)
    place = row // height * 2 * height + row % height
    tl.store(squared + place, deepest_missed)
    tl.store(columns + place, column_missed)
    tl.store(squared + place + height, deepest_false)
    tl.store(columns + place + height, column_false)


def click_uniform(logits: Tensor, targets: Tensor, packed: bool, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.click_uniform`."""
    count, pick = uniform_launches(logits, targets, packed, uniform)
    count.run()
    pick.run()
    return pick.arguments["coords"], pick.arguments["positive"]


def click_center(logits: Tensor, targets: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    """See `reference.click_center`."""
    down_columns, along_rows = center_launches(logits, targets, packed)
    down_columns.run()
    along_rows.run()
    deepest, y = along_rows.arguments["squared"].max(dim=2)  # [N, 2], the first of equal rows
    positive = deepest[:, 0] > deepest[:, 1]
    x = along_rows.arguments["columns"].gather(2, y[:, :, None])[:, :, 0]
    coords = torch.stack([x, y], dim=2)  # [N, 2, (x, y)]
    return torch.where(positive[:, None], coords[:, 0], coords[:, 1]), positive


def uniform_launches(logits: Tensor, targets: Tensor, packed: bool, uniform: Tensor) -> tuple[Launch, Launch]:
    """Counts of all rows, then the search; `coords` and `positive` are the results."""
    n, height = targets.shape[:2]
    counts = {"counts": logits.new_empty((n, height, 2), dtype=torch.int32)}
    counting = _inputs(logits, targets, packed, PIXELS) | counts | {"ROWS": ROWS}
    searching = _inputs(logits, targets, packed, BLOCK) | counts | {"BLOCK": BLOCK}
    searching |= {
        "uniform": uniform.contiguous(),
        "coords": logits.new_empty((n, 2), dtype=torch.int64),
        "positive": logits.new_empty(n, dtype=torch.bool),
    }
    count = Launch(count_kernel, n * triton.cdiv(height, ROWS), counting, _warps(counting))
    return count, Launch(pick_kernel, n, searching, _warps(searching))


def center_launches(logits: Tensor, targets: Tensor, packed: bool) -> tuple[Launch, Launch]:
    """Depths within columns, then the `squared` depths and `columns` [N, 2, H] of the deepest pixels of each row."""
    inputs = _inputs(logits, targets, packed, COLUMNS)
    n, height, width = len(targets), targets.shape[1], logits.shape[2] * inputs["FACTOR"]
    depth = logits.new_empty((n, height, width), dtype=torch.int16 if height < 2**15 else torch.int32)
    blocks = triton.cdiv(logits.shape[2], inputs["LANES"])
    deepest = {
        "depth": depth,
        "squared": logits.new_empty((n, 2, height), dtype=torch.float32),
        "columns": logits.new_empty((n, 2, height), dtype=torch.int64),
        "height": height,
        "width": width,
        "BLOCK": COLUMNS,
        "OTHERS": OTHERS,
    }
    down_columns = Launch(column_depth_kernel, n * blocks, inputs | {"depth": depth})
    return down_columns, Launch(deepest_in_row_kernel, n * height, deepest)


def _inputs(logits: Tensor, targets: Tensor, packed: bool, pixels: int) -> dict:
    """What the kernels have in common that look at `pixels` pixels of a row together."""
    targets = targets.view(torch.uint8)
    factor = targets.shape[1] // logits.shape[1]
    span = triton.next_power_of_2(factor)
    return {
        "logits": logits,
        **{f"logits_{axis}": stride for axis, stride in zip("nyx", logits.stride(), strict=True)},
        "targets": targets,
        **{f"targets_{axis}": stride for axis, stride in zip("nyx", targets.stride(), strict=True)},
        "height": logits.shape[1],
        "width": logits.shape[2],
        "FACTOR": factor,
        "PACKED": packed,
        "SPAN": span,
        "LANES": lanes_for(logits.shape[2], max(1, pixels // span)),
    }


def _warps(inputs: dict) -> int:
    return warps_for(inputs["LANES"], inputs["SPAN"])
