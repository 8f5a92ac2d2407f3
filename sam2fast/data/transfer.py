"""Batches to the device: the next one is copied while the device works with the one before."""

from __future__ import annotations

import torch

from .sample import Batch, PackedBatch


class Transfer:
    """A place for one batch on its way to `device`.

    On a GPU the copy runs on a stream of its own, so it does not queue behind the step that is being computed; from
    pinned memory the host does not wait for it either. At most two batches are on the device: the one in use and the
    one under way.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None
        self._batch: PackedBatch | None = None

    def start(self, batch: PackedBatch) -> None:
        """Begin to copy `batch`, which `take` returns next."""
        assert self._batch is None, "the batch before was not taken"
        if self._stream is None:
            self._batch = batch
            return
        with torch.cuda.stream(self._stream):
            self._batch = batch.copied(self._device, non_blocking=True)
            self._copied = self._stream.record_event()

    def take(self) -> Batch:
        """The batch that was started, on the device, for work on the current stream."""
        assert self._batch is not None, "no batch was started"
        batch, self._batch = self._batch, None
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._copied)
            for tensor in (batch.frames, batch.packed_masks, batch.object_to_clip):
                tensor.record_stream(current)  # or the next copy could take its memory before it was read
        return batch.to(self._device)
