"""Tensors of a checkpoint on disk, in the sharded format of torch.distributed.checkpoint: every rank writes what it
holds, and any number of ranks reads it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

_METADATA = ".metadata"
"""The file that says which tensor lies where."""


class Staging:
    """Copies of tensors in main memory, made at once and written later. The memory stays for the next ones."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._sharded: DefaultStager | None = None

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`tensors` as they are now. The copies hold until the next call."""
        sharded = {key: value for key, value in tensors.items() if isinstance(value, DTensor)}
        plain = {key: value.detach() for key, value in tensors.items() if key not in sharded}
        self._buffers = {key: self._buffer(key, value) for key, value in plain.items()}
        for key, value in plain.items():
            self._buffers[key].copy_(value, non_blocking=True)
        copies = dict(self._buffers)
        if sharded:
            copies |= self._stage(sharded)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copies

    def _buffer(self, key: str, value: Tensor) -> Tensor:
        known = self._buffers.get(key)
        if known is not None and known.shape == value.shape and known.dtype == value.dtype:
            return known
        return torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)

    def _stage(self, sharded: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._sharded is None:
            cuda = torch.cuda.is_available()
            self._sharded = DefaultStager(StagingOptions(cuda, False, False, False))
        return self._sharded.stage(sharded)


def write_tensors(tensors: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup) -> None:
    """Write what the ranks of `group` hold together into `folder`, which exists (called on each of them).

    Raises:
        Exception: the one of this rank; where only others have one, nothing.
    """
    # Copying ahead would open a CUDA context in a thread of its own.
    writer = dcp.FileSystemWriter(folder, per_thread_copy_ahead=0, overwrite=False)
    try:
        dcp.save(dict(tensors), storage_writer=writer, process_group=group)
    except dcp.api.CheckpointException as error:
        if own := error.failures.get(dist.get_rank(group)):
            raise own[0] from None


def files_of(rank: int, folder: Path) -> list[Path]:
    """Files that a rank has written into `folder`."""
    found = sorted(folder.glob(f"__{rank}_*"))
    return [*found, folder / _METADATA] if rank == 0 else found


def stored_shapes(folder: Path) -> dict[str, torch.Size]:
    """Shape of every tensor in `folder`, by key."""
    return {key: entry.size for key, entry in _metadata(folder).items()}


def read_tensors(own: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Everything that was written into `folder` (called on each rank of `group`).

    Args:
        own: what this rank would write now. Those that are DTensors are read into, the others are new and whole.

    Raises:
        Exception: the first that a rank has.
    """
    tensors = {
        key: own[key] if isinstance(own.get(key), DTensor) else torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in _metadata(folder).items()
    }
    try:
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), process_group=group)
    except dcp.api.CheckpointException as error:
        raise error.failures[min(error.failures)][0] from None
    return tensors


def read_alone(keys: Iterable[str], folder: Path) -> dict[str, Tensor]:
    """Some tensors of `folder`, in a process without ranks.

    Raises:
        Exception: they cannot be read.
    """
    stored = _metadata(folder)
    tensors = {key: torch.empty(stored[key].size, dtype=stored[key].properties.dtype) for key in keys}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
        except dcp.api.CheckpointException as error:
            raise error.failures[0][0] from None
    return tensors


def _metadata(folder: Path) -> Mapping:
    return dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
