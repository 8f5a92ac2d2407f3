"""The memory bank: which memories and object pointers a frame attends to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .architecture import Architecture


@dataclass
class FrameMemory:
    """What later frames need from a frame."""

    frame: int
    spatial: Tensor | None
    """Memory features [N, 64, h, w]; None where not encoded."""
    pointer: Tensor
    """Object pointers [N, 256]."""
    conditioning: bool
    """Whether the user prompted the frame."""


@dataclass(frozen=True)
class MemorySelection:
    """Memories a frame attends to, in order."""

    spatial: list[tuple[FrameMemory, int]]
    """With the row of the temporal encoding: 0 for the previous frame up to 5 for six frames ago, 6 for conditioning
    frames at any distance."""
    pointers: list[tuple[FrameMemory, int]]
    """With the distance in frames, positive into the past of the tracking direction."""


def select_memories(
    memories: Sequence[FrameMemory],
    frame: int,
    num_frames: int,
    arch: Architecture,
    training: bool,
    reverse: bool = False,
) -> MemorySelection:
    """Choose what `frame` attends to by the rules of the official code (SAM 2, arXiv 2408.00714, section 4).

    Spatial memories: the conditioning frames, then the previous `num_memories - 1` frames, oldest first. Pointers: the
    conditioning frames (in training also those of the future), then the previous min(num_frames, max_pointers) - 1
    frames, latest first. Where `max_conditioning_frames` leaves conditioning frames out, they count as previous frames.

    Args:
        memories: of other frames, in the order they were made.
        num_frames: length of the clip.
        reverse: tracking runs backwards, so that the "previous" frame is the next one in time.
    """
    direction = -1 if reverse else 1
    prompted = {m.frame: m for m in memories if m.conditioning}
    chosen = closest_conditioning(list(prompted), frame, arch.max_conditioning_frames)
    conditioning = [prompted[t] for t in chosen]
    others = {m.frame: m for m in memories if m.frame not in chosen}

    spatial = [(m, arch.num_memories - 1) for m in conditioning]
    for distance in range(arch.num_memories - 1, 0, -1):
        memory = others.get(frame - direction * distance)
        if memory is not None:
            spatial.append((memory, distance - 1))

    pointers = [(m, (frame - m.frame) * direction) for m in conditioning]
    if not training:
        pointers = [(m, distance) for m, distance in pointers if distance >= 0]
    for distance in range(1, min(num_frames, arch.max_pointers)):
        memory = others.get(frame - direction * distance)
        if memory is not None:
            pointers.append((memory, distance))
    return MemorySelection([(m, row) for m, row in spatial if m.spatial is not None], pointers)


def closest_conditioning(conditioning: Sequence[int], frame: int, limit: int | None) -> list[int]:
    """At most `limit` (2 or more) conditioning frames: the last before `frame`, the first from `frame` on, then the
    closest in time."""
    if limit is None or len(conditioning) <= limit:
        return list(conditioning)
    before = max((t for t in conditioning if t < frame), default=None)
    after = min((t for t in conditioning if t >= frame), default=None)
    chosen = [t for t in (before, after) if t is not None]
    rest = sorted((t for t in conditioning if t not in chosen), key=lambda t: abs(t - frame))
    return chosen + rest[: limit - len(chosen)]
