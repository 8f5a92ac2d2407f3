"""How many objects the frames of a dataset show: counted once, by all cores, and kept.

The counts lie in the dataset's folder, in .sam2fast, or where that cannot be written in the user's cache folder, under
a name made of the dataset's configuration and of the sizes and times of its annotation files (of video folders and
loose files, of their folders). Counts that are out of date cost balance and nothing else: samples are cut from masks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..config import DatasetConfig, MixItem
from .cache import load, store, user_cache
from .sample import DataError, Dataset, VideoRecord
from .workers import start_fork_server, start_worker

_VERSION = 1
"""Of what is counted and how it is stored."""
_PATIENCE = 3.0
"""Seconds of counting in this process before others are started, which takes about as long."""
_PART = 1 << 20
"""Records for which objects are drawn at a time; every loader process needs the memory."""


@dataclass(frozen=True)
class ObjectCounts:
    """Objects in frames of N records, the frames of all records one after the other. Tensors, because those are shared
    with loader processes."""

    counts: torch.Tensor
    """uint8 [F]; 255 is 255 or more."""
    ends: torch.Tensor
    """int64 [N]: end of each record's frames in `counts`. A record whose annotation is damaged has none."""

    @classmethod
    def of(cls, records: Iterable[Sequence[int]]) -> ObjectCounts:
        """From the counts of each record's frames."""
        parts = [np.minimum(np.asarray(record, np.int64), 255).astype(np.uint8) for record in records]
        ends = torch.tensor([len(part) for part in parts], dtype=torch.int64).cumsum(0)
        return cls(torch.from_numpy(np.concatenate([*parts, np.empty(0, np.uint8)])), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, record: int) -> np.ndarray:
        """Counts of a record's frames, uint8."""
        start = int(self.ends[record - 1]) if record else 0
        return self.counts[start : int(self.ends[record])].numpy()

    def first_frames(self, item: MixItem) -> ObjectCounts:
        """Objects, at most `item.max_objects`, of the frames in which a clip may begin: those that show an object and
        leave room for the clip on the side on which it goes on. With `visible: window` the most that a frame of the
        clip shows."""
        counts, ends = self.counts.numpy(), self.ends.numpy()
        sizes = np.diff(ends, prepend=0)
        record = np.repeat(np.arange(len(ends)), sizes)
        before = np.arange(len(counts)) - (ends - sizes)[record]
        after = sizes[record] - 1 - before
        span = (item.frames - 1) * item.stride[0]
        if item.visible == "window":  # played backwards it is the same clip
            usable, shown = after >= span, counts.copy()
            for offset in range(item.stride[0], span + 1, item.stride[0]):
                np.maximum(shown[:-offset], counts[offset:], out=shown[:-offset])  # wrong only where not usable
            counts = shown
        else:
            usable = ((after >= span) & (item.reverse < 1)) | ((before >= span) & (item.reverse > 0))
        usable &= counts > 0
        ends = np.cumsum(np.bincount(record[usable], minlength=len(ends)))
        return ObjectCounts(
            torch.from_numpy(np.minimum(counts[usable], min(item.max_objects, 255))), torch.from_numpy(ends)
        )

    def draw(self, records: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Objects in a random frame of each of `records`, uint8; records without frames get the median of the rest."""
        counts, ends = self.counts.numpy(), self.ends.numpy()
        drawn = np.zeros(len(records), np.uint8)
        for first in range(0, len(records), _PART):
            part = records[first : first + _PART]
            starts = np.where(part > 0, ends[part - 1], 0)
            sizes = ends[part] - starts
            frames = starts + (rng.random(len(part)) * sizes).astype(np.int64)
            known = np.flatnonzero(sizes)
            drawn[first + known] = counts[frames[known]]
        found = drawn[drawn > 0]
        drawn[drawn == 0] = np.median(found) if len(found) else 1
        return drawn


def object_counts(
    dataset: Dataset,
    config: DatasetConfig,
    item: MixItem,
    seed: int,
    report: Callable[[str], None] = lambda text: None,
    cache: Path | None = None,
) -> ObjectCounts:
    """Objects within the area limits of `item` in every annotated frame, read from disk or counted and written.

    Args:
        dataset: as `formats.open_dataset` opened it with `config` and `seed`.
        report: told before a count that takes long.
        cache: folder that is used where the dataset's own cannot be written; by default the user's cache folder.
    """
    folders = [Path(config.root).expanduser() / ".sam2fast", cache or user_cache()]
    with contextlib.suppress(OSError):
        folders[0].mkdir(exist_ok=True)  # now: it changes the time of the dataset's folder
    name, stamp = _key(dataset, config, item, seed)
    places = [folder / f"{name}.npz" for folder in folders]
    stored = load(places, stamp)
    if stored is not None and stored.keys() == {"counts", "ends"} and len(stored["ends"]) == len(dataset):
        return ObjectCounts(torch.from_numpy(stored["counts"]), torch.from_numpy(stored["ends"]))
    counts = ObjectCounts.of(_count_all(dataset, item, report))
    store(places, stamp, {"counts": counts.counts.numpy(), "ends": counts.ends.numpy()})
    return counts


def _count_all(dataset: Dataset, item: MixItem, report: Callable[[str], None]) -> list[np.ndarray]:
    limits, total = (item.min_area, item.max_area), len(dataset)
    found: list[np.ndarray] = []
    deadline = time.monotonic() + _PATIENCE
    while len(found) < total and time.monotonic() < deadline:
        found.append(_count(dataset[len(found)], *limits))
    if len(found) == total:
        return found
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    report(f"dataset {item.dataset!r}: counting the objects of {total} videos or images with {workers} processes, once")
    size = min(32, -(-(total - len(found)) // (4 * workers)))
    chunks = [range(start, min(start + size, total)) for start in range(len(found), total, size)]
    start_fork_server()
    context = multiprocessing.get_context("forkserver")
    try:
        with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(dataset, limits)) as pool:
            for part in pool.map(_count_chunk, chunks):
                found.extend(part)
    except BrokenProcessPool:
        raise DataError(
            f"dataset {item.dataset!r}: a process that counted objects was killed, at record {len(found)} of {total} "
            "or a little later; memory may have run out. Use fewer processes (taskset), or set `balance: false`"
        ) from None
    return found


def _start(dataset: Dataset, limits: tuple[float, float]) -> None:
    global _work
    start_worker()
    _work = (dataset, limits)


def _count_chunk(indices: range) -> list[np.ndarray]:
    dataset, limits = _work
    return [_count(dataset[index], *limits) for index in indices]


def _count(record: VideoRecord, min_area: float, max_area: float) -> np.ndarray:
    """Objects in each annotated frame; nothing where the annotation is damaged, which is for training to report."""
    try:
        areas = [record.areas(frame) for frame in record.annotated]
    except DataError:
        return np.empty(0, np.uint8)
    counts = [sum(within(area, pixels, min_area, max_area) for area in objects) for objects, pixels in areas]
    return np.minimum(counts, 255).astype(np.uint8)


def within(area: int, pixels: int, min_area: float, max_area: float) -> bool:
    """Whether an object of `area` pixels in a frame of `pixels` keeps to the limits of a `MixItem`."""
    return area >= (min_area if min_area >= 1 else min_area * pixels) and min(1, area / pixels) <= max_area


def _key(dataset: Dataset, config: DatasetConfig, item: MixItem, seed: int) -> tuple[str, np.ndarray]:
    """Name of what is counted, and a stamp of the files that it is counted in, uint8 [8]."""
    what = [_VERSION, config.model_dump(mode="json"), seed, item.min_area, item.max_area]
    name = hashlib.blake2b(json.dumps(what).encode(), digest_size=8).hexdigest()
    digest = hashlib.blake2b(digest_size=8)
    for source in dataset.sources():
        for path in (source, *_subfolders(source)):
            state = os.stat(path)
            digest.update(f"{path}\0{state.st_size}\0{state.st_mtime_ns}\0".encode())
    return f"objects.{name}", np.frombuffer(digest.digest(), np.uint8)


def _subfolders(path: Path) -> list[str]:
    """Masks may lie in a folder per object."""
    if not path.is_dir():
        return []
    with os.scandir(path) as entries:
        return sorted(entry.path for entry in entries if not entry.name.startswith(".") and entry.is_dir())
