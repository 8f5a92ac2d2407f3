"""Types that the readers, the loaders, the models and the validation share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
import torch

from sam2fast_kernels.masks import unpack_masks

from ..config import UserError

if TYPE_CHECKING:
    from .masks import FrameMasks


class DataError(UserError):
    """Data that cannot be used; the message names the file, what is wrong with it and the remedy."""


class SizeMismatch(DataError):
    """A mask or frame whose size is not that of its video or image."""


class VideoRecord(Protocol):
    """One video, or one image as a video of one frame. Cheap to open: nothing is decoded before it is asked for."""

    name: str
    num_frames: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the frames in pixels."""
        ...

    @property
    def annotated(self) -> Sequence[int]:
        """Ascending numbers of the frames that have annotations; the others say nothing about the objects."""
        ...

    def frames(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Decode frames: uint8 [H, W, 3] RGB each, in the order of `indices`."""
        ...

    def masks(self, frame: int) -> FrameMasks:
        """Object id -> bool [H, W] of the objects that are visible in an annotated frame; absent ones are missing."""
        ...

    def areas(self, frame: int) -> tuple[list[int], int]:
        """Pixels of each object visible in an annotated frame, and of the frame, as annotated. No frame is decoded."""
        ...


class Dataset(Protocol):
    """A sequence of records."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> VideoRecord: ...

    def names_digest(self) -> str:
        """Digest of the names of all records in their order."""
        ...

    def sources(self) -> Iterable[Path]:
        """Files of annotations, or folders of them where they are too many."""
        ...


@dataclass
class Sample:
    """One image (T = 1) or clip before batching, at the square training size S."""

    frames: torch.Tensor
    """uint8 [T, 3, S, S], RGB."""
    masks: torch.Tensor
    """bool [T, O, S, S]; an object that is absent from a frame has an empty mask there."""
    object_ids: list[int]
    """The O ids of the objects in their dataset."""
    sample_id: str
    """Where the sample comes from, for messages: `dataset/video@frame,frame,...`."""


class _Clips:
    """What the two forms of a batch have in common."""

    frames: torch.Tensor
    object_to_clip: torch.Tensor

    @property
    def num_frames(self) -> int:
        return self.frames.shape[1]

    @property
    def num_objects(self) -> int:
        return len(self.object_to_clip)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The batch with its tensors changed."""
        tensors = {name: change(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **tensors)


@dataclass
class Batch(_Clips):
    """B clips of T frames, their N objects side by side."""

    frames: torch.Tensor
    """uint8 [B, T, 3, S, S], or float32 where it is already normalized."""
    masks: torch.Tensor
    """bool [T, N, S, S], N the objects of all clips."""
    object_to_clip: torch.Tensor
    """int64 [N], the clip (0 to B-1) of each object, ascending."""
    sample_ids: list[str]
    """One of each clip."""

    @property
    def is_video(self) -> bool:
        return self.num_frames > 1

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch with its tensors on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pack(self) -> PackedBatch:
        """The batch, on the CPU, with eight pixels of its masks to a byte."""
        packed = np.packbits(self.masks.numpy(), axis=-1, bitorder="little")
        return PackedBatch(
            self.frames, torch.from_numpy(packed), self.masks.shape[-1], self.object_to_clip, self.sample_ids
        )


@dataclass
class PackedBatch(_Clips):
    """A batch on its way through queues and buses. Masks of three objects are as many bytes as the frames; as bits they
    are an eighth."""

    frames: torch.Tensor
    packed_masks: torch.Tensor
    """uint8 [T, N, S, ceil(S / 8)] in the bit order of `sam2fast_kernels.masks.pack_masks`."""
    width: int
    """Pixels of a row of the masks."""
    object_to_clip: torch.Tensor
    sample_ids: list[str]

    def pin_memory(self) -> PackedBatch:
        """The batch in page-locked memory, from where `copied(device, non_blocking=True)` does not wait."""
        return self._each(torch.Tensor.pin_memory)

    def copied(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The batch with its tensors on `device`, still packed."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on `device`, its masks unpacked there."""
        moved = self.copied(device, non_blocking)
        if moved.packed_masks.device.type == "cpu":
            bits = np.unpackbits(moved.packed_masks.numpy(), axis=-1, count=self.width, bitorder="little")
            masks = torch.from_numpy(bits.view(bool))
        else:
            masks = unpack_masks(moved.packed_masks, self.width)
        return Batch(moved.frames, masks, moved.object_to_clip, self.sample_ids)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack clips of equal length and size; objects of all clips share one axis (`Batch.object_to_clip`)."""
    assert samples and len({sample.frames.shape for sample in samples}) == 1, [s.frames.shape for s in samples]
    counts = torch.tensor([sample.masks.shape[1] for sample in samples])
    single = samples[0] if len(samples) == 1 else None  # whose tensors, tens of megabytes, are not copied
    return Batch(
        frames=single.frames[None] if single else torch.stack([sample.frames for sample in samples]),
        masks=single.masks if single else torch.cat([sample.masks for sample in samples], dim=1),
        object_to_clip=torch.repeat_interleave(torch.arange(len(samples)), counts),
        sample_ids=[sample.sample_id for sample in samples],
    )
