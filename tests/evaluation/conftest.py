"""Records in memory and a model that needs no weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest


@dataclass
class Record:
    """Moving rectangles: object k on frame t covers `boxes[k][t]` = (top, bottom, left, right), None where absent."""

    name: str
    boxes: dict[int, list[tuple[int, int, int, int] | None]]
    annotated: list[int]
    size: tuple[int, int] = (40, 60)
    requests: list[list[int]] = field(default_factory=list)
    """Frame numbers of each call of `frames`."""

    @property
    def num_frames(self) -> int:
        return len(next(iter(self.boxes.values())))

    def frames(self, indices) -> list[np.ndarray]:
        self.requests.append(list(indices))
        return [np.full((*self.size, 3), index, np.uint8) for index in indices]

    def masks(self, frame: int) -> dict[int, np.ndarray]:
        assert frame in self.annotated
        return {k: self.truth(k, frame) for k, track in self.boxes.items() if track[frame]}

    def truth(self, object_id: int, frame: int) -> np.ndarray:
        mask = np.zeros(self.size, bool)
        if box := self.boxes[object_id][frame]:
            mask[box[0] : box[1], box[2] : box[3]] = True
        return mask


class Records(list):
    name = "boxes"


class NoModel:
    training = False


@pytest.fixture
def records():
    """Two videos of 12 frames, annotated on every second; in the second one object comes late and one leaves."""
    slide = [(5, 25, 2 + 3 * t, 20 + 3 * t) for t in range(12)]
    late = [None if t < 4 else (10, 30, 30, 50) for t in range(12)]
    leaves = [(2, 12, 2, 12) if t < 5 else None for t in range(12)]
    return Records(
        [
            Record("first", {1: slide}, list(range(0, 12, 2))),
            Record("second", {1: leaves, 7: late}, list(range(0, 12, 2))),
        ]
    )


@pytest.fixture
def no_model():
    return NoModel()
