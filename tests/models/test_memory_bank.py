"""Which memories a frame attends to."""

from __future__ import annotations

import pytest
import torch

from sam2fast.models.architecture import architecture
from sam2fast.models.memory_bank import FrameMemory, closest_conditioning, select_memories

ARCH = architecture("micro")


def memory(frame: int, conditioning: bool = False, encoded: bool = True) -> FrameMemory:
    return FrameMemory(frame, torch.zeros(1) if encoded else None, torch.zeros(1), conditioning)


def select(memories, frame, num_frames=20, training=True, reverse=False, arch=ARCH):
    """Frames with their rows, and frames with their distances."""
    chosen = select_memories(memories, frame, num_frames, arch, training, reverse)
    return [(m.frame, row) for m, row in chosen.spatial], [(m.frame, distance) for m, distance in chosen.pointers]


def test_the_first_tracked_frame_sees_the_prompted_one():
    assert select([memory(0, conditioning=True)], 1) == ([(0, 6)], [(0, 1)])


def test_six_previous_frames_and_every_conditioning_frame():
    memories = [memory(0, conditioning=True)] + [memory(t) for t in range(1, 12)]
    spatial, pointers = select(memories, 12)
    assert spatial == [(0, 6), (6, 5), (7, 4), (8, 3), (9, 2), (10, 1), (11, 0)]
    assert pointers == [(0, 12)] + [(12 - d, d) for d in range(1, 12)]


def test_pointers_reach_back_one_less_than_the_clip_is_long():
    memories = [memory(0, conditioning=True)] + [memory(t) for t in range(1, 30)]
    _, long_clip = select(memories, 30, num_frames=100)
    assert long_clip == [(0, 30)] + [(30 - d, d) for d in range(1, 16)]
    _, short_clip = select([memory(0, conditioning=True), *(memory(t) for t in range(1, 4))], 4, num_frames=3)
    assert short_clip == [(0, 4), (3, 1), (2, 2)]


@pytest.mark.parametrize("training", [True, False])
def test_conditioning_frames_of_the_future_give_pointers_in_training_alone(training):
    memories = [memory(0, conditioning=True), memory(5, conditioning=True)]
    spatial, pointers = select(memories, 3, training=training)
    assert spatial == [(0, 6), (5, 6)]
    assert pointers == ([(0, 3), (5, -2)] if training else [(0, 3)])


def test_tracking_backwards_mirrors_time():
    memories = [memory(9, conditioning=True), memory(8), memory(7), memory(2, conditioning=True)]
    spatial, pointers = select(memories, 6, num_frames=10, training=False, reverse=True)
    assert spatial == [(9, 6), (2, 6), (8, 1), (7, 0)]
    assert pointers == [(9, 3), (7, 1), (8, 2)]


def test_conditioning_frames_over_the_limit_count_as_previous_frames():
    arch = architecture("micro", max_conditioning_frames=2)
    memories = [memory(t, conditioning=True) for t in (0, 3, 4)] + [memory(5)]
    spatial, pointers = select(memories, 6, arch=arch)
    assert spatial == [(4, 6), (3, 6), (0, 5), (5, 0)]
    assert pointers == [(4, 2), (3, 3), (5, 1), (0, 6)]


def test_frames_that_were_not_encoded_still_give_pointers():
    spatial, pointers = select([memory(0, conditioning=True), memory(1, encoded=False)], 2)
    assert spatial == [(0, 6)]
    assert pointers == [(0, 2), (1, 1)]


@pytest.mark.parametrize(
    ("frame", "frames", "limit", "want"),
    [
        (5, [3, 10, 11, 12, 30], None, [3, 10, 11, 12, 30]),
        (5, [3, 10, 11, 12, 30], 2, [3, 10]),
        (5, [3, 10, 11, 12, 30], 3, [3, 10, 11]),
        (40, [3, 10, 30], 2, [30, 10]),
        (0, [3, 10, 30], 2, [3, 10]),
        (10, [3, 10, 30], 2, [3, 10]),
    ],
)
def test_closest_conditioning(frame, frames, limit, want):
    assert closest_conditioning(frames, frame, limit) == want
