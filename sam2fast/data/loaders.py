"""Samples to batches, in worker processes.

Ranks and micro-batches share the one endless sequence of samples of a `ClipDataset`, so a run resumes from its step
number alone and reads the same data with any number of workers.
"""

from __future__ import annotations

import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterator
from itertools import count
from typing import TYPE_CHECKING, Any

import cv2
import torch

from .dali_plan import assemble
from .render import SamplePlan, render
from .sample import Batch, DataError, collate
from .sampling import ClipDataset

if TYPE_CHECKING:
    from .dali import DaliDecoder

_DEAD_WORKER = (
    "a data loading process died ({}); usually memory or shared memory (/dev/shm) ran out: lower `data.workers`, "
    "`batch_size` or `accumulate`; with `data.workers=0` the cause shows itself"
)


def build_loader(
    dataset: ClipDataset,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    workers: int = 0,
    accumulate: int = 1,
    decoder: DaliDecoder | None = None,
) -> Iterator[Batch]:
    """Endless micro-batches of one rank: micro-batch k holds samples (k * world_size + rank) * batch_size + 0, 1, ...

    So the ranks of a step, and the micro-batches of an accumulated step, together hold one run of sample numbers: the
    same as one rank with a batch as large. Worker processes start now and live until the iterator is closed or
    forgotten.

    Args:
        start: k of the first micro-batch (where a resumed run continues).
        workers: processes that decode; 0 decodes in this one.
        accumulate: micro-batches that the caller takes in one go; as many are prepared ahead.
        decoder: decodes and augments the frames in this process; without it the workers do, with OpenCV.

    Raises:
        DataError: from the iterator: a defect of the data, or a worker process that died.
    """
    numbers = _MicroBatches(batch_size, rank, world_size, start)
    options = {}
    if workers:
        # workers are not forked from this process: it may hold a CUDA context and threads with locks
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__])
        options = {
            "multiprocessing_context": context,
            "worker_init_fn": start_worker,
            "prefetch_factor": max(2, -(-accumulate // workers)),
        }
    loader = torch.utils.data.DataLoader(
        _Collated(dataset, *((decoder.encode, assemble) if decoder else (render, collate))),
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # of its own: loading must not advance the generator of the model's dropout
        **options,
    )
    batches = _checked(iter(loader), workers)
    return decoder.decode(batches) if decoder else batches


class _MicroBatches:
    """Sample numbers of the micro-batches of one rank, without end."""

    def __init__(self, batch_size: int, rank: int, world_size: int, start: int):
        self._batch_size, self._rank, self._world_size, self._start = batch_size, rank, world_size, start

    def __iter__(self) -> Iterator[list[int]]:
        for k in count(self._start):
            first = (k * self._world_size + self._rank) * self._batch_size
            yield list(range(first, first + self._batch_size))


class _Collated:
    """Batches of a dataset by lists of sample numbers. A `DataError` is handed over as its text: raised in a worker it
    would reach the user inside the traceback of another process."""

    def __init__(self, dataset: ClipDataset, use: Callable[[SamplePlan], Any], collate: Callable[[list[Any]], Any]):
        self._dataset, self._use, self._collate = dataset, use, collate

    def __getitem__(self, numbers: list[int]) -> Any | str:
        try:
            return self._collate([self._use(self._dataset.plan(number)) for number in numbers])
        except DataError as error:
            return str(error)


def start_worker(worker: int) -> None:
    """Set up a process that decodes, and end it with the one that started it."""
    cv2.setNumThreads(0)  # the processes are the parallelism
    threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    """End this process when the trainer is gone. The watchdog of torch looks at the parent process, which is the fork
    server, and that lives on as long as its workers do."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _checked(batches: Iterator[Batch | str], workers: int) -> Iterator[Batch]:
    try:
        while True:
            try:
                batch = next(batches)
            except (RuntimeError, OSError, EOFError) as error:
                if workers and _is_of_dead_worker(error):
                    raise DataError(_DEAD_WORKER.format((str(error) or type(error).__name__).splitlines()[0])) from None
                raise
            if isinstance(batch, str):
                raise DataError(batch)
            yield batch
    finally:
        del batches  # ends the workers now, even where a traceback keeps this frame


def _is_of_dead_worker(error: Exception) -> bool:
    """A worker that died shows as a RuntimeError of the DataLoader or, where its last batch was on the way, as a broken
    connection; an error that a living worker reports starts with "Caught"."""
    text = str(error)
    return not text.startswith("Caught") and (type(error) is not RuntimeError or "DataLoader worker" in text)
