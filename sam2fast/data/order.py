"""The endless order of samples: passes over the records, repeats, and steps whose samples have equally many objects.

Everything is a function of the seed, the sample number and the repeats; with balance also of the samples of an
optimizer step (`group`) and of the objects that were counted. How the samples are split over ranks, micro-batches and
loader processes changes nothing.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .index import ObjectCounts
from .mixture import repeat_counts
from .sample import DataError

_ORDER, _CONTENT, _REPEAT = 0, 1, 2  # the independent streams of random numbers of a seed


@dataclass(frozen=True)
class Slot:
    """What the order says of a sample."""

    record: int
    """Index of its record."""
    objects: int | None = None
    """Objects that its first frame should show; None leaves that open."""


class SampleOrder:
    """Records by sample number n = 0, 1, 2, ...: epoch after epoch, each in an order of its own.

    With `first_frames` every run of `group` numbers (the samples of an optimizer step) gets samples of about the same
    number of objects. For each sample of an epoch one of the frames in which it may begin is drawn, and with it a
    number of objects, so all numbers come as often as without balance. Sorted by it, the samples are cut into groups,
    and the groups shuffled. Groups that two epochs share come from the middle of both.

    Args:
        records: how many there are.
        seed: one number or several.
        group: samples of an optimizer step over all ranks.
        repeat: how often each record comes in an epoch, on average, [records]; None is once.
        first_frames: objects in the frames of each record in which a clip may begin; None does not balance.

    Raises:
        DataError: no record is ever used.
    """

    def __init__(
        self,
        records: int,
        seed: int | Sequence[int],
        group: int = 1,
        repeat: Sequence[float] | None = None,
        first_frames: ObjectCounts | None = None,
    ):
        self._records, self._seed, self._group = records, seed, group
        # a tensor, which loader processes share
        self._repeat = None if repeat is None else torch.from_numpy(np.asarray(repeat, np.float32))
        if self._repeat is not None and not self._repeat.any():
            raise DataError("`repeat_names` gives every record a repeat of 0; leave some")
        self._first_frames = first_frames
        self._ends: list[int] = []  # with repeats: sample number at which each epoch ends
        self._epoch = -1
        self._order, self._objects = np.empty(0, np.int32), None

    def __getitem__(self, number: int) -> Slot:
        epoch, place = self.locate(number)
        if epoch != self._epoch:
            self._draw(epoch, number - place)
        return Slot(int(self._order[place]), None if self._objects is None else int(self._objects[place]))

    def locate(self, number: int) -> tuple[int, int]:
        """Epoch of a sample, and its place in the epoch."""
        if self._repeat is None:
            return divmod(number, self._records)
        while not self._ends or self._ends[-1] <= number:
            size = int(self._counts(len(self._ends)).sum())
            self._ends.append(size + (self._ends[-1] if self._ends else 0))
        epoch = bisect.bisect_right(self._ends, number)
        return epoch, number - (self._ends[epoch - 1] if epoch else 0)

    def generator(self, number: int) -> np.random.Generator:
        """Random numbers for the content of a sample."""
        return self._generator(_CONTENT, number)

    def _draw(self, epoch: int, start: int) -> None:
        """Order of an epoch whose first sample is number `start`."""
        rng = self._generator(_ORDER, epoch)
        records = np.arange(self._records, dtype=np.int32)
        if self._repeat is not None:
            records = np.repeat(records, self._counts(epoch))
        if self._first_frames is None or self._group == 1:
            self._order = rng.permutation(records)
        else:
            objects = self._first_frames.draw(records, rng)
            places = _deal(objects, start, self._group, rng)
            self._order, self._objects = records[places], objects[places]
        self._epoch = epoch

    def _counts(self, epoch: int) -> np.ndarray:
        seed = np.random.SeedSequence(self._seed, spawn_key=(_REPEAT,)).generate_state(1)[0]
        return repeat_counts(self._repeat, epoch, int(seed)).numpy()

    def _generator(self, stream: int, number: int) -> np.random.Generator:
        # a spawn key and not more entropy: entropies [a, b] and [a, b, 0] are the same to numpy
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(self._seed, spawn_key=(stream, number))))


def _deal(objects: np.ndarray, start: int, group: int, rng: np.random.Generator) -> np.ndarray:
    """Places of an epoch's samples such that the groups, which begin at multiples of `group`, have about equally many
    objects; the epoch begins at number `start`."""
    count = len(objects)
    places = rng.permutation(np.arange(count, dtype=np.int32))
    places = places[np.argsort(objects[places], kind="stable")]  # those of equal number stay in random order
    head = min(-start % group, count)  # completes the group of the epoch before
    tail = (count - head) % group
    first = (count - head - tail) // group // 2 * group
    last = first + head + tail
    shared = rng.permutation(places[first:last])
    groups = np.concatenate([places[:first], places[last:]]).reshape(-1, group)
    groups = rng.permuted(rng.permutation(groups), axis=1)
    return np.concatenate([shared[:head], groups.ravel(), shared[head:]])
