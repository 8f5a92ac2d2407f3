"""Samples to batches, in worker processes.

Ranks and micro-batches share the one endless sequence of samples of a `ClipDataset`, so a run resumes from the number
of samples that it has taken, with any number of workers and ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import torch

from .bad_records import BadRecord, BadRecords, RecordGuard
from .dali_plan import EncodedBatch, assemble
from .in_flight import InFlight
from .render import SamplePlan, render
from .sample import DataError, PackedBatch, Sample, collate
from .sampling import ClipDataset
from .workers import is_of_dead_worker, lacks_descriptors, start_fork_server, start_loader

if TYPE_CHECKING:
    from .dali import DaliDecoder

_DEAD_WORKER = (
    "a data loading process died {} ({}); usually memory or shared memory (/dev/shm) ran out: lower `data.workers`, "
    "`data.prefetch`, `batch_size` or `accumulate`; with `data.workers=0` the cause shows itself"
)


_NO_DESCRIPTORS = (
    "too many open files: every tensor that a data loading process hands over takes a file descriptor; raise the limit "
    "(`ulimit -n 65536`), or lower `data.workers` or `data.prefetch`"
)
_REASONS = 3
"""Records of a sample, at most, for which an error says why they could not be used."""


def build_loader(
    dataset: ClipDataset,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    workers: int = 0,
    accumulate: int = 1,
    prefetch: int = 2,
    pin_memory: bool = False,
    bad_records: BadRecords | None = None,
    decoder: DaliDecoder | None = None,
) -> Iterator[PackedBatch]:
    """Endless micro-batches of one rank: micro-batch k holds the samples from `start` + (k * world_size + rank) *
    batch_size on.

    So the ranks of a step, and the micro-batches of an accumulated step, together hold one run of sample numbers: the
    same as one rank with a batch as large. Worker processes start now and live until the iterator is closed or
    forgotten.

    Args:
        start: number of the first sample of all ranks (where a resumed run continues).
        workers: processes that decode; 0 decodes in this one.
        accumulate: micro-batches that the caller takes in one go; as many are prepared ahead.
        prefetch: least number of batches that each worker prepares ahead.
        pin_memory: give batches in page-locked memory.
        bad_records: counts records that cannot be used and decides when they are too many; without it the first one is
            an error.
        decoder: decodes and augments the frames in this process; without it the workers do, with OpenCV.

    Raises:
        DataError: from the iterator: a defect of the data, or a worker process that died.
    """
    if bad_records is None:
        bad_records = BadRecords({}, 0)
    in_flight = InFlight(workers)
    options = {}
    if workers:
        start_fork_server()
        options = {
            "multiprocessing_context": "forkserver",
            "worker_init_fn": partial(start_loader, in_flight),
            "prefetch_factor": max(prefetch, -(-accumulate // workers)),
        }
    render_with = (decoder.encode, assemble) if decoder else (render, _pack)
    loader = torch.utils.data.DataLoader(
        _Batches(dataset, *render_with, bad_records.limit(dataset.name), in_flight),
        batch_size=None,
        sampler=_MicroBatches(batch_size, rank, world_size, start),
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # of its own: loading must not advance the generator of the model's dropout
        **options,
    )
    batches = _checked(iter(loader), dataset.name, bad_records, in_flight if workers else None)
    return decoder.decode(batches) if decoder else batches


def _pack(samples: list[Sample]) -> PackedBatch:
    return collate(samples).pack()


class _MicroBatches:
    """Sample numbers of the micro-batches of one rank, without end."""

    def __init__(self, batch_size: int, rank: int, world_size: int, start: int):
        self._batch_size, self._rank, self._world_size, self._start = batch_size, rank, world_size, start

    def __iter__(self) -> Iterator[list[int]]:
        for k in count():
            first = self._start + (k * self._world_size + self._rank) * self._batch_size
            yield list(range(first, first + self._batch_size))


@dataclass
class _Loaded:
    """What a worker hands over. Errors are text: raised in a worker they would reach the user inside the traceback of
    another process."""

    batch: PackedBatch | EncodedBatch | None
    bad: list[BadRecord]
    """Records that this worker has met for the first time and cannot use."""
    error: str = ""

    def pin_memory(self) -> _Loaded:
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())


class _Batches:
    """Batches of a dataset by lists of sample numbers."""

    def __init__(
        self,
        dataset: ClipDataset,
        use: Callable[[SamplePlan], Any],
        join: Callable[[list[Any]], PackedBatch | EncodedBatch],
        limit: int,
        in_flight: InFlight,
    ):
        """`use` makes of each plan what `join` makes a batch of."""
        self._dataset, self._use, self._join, self._in_flight = dataset, use, join, in_flight
        self._guard = RecordGuard(dataset.name, limit)

    def __getitem__(self, numbers: list[int]) -> _Loaded:
        worker = torch.utils.data.get_worker_info()
        try:
            batch = self._join([self._sample(number, worker and worker.id) for number in numbers])
        except DataError as error:
            return _Loaded(None, self._guard.take_new(), str(error))
        finally:
            if worker:
                self._in_flight.clear(worker.id)
        return _Loaded(batch, self._guard.take_new())

    def _sample(self, number: int, worker: int | None) -> Any:
        def guard(name: str) -> AbstractContextManager:
            nonlocal at_work
            at_work = name
            if worker is not None:
                self._in_flight.note(worker, number, name)
            return self._guard.using(name)

        reasons, at_work = self._guard.reasons, ""
        reasons.clear()
        try:
            return self._dataset.draw(number, self._use, guard)
        except Exception as error:
            if not isinstance(error, DataError):
                error.add_note(f"while loading sample {number} of dataset {self._dataset.name!r}, record {at_work!r}")
                raise
            if not reasons or reasons[-1] == str(error):
                raise
            first = list(dict.fromkeys(reasons))[:_REASONS]
            raise DataError("\n  ".join([f"{error}. Those that could not be used begin with:", *first])) from None


def _checked(
    loaded: Iterator[_Loaded], dataset: str, bad_records: BadRecords, in_flight: InFlight | None
) -> Iterator[PackedBatch]:
    try:
        while True:
            try:
                found = next(loaded)
            except (RuntimeError, OSError, EOFError) as error:
                if in_flight and is_of_dead_worker(error, in_flight):
                    raise DataError(_of_dead_worker(error, dataset, in_flight)) from None
                if lacks_descriptors(error):
                    raise DataError(_NO_DESCRIPTORS) from None
                raise
            bad_records.add(found.bad)
            if found.batch is None:
                raise DataError(found.error)
            yield found.batch
    finally:
        del loaded  # ends the workers now, even where a traceback keeps this frame


def _of_dead_worker(error: Exception, dataset: str, in_flight: InFlight) -> str:
    loading = [f"sample {number} of dataset {dataset!r}, {name!r}" for number, name in in_flight.of_dead()]
    what = f"while it loaded {' and '.join(loading)}" if loading else "between two samples"
    return _DEAD_WORKER.format(what, (str(error) or type(error).__name__).splitlines()[0])
