"""Semi-supervised video object segmentation: first masks are propagated through a video and scored by J&F.

Beside each score stands that of a baseline that copies the first mask to every frame. All scores are in points
(0 to 100) and means over objects of the mean over frames, as DAVIS 2017 and SA-V report them. Objects are scored one by
one: predictions of different objects may overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.sample import DataError, Dataset, VideoRecord
from ..parallel import HERE
from .metrics import boundary_accuracy, region_similarity, scored_frames
from .propagation import propagate

Prompts = dict[int, tuple[int, np.ndarray]]
Propagator = Callable[[nn.Module, Iterable[np.ndarray], Prompts, int], Iterator[tuple[int, dict[int, Tensor]]]]
READ_AHEAD = 8
"""Frames asked of a record at once: a video decoder is fast only when it reads in order."""


@dataclass(frozen=True)
class ObjectScore:
    """Scores of one object in points, each the mean over its `num_frames` scored frames."""

    video: str
    object_id: int
    num_frames: int
    j: float
    f: float
    copy_j: float
    copy_f: float


@dataclass(frozen=True)
class VosResult:
    """Scores of the objects of a dataset (or, before `merge`, of one rank's share of it)."""

    dataset: str
    objects: tuple[ObjectScore, ...]

    @staticmethod
    def merge(results: Iterable[VosResult]) -> VosResult:
        """The result of the whole dataset from those of all ranks, in the order of videos and objects."""
        results = list(results)
        objects = sorted(
            (score for result in results for score in result.objects), key=lambda score: (score.video, score.object_id)
        )
        return VosResult(results[0].dataset, tuple(objects))

    @property
    def num_objects(self) -> int:
        return len(self.objects)

    @property
    def num_frames(self) -> int:
        """Scored frames, counted once for each object."""
        return sum(score.num_frames for score in self.objects)

    def scores(self) -> dict[str, float]:
        """Means over objects in points: `jf` = (j + f) / 2, `j`, `f`, and the same of the copy baseline as `copy_*`.

        Raises:
            DataError: no object has a frame to score.
        """
        if not self.objects:
            raise DataError(
                f"dataset {self.dataset}: no object has a frame to score; J&F needs at least three annotated "
                "frames within max_frames (the first and the last do not count)"
            )
        means = {
            name: float(np.mean([getattr(score, name) for score in self.objects]))
            for name in ("j", "f", "copy_j", "copy_f")
        }
        return {"jf": (means["j"] + means["f"]) / 2, "copy_jf": (means["copy_j"] + means["copy_f"]) / 2, **means}


@dataclass(frozen=True)
class FrameResult:
    """What an observer sees of one frame; masks are bool [H, W] by object id."""

    video: str
    index: int
    num_frames: int
    image: np.ndarray
    """uint8 [H, W, 3] RGB"""
    targets: dict[int, np.ndarray] | None
    """Visible prompted objects; None where the frame is not annotated."""
    predictions: dict[int, np.ndarray]
    copies: dict[int, np.ndarray]
    """The baseline: first masks of the objects that have appeared."""


def evaluate_vos(
    model: nn.Module,
    dataset: Dataset,
    *,
    max_items: int | None = None,
    max_frames: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    save: Callable[[FrameResult], None] | None = None,
    propagator: Propagator = propagate,
) -> VosResult:
    """Propagate each object's first ground-truth mask and score the annotated frames (see `scored_frames`).

    Videos are read frame by frame; memory does not grow with their length.

    Args:
        model: a SAM 2 in eval mode on the device to use.
        max_items: only the first videos of the dataset.
        max_frames: only the first frames of each video, annotated or not.
        rank, world_size: this rank scores items rank, rank + world_size, ...; `VosResult.merge` joins the shares.
        save: called with every frame of every video, in order.
        propagator: tracks the objects; `propagation.propagate` unless another method is to be scored.
    """
    assert not model.training, "call model.eval() before an evaluation"
    count = len(dataset) if max_items is None else min(len(dataset), max_items)
    objects: list[ObjectScore] = []
    for index in range(rank, count, world_size):
        objects += _evaluate_video(model, dataset[index], max_frames, save, propagator)
    return VosResult(dataset.name, tuple(objects))


def _evaluate_video(
    model: nn.Module,
    record: VideoRecord,
    max_frames: int | None,
    save: Callable[[FrameResult], None] | None,
    propagator: Propagator,
) -> list[ObjectScore]:
    num_frames = record.num_frames if max_frames is None else min(record.num_frames, max_frames)
    annotated = [frame for frame in record.annotated if frame < num_frames]
    prompts = _first_masks(record, annotated)
    if not prompts:
        return []
    scored = {object_id: set(scored_frames(annotated, first)) for object_id, (first, _) in prompts.items()}
    scores: dict[int, list[tuple[float, ...]]] = {object_id: [] for object_id in prompts}
    with_masks, absent = set(annotated), np.zeros(record.size, bool)
    frames = _FrameReader(record, num_frames)
    for index, logits in propagator(model, frames, prompts, num_frames):
        HERE.touch()
        image = frames.take(index)
        predictions = {object_id: _to_mask(value, record.size) for object_id, value in logits.items()}
        copies = {object_id: mask for object_id, (first, mask) in prompts.items() if first <= index}
        visible = record.masks(index) if index in with_masks else None
        targets = None if visible is None else {k: visible[k] for k in prompts if k in visible}
        for object_id in prompts:
            if index in scored[object_id]:
                target = targets.get(object_id, absent)
                scores[object_id].append(
                    (*_j_and_f(predictions.get(object_id, absent), target), *_j_and_f(copies[object_id], target))
                )
        if save is not None:
            save(FrameResult(record.name, index, num_frames, image, targets, predictions, copies))
    return [
        ObjectScore(record.name, object_id, len(rows), *(100 * np.mean(rows, axis=0)).tolist())
        for object_id, rows in scores.items()
    ]


def _first_masks(record: VideoRecord, annotated: list[int]) -> Prompts:
    """First annotated frame and mask of each object that has frames to score."""
    prompts: Prompts = {}
    for frame in annotated:
        if not scored_frames(annotated, frame):
            break
        masks = record.masks(frame)
        prompts |= {object_id: (frame, masks[object_id]) for object_id in masks if object_id not in prompts}
    return prompts


class _FrameReader:
    """The frames of a record in order, kept from when they are read until `take` asks for them."""

    def __init__(self, record: VideoRecord, num_frames: int) -> None:
        self._record, self._num_frames = record, num_frames
        self._waiting: dict[int, np.ndarray] = {}

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in range(0, self._num_frames, READ_AHEAD):
            indices = range(start, min(start + READ_AHEAD, self._num_frames))
            for index, image in zip(indices, self._record.frames(indices), strict=True):
                self._waiting[index] = image
                yield image

    def take(self, index: int) -> np.ndarray:
        """Frame `index`, which has been read; it and those before it are forgotten."""
        image = self._waiting[index]
        self._waiting = {later: kept for later, kept in self._waiting.items() if later > index}
        return image


def _to_mask(logits: Tensor | np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Logits [h, w] to a bool mask of the video's size [H, W]."""
    logits = torch.as_tensor(logits).float()
    if logits.shape != size:
        logits = F.interpolate(logits[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    return (logits > 0).cpu().numpy()


def _j_and_f(prediction: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    return region_similarity(prediction, target), boundary_accuracy(prediction, target)
