"""Records to samples: which frames and objects make a clip."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from ..config import AugmentConfig, MixItem, OcclusionConfig
from . import augment as augmentation
from .index import ObjectCounts, within
from .masks import FrameMasks
from .order import SampleOrder
from .render import SamplePlan, render
from .sample import DataError, Dataset, Sample, VideoRecord

T = TypeVar("T")

_MAX_DRAWS = 30


@dataclass(frozen=True)
class Wanted:
    """How many objects a sample should have, so that all samples of its step have as many."""

    objects: int
    counts: np.ndarray
    """Objects in each annotated frame of the record."""


@dataclass(frozen=True)
class Window:
    """A clip before decoding."""

    frames: list[int]
    """Frame numbers of the record in the order in which the clip plays them."""
    hidden: list[bool]
    """Frames whose image is blanked (occlusion training)."""
    candidates: list[int]
    """Objects that may be followed, in random order."""
    first_masks: FrameMasks
    """Masks of the first frame."""


class ClipDataset(torch.utils.data.Dataset[Sample]):
    """Samples by global number n = 0, 1, 2, ...: epoch after epoch over the records, see `order.SampleOrder`.

    Args:
        dataset: the records.
        item: how clips are cut from them.
        image_size: side S of the square input.
        seed: one number or several (run, stage, stream of the entry); it decides order and content, with `counts`
            together with these and `group`.
        group: samples of an optimizer step over all ranks.
        counts: of the objects of the dataset; with them the samples of a group have about equally many.

    Raises:
        DataError: a pattern of `item.repeat_names` that matches no record, or a clip length that no record has.
    """

    def __init__(
        self,
        dataset: Dataset,
        item: MixItem,
        augment: AugmentConfig,
        image_size: int,
        seed: int | Sequence[int],
        group: int = 1,
        counts: ObjectCounts | None = None,
    ):
        self._dataset, self._item, self._augment, self._image_size = dataset, item, augment, image_size
        self._counts = counts
        first_frames = None if counts is None else counts.first_frames(item)
        factors = repeat_factors(dataset, item)
        # all where there is None; else a tensor, which loader processes share
        self._used = None if factors is None else torch.from_numpy(np.flatnonzero(factors))
        self._order = SampleOrder(len(dataset), seed, group, factors, first_frames)
        _check_length(dataset, self._used, item)

    def __len__(self) -> int:
        """Records; an epoch has as many samples, but for repeats."""
        return len(self._dataset)

    @property
    def name(self) -> str:
        """Name of the dataset that the samples come from."""
        return self._item.dataset

    def __getitem__(self, number: int) -> Sample:
        """Sample `number`; see `draw`."""
        return self.draw(number, render)

    def plan(self, number: int) -> SamplePlan:
        """What sample `number` is made of; see `draw`."""
        return self.draw(number, lambda plan: plan)

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
        slot, rng = self._order[number], self._order.generator(number)
        index, readable = slot.record, False
        for _ in range(_MAX_DRAWS):
            wanted = None if slot.objects is None else Wanted(slot.objects, self._counts[index])
            record = self._dataset[index]
            with guard(record.name):
                plan = plan_sample(record, self._item, self._augment, self._image_size, rng, wanted)
                if plan is not None:
                    return use(plan)
                readable = True
            used = self._used
            index = int(rng.integers(len(self._dataset)) if used is None else used[rng.integers(len(used))])
        item = self._item
        if not readable:
            raise DataError(
                f"dataset {item.dataset!r}: no record could be used, {_MAX_DRAWS} draws for a sample gave none; "
                "correct its `root` and `annotations`, or look at it with `sam2fast check-data`"
            )
        raise DataError(
            f"dataset {item.dataset!r}: {_MAX_DRAWS} draws, the last {self._dataset[index].name!r}, found no object of "
            f"`min_area` {item.min_area:g} to `max_area` {item.max_area:g} that can be seen at {self._image_size} x "
            f"{self._image_size} pixels; check the masks, widen the limits, raise `image_size`, or name empty videos "
            "in `exclude`"
        )


def repeat_factors(dataset: Dataset, item: MixItem) -> np.ndarray | None:
    """How often each record comes in an epoch, float32 [records]; None where that is once for all.

    Raises:
        DataError: a pattern of `item.repeat_names` that matches no record.
    """
    if not item.repeat_names:
        return None if item.repeat == 1 else np.full(len(dataset), item.repeat, np.float32)
    factors = np.full(len(dataset), np.nan, np.float32)
    names = [dataset[index].name for index in range(len(dataset))]
    for pattern, factor in item.repeat_names.items():
        match = re.compile(fnmatch.translate(pattern)).match
        found = np.array([match(name) is not None for name in names])
        if not found.any():
            raise DataError(
                f"dataset {item.dataset!r}: pattern {pattern!r} of `repeat_names` matches none of its "
                f"{len(names)} names (the first is {names[0]!r}); correct it"
            )
        factors[found & np.isnan(factors)] = factor
    return np.where(np.isnan(factors), np.float32(item.repeat), factors)


def frames_needed(item: MixItem) -> int:
    """Annotated frames that a clip spans at least."""
    return (item.frames - 1) * item.stride[0] + 1


def _check_length(dataset: Dataset, used: torch.Tensor | None, item: MixItem) -> None:
    """That a record of `used`, or of all, is long enough for a clip: annotations are read up to the first that is."""
    needed, longest, name = frames_needed(item), 0, ""
    for index in (range(len(dataset)) if used is None else used) if needed > 1 else ():
        record = dataset[int(index)]
        try:
            available = len(record.annotated)
        except DataError:  # for training to count
            continue
        if available >= needed:
            return
        if available > longest:
            longest, name = available, record.name
    if longest:
        raise DataError(
            f"dataset {item.dataset!r}: no video is long enough for clips of {item.frames} frames at stride "
            f"{item.stride[0]}, which need {needed} annotated frames; the longest, {name!r}, has {longest}; lower "
            "`frames` or `stride`" + (" (images have `frames: 1`)" if longest == 1 else "")
        )


def plan_sample(
    record: VideoRecord,
    item: MixItem,
    augment: AugmentConfig,
    image_size: int,
    rng: np.random.Generator,
    wanted: Wanted | None = None,
) -> SamplePlan | None:
    """Draw a clip from a record and how it is augmented.

    Objects that augmentation moves out of the first frame give way to others; if that leaves none, the clip keeps its
    plain geometry. Objects that the first frame lacks anyway (`visible: window`) have an empty mask there.

    Args:
        image_size: side S of the square that frames and masks are brought to.
        wanted: number of objects, as far as the record has them.

    Returns:
        The plan; None where no object is visible at any start (`sample_window`) or at this size.

    Raises:
        DataError: the record is too short for the clip, or a file of it is damaged.
    """
    window = sample_window(record, item, rng, wanted)
    if window is None:
        return None
    size = window.first_masks.size
    drawn = augmentation.draw_geometry(augment, size, image_size, rng)
    colors = augmentation.draw_colors(augment, item.frames, rng)
    sigma = augmentation.draw_blur(augment, image_size, rng)
    limit = min(item.max_objects, wanted.objects) if wanted else item.max_objects
    for geometry in (drawn, augmentation.plain_geometry(size, image_size)):
        first = _first_masks(window, geometry, limit)
        if first:
            sample_id = f"{item.dataset}/{record.name}@{','.join(map(str, window.frames))}"
            return SamplePlan(record, window.frames, window.hidden, geometry, colors, sigma, first, sample_id)
    return None


def _first_masks(window: Window, geometry: augmentation.Geometry, limit: int) -> dict[int, np.ndarray]:
    """Augmented first masks of the first `limit` candidates that the geometry leaves in the frame, by ascending id."""
    first: dict[int, np.ndarray] = {}
    for object_id in window.candidates:
        if object_id not in window.first_masks:
            first[object_id] = np.zeros((geometry.side, geometry.side), bool)
        elif (mask := window.first_masks.resampled([object_id], geometry)[0]).any():
            first[object_id] = mask
        if len(first) == limit:
            break
    return dict(sorted(first.items()))


def sample_window(
    record: VideoRecord, item: MixItem, rng: np.random.Generator, wanted: Wanted | None = None
) -> Window | None:
    """Draw `item.frames` annotated frames, equally spaced, and the objects that may be followed in them.

    As in the official trainer, these are the objects visible in the first frame, unless `item.visible` says otherwise.
    Start positions are tried in random order until one shows an object within the area limits; if none does, so are
    those of the closest unoccluded forward clip. With `wanted`, those with that number of objects come first.

    Returns:
        None where no start shows such an object.

    Raises:
        DataError: the record has fewer annotated frames than the clip needs.
    """
    available, (low, high) = len(record.annotated), item.stride
    needed = frames_needed(item)
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
    window = _place(record, offsets[::-1] if backward else offsets, hidden, item, rng, wanted)
    if window is None and (backward or offsets != plain or (any(hidden) and item.visible == "window")):
        window = _place(record, plain, [False] * item.frames, item, rng, wanted)
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
    record: VideoRecord,
    offsets: list[int],
    hidden: list[bool],
    item: MixItem,
    rng: np.random.Generator,
    wanted: Wanted | None,
) -> Window | None:
    annotated = record.annotated
    starts = rng.permutation(len(annotated) - max(offsets))
    searched = [0]  # positions in the clip whose objects count
    if item.visible == "window":
        searched = [position for position, blank in enumerate(hidden) if not blank]
    if wanted and len(wanted.counts) == len(annotated):
        starts = _by_count(starts, [offsets[position] for position in searched], item, wanted)
    for start in starts:
        frames = [annotated[start + offset] for offset in offsets]
        masks = [record.masks(frames[position]) for position in searched]
        eligible = sorted({object_id for shown in masks for object_id in _eligible(shown, item)})
        if eligible:
            return Window(frames, hidden, [eligible[index] for index in rng.permutation(len(eligible))], masks[0])
    return None


def _by_count(starts: np.ndarray, offsets: list[int], item: MixItem, wanted: Wanted) -> np.ndarray:
    """The starts with the wanted number of objects first, the closest ones after them, those without any last."""
    shown = np.minimum(wanted.counts[starts[:, None] + offsets].max(axis=1).astype(int), item.max_objects)
    distance = np.where(shown > 0, abs(shown - wanted.objects), np.iinfo(int).max)
    return starts[np.argsort(distance, kind="stable")]


def _eligible(masks: FrameMasks, item: MixItem) -> list[int]:
    pixels = masks.size[0] * masks.size[1]
    return [object_id for object_id in masks if within(masks.area(object_id), pixels, item.min_area, item.max_area)]
