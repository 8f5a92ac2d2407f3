"""All that is wrong with one video or image, and what is in it."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from ..defects import SIZES, Collected, Defect, collecting, tolerated
from ..sample import Dataset, VideoRecord

TRAINING_SIDE = 1024
"""Side of the square input in pixels that sizes of masks are stated for, the `image_size` of the official models."""
TINY_AREA = 64
"""Pixels at `TRAINING_SIDE` under which a mask is called tiny: 2 x 2 cells of the logits, which have a quarter of the
input's side."""
_MOST_BROKEN_FRAMES = 20


@dataclass
class ItemReport:
    """What one video or image holds; of what cannot be read, nothing is counted."""

    index: int
    name: str
    num_frames: int = 0
    frame_rate: float = 0.0
    """Frames a second; 0 where the format has none."""
    size: tuple[int, int] | None = None
    """Height and width."""
    annotated: int = 0
    """Annotated frames."""
    objects: list[int] = field(default_factory=list)
    """Objects that are visible, by annotated frame."""
    masklets: int = 0
    """Objects that are visible in some frame."""
    returning: int = 0
    """Objects that are out of sight in some annotated frame and visible before and after."""
    seen_once: int = 0
    """Objects that are visible in one of several annotated frames."""
    empty_masks: int = 0
    """Masks without a pixel, of objects that have an annotation."""
    tiny_masks: int = 0
    defects: list[Defect] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        return all(defect.is_warning for defect in self.defects)


class Inspector:
    """The items of a dataset as `ItemReport`s; a map-style dataset for a torch DataLoader."""

    def __init__(self, dataset: Dataset):
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> ItemReport:
        return inspect(self._dataset[index], index)


def inspect(record: VideoRecord, index: int = 0) -> ItemReport:
    """Read every frame and every mask of a record, one after the other, and go on after a defect."""
    report = ItemReport(index, record.name)
    with collecting() as notes:
        notes.item = record.name
        try:
            _inspect_frames(record, report, notes)
            _inspect_masks(record, report, notes)
        except Exception as error:  # whatever a file does to a library: the others are still to be checked
            notes.defects.append(Defect(record.name, "other errors", f"{type(error).__name__}: {error}"))
        if report.objects and not any(report.objects) and not notes.defects:
            notes.warning("without any visible object", f"no object is visible in {report.name}")
        _note_early_end(record, report, notes)
        if report.masklets and report.masklets == report.seen_once:
            notes.warning(
                "with every object in a single frame",
                f"{report.name} shows each object in one of {report.annotated} annotated frames; if these are prompts "
                "and not ground truth, do not train on them: objects count as absent from the other frames",
            )
    report.defects = _fold(notes.defects)
    return report


def _inspect_frames(record: VideoRecord, report: ItemReport, notes: Collected) -> None:
    notes.kind = "images and videos that cannot be read"
    with tolerated():
        report.num_frames = record.num_frames
        report.size = record.size
        report.frame_rate = getattr(record, "frame_rate", 0.0)
    known = len(notes.defects)
    for frame in range(report.num_frames):
        with _jpeg_messages() as said, tolerated():
            record.frames([frame])
        for line in said:  # libjpeg goes on with gray or shifted blocks
            notes.warning("images that are decoded with damage", f"{record.name}, frame {frame}: {line}")
        if len(notes.defects) - known >= _MOST_BROKEN_FRAMES:
            notes.warning("not checked to the end", f"{record.name}: frames after {frame}, because so many are broken")
            break


@contextmanager
def _jpeg_messages() -> Iterator[list[str]]:
    """What libjpeg writes to the error stream of this process inside the block, by lines, once it is over. All else
    goes on to where it should."""
    said: list[str] = []
    sys.stderr.flush()
    before = os.dup(2)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            try:
                yield said
            finally:
                os.dup2(before, 2)
            file.seek(0)
            for line in file:
                if b"JPEG" in line:
                    said.append(line.decode(errors="replace").rstrip())
                else:
                    os.write(before, line)
    finally:
        os.close(before)


def _inspect_masks(record: VideoRecord, report: ItemReport, notes: Collected) -> None:
    notes.kind = "annotations that cannot be read"
    annotated: list[int] = []
    with tolerated():
        annotated = list(record.annotated)
    if report.size is None:  # masks are compared with it
        return
    report.annotated = len(annotated)
    notes.kind = "masks that cannot be read"
    seen: dict[int, list[int]] = {}
    for position, frame in enumerate(annotated):
        with tolerated():
            masks = record.masks(frame)
            scale = TRAINING_SIDE**2 / (masks.size[0] * masks.size[1])
            report.objects.append(len(masks))
            report.empty_masks += len(masks.empty)
            report.tiny_masks += sum(masks.area(object_id) * scale < TINY_AREA for object_id in masks)
            for object_id in masks:
                seen.setdefault(object_id, []).append(position)
    report.masklets = len(seen)
    report.seen_once = sum(len(positions) == 1 for positions in seen.values()) if len(annotated) > 1 else 0
    report.returning = sum(positions[-1] - positions[0] >= len(positions) for positions in seen.values())


def _note_early_end(record: VideoRecord, report: ItemReport, notes: Collected) -> None:
    """Annotations that stop long before the video does: perhaps of another cut of it, or written halfway."""
    if report.annotated < 2 or notes.defects:
        return
    annotated = record.annotated
    widest = max(after - before for before, after in zip(annotated, annotated[1:], strict=False))
    if report.num_frames - 1 - annotated[-1] > 2 * widest:
        notes.warning(
            "annotated up to a part only",
            f"{report.name} has {report.num_frames} frames and is annotated up to frame {annotated[-1]}; the frames "
            "after it are not used",
        )


def _fold(defects: list[Defect]) -> list[Defect]:
    """Defects of one item; of warnings of a kind, and of masks in one file that have the wrong size, the first one
    with their number."""
    groups: dict[object, list[Defect]] = {}
    for number, defect in enumerate(defects):
        file = defect.reason.partition(", ")[0] if defect.kind == SIZES else number
        groups.setdefault((defect.kind, defect.is_warning or file), []).append(defect)
    return [replace(group[0], count=len(group)) for group in groups.values()]
