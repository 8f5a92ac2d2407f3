"""Records to samples: which frames and objects make a clip, in an endless order that the seed alone decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from ..config import AugmentConfig, MixItem, OcclusionConfig
from . import augment as augmentation
from .masks import FrameMasks
from .render import SamplePlan, render
from .sample import DataError, Dataset, Sample, VideoRecord

T = TypeVar("T")

_MAX_DRAWS = 30
_ORDER, _CONTENT = 0, 1  # the two independent streams of random numbers of a seed


@dataclass(frozen=True)
class Window:
    """A clip before decoding."""

    frames: list[int]
    """Frame numbers of the record in the order in which the clip plays them."""
    hidden: list[bool]
    """Frames whose image is blanked (occlusion training)."""
    object_ids: list[int]
    first_masks: FrameMasks
    """Masks of the first frame, in which all of `object_ids` are visible."""


class ClipDataset(torch.utils.data.Dataset[Sample]):
    """Samples by global number n = 0, 1, 2, ...: pass `n // len` over the records, each in an order of its own.

    Args:
        dataset: the records.
        item: how clips are cut from them.
        image_size: side S of the square input.
        seed: one number or several (run, stage, item); it alone decides order and content.
    """

    def __init__(
        self, dataset: Dataset, item: MixItem, augment: AugmentConfig, image_size: int, seed: int | Sequence[int]
    ):
        self._dataset, self._item, self._augment, self._image_size = dataset, item, augment, image_size
        self._seed = seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        """Samples of one pass."""
        return len(self._dataset)

    @property
    def name(self) -> str:
        """Name of the dataset that the samples come from."""
        return self._item.dataset

    def __getitem__(self, number: int) -> Sample:
        """Sample `number`; see `draw`."""
        return self.draw(number, render)

    def draw(
        self,
        number: int,
        use: Callable[[SamplePlan], T],
        guard: Callable[[str], AbstractContextManager] = nullcontext,
    ) -> T:
        """What `use` makes of the plan of sample `number`.

        A record without a visible object is replaced by another one, drawn for this number; so is a record whose
        `DataError` is swallowed by `guard`, the context, by the record's name, in which it is read.

        Raises:
            DataError: a defect of the data; or no visible object in any of many records.
        """
        epoch, place = divmod(number, len(self))
        rng = self._generator(_CONTENT, number)
        index = int(self._permutation(epoch)[place])
        for _ in range(_MAX_DRAWS):
            record = self._dataset[index]
            with guard(record.name):
                plan = plan_sample(record, self._item, self._augment, self._image_size, rng)
                if plan is not None:
                    return use(plan)
            index = int(rng.integers(len(self)))
        raise DataError(
            f"dataset {self._item.dataset!r}: {_MAX_DRAWS} draws, the last {self._dataset[index].name!r}, found no "
            f"object of at most {self._item.max_area:g} of the frame that can be seen at {self._image_size} x "
            f"{self._image_size} pixels; check the masks, raise `max_area` or `image_size`, or name empty videos in "
            "`exclude`"
        )

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            self._order = (epoch, self._generator(_ORDER, epoch).permutation(len(self)))
        return self._order[1]

    def _generator(self, stream: int, number: int) -> np.random.Generator:
        # a spawn key and not more entropy: entropies [a, b] and [a, b, 0] are the same to numpy
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(self._seed, spawn_key=(stream, number))))


def plan_sample(
    record: VideoRecord, item: MixItem, augment: AugmentConfig, image_size: int, rng: np.random.Generator
) -> SamplePlan | None:
    """Draw a clip from a record and how it is augmented.

    Objects that augmentation moves out of the first frame are dropped; if that leaves none, the clip keeps its plain
    geometry.

    Args:
        image_size: side S of the square that frames and masks are brought to.

    Returns:
        The plan; None where no object is visible at any start (`sample_window`) or at this size.

    Raises:
        DataError: the record is too short for the clip, or a file of it is damaged.
    """
    window = sample_window(record, item, rng)
    if window is None:
        return None
    size = window.first_masks.size
    drawn = augmentation.draw_geometry(augment, size, image_size, rng)
    colors = augmentation.draw_colors(augment, item.frames, rng)
    sigma = augmentation.draw_blur(augment, image_size, rng)
    for geometry in (drawn, augmentation.plain_geometry(size, image_size)):
        first = {object_id: geometry.mask(window.first_masks[object_id]) for object_id in window.object_ids}
        first = {object_id: mask for object_id, mask in first.items() if mask.any()}
        if first:
            sample_id = f"{item.dataset}/{record.name}@{','.join(map(str, window.frames))}"
            return SamplePlan(record, window.frames, window.hidden, geometry, colors, sigma, first, sample_id)
    return None


def sample_window(record: VideoRecord, item: MixItem, rng: np.random.Generator) -> Window | None:
    """Draw `item.frames` annotated frames, equally spaced, and up to `item.max_objects` objects visible in the first.

    As in the official trainer, the first frame decides which objects are followed. Start positions are tried in random
    order until one shows an object of at most `item.max_area`; if none does, so are those of the closest unoccluded
    forward clip.

    Returns:
        None where no start shows such an object.

    Raises:
        DataError: the record has fewer annotated frames than the clip needs.
    """
    available, (low, high) = len(record.annotated), item.stride
    needed = (item.frames - 1) * low + 1
    if available < needed:
        raise DataError(
            f"video {record.name!r} of dataset {item.dataset!r} has {available} annotated frames, a clip of "
            f"{item.frames} frames at stride {low} needs {needed}; lower `frames` or `stride`, or name the video in "
            "`exclude`"
        )
    strides_that_fit = (available - 1) // max(1, item.frames - 1)
    stride = int(rng.integers(low, max(low, min(high, strides_that_fit)) + 1))
    backward = bool(rng.random() < item.reverse)
    offsets, hidden = _occlude(item.frames, stride, available, item.occlusion, rng)
    plain = [position * low for position in range(item.frames)]
    window = _place(record, offsets[::-1] if backward else offsets, hidden, item, rng)
    if window is None and (backward or offsets != plain):
        window = _place(record, plain, [False] * item.frames, item, rng)
    return window


def _occlude(
    length: int, stride: int, available: int, config: OcclusionConfig, rng: np.random.Generator
) -> tuple[list[int], list[bool]]:
    """Offsets of the frames of a clip within the annotated frames, and which of them are blanked.

    With some probability up to `max_frames` frames in a row are blanked or cut out, never the first one, and at least
    one frame follows, in which the objects are to be found again.
    """
    offsets, hidden = [position * stride for position in range(length)], [False] * length
    if config.mode == "blank":
        longest = min(config.max_frames, length - 2)
    else:
        longest = min(config.max_frames, (available - 1) // stride - (length - 1)) if length > 1 else 0
    if longest < 1 or rng.random() >= config.probability:
        return offsets, hidden
    count = int(rng.integers(1, longest + 1))
    if config.mode == "blank":
        start = int(rng.integers(1, length - count))
        hidden[start : start + count] = [True] * count
    else:
        start = int(rng.integers(1, length))
        offsets[start:] = [offset + count * stride for offset in offsets[start:]]
    return offsets, hidden


def _place(
    record: VideoRecord, offsets: list[int], hidden: list[bool], item: MixItem, rng: np.random.Generator
) -> Window | None:
    annotated = record.annotated
    for start in rng.permutation(len(annotated) - max(offsets)):
        frames = [annotated[start + offset] for offset in offsets]
        masks = record.masks(frames[0])
        pixels = masks.size[0] * masks.size[1]
        eligible = [object_id for object_id in masks if min(1, masks.area(object_id) / pixels) <= item.max_area]
        if eligible:
            chosen = rng.permutation(len(eligible))[: item.max_objects]
            return Window(frames, hidden, sorted(eligible[index] for index in chosen), masks)
    return None
