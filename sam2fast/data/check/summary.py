"""What the items of a dataset hold together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ...config import DatasetConfig
from ..defects import Defect
from ..formats.selection import counted
from .item import TINY_AREA, TRAINING_SIDE, ItemReport

CLIP_LENGTHS = (8, 16)
"""Frames of the clips that SAM 2 is trained and then fine-tuned on."""
_SHOWN = 5


@dataclass
class Summary:
    """Sums over the items that were checked; its memory does not grow with them, but for names that are needed."""

    config: DatasetConfig
    total: int
    """Items of the dataset, checked or not."""
    checked: int = 0
    sound: int = 0
    """Items without an error."""
    usable: int = 0
    """Of them, those in which an object is visible."""
    frames: int = 0
    annotated: int = 0
    masks: int = 0
    masklets: int = 0
    returning: int = 0
    seen_once: int = 0
    empty_masks: int = 0
    tiny_masks: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    rates: Counter[float] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    """Items by their annotated frames."""
    objects: Counter[int] = field(default_factory=Counter)
    """Annotated frames by their visible objects."""
    short: dict[str, int] = field(default_factory=dict)
    """Annotated frames of the items with fewer than the shortest of `CLIP_LENGTHS`."""
    defects: list[Defect] = field(default_factory=list)

    @property
    def is_video(self) -> bool:
        return self.config.format in ("video_folder", "sav")

    @property
    def noun(self) -> str:
        return "videos" if self.is_video else "images"

    @property
    def errors(self) -> list[Defect]:
        return [defect for defect in self.defects if not defect.is_warning]

    def add(self, report: ItemReport) -> None:
        self.checked += 1
        self.sound += report.is_sound
        self.usable += report.is_sound and any(report.objects)
        self.defects += report.defects
        if report.size is None:
            return
        self.frames += report.num_frames
        self.annotated += report.annotated
        self.masks += sum(report.objects)
        self.masklets += report.masklets
        self.returning += report.returning
        self.seen_once += report.seen_once
        self.empty_masks += report.empty_masks
        self.tiny_masks += report.tiny_masks
        self.sizes[report.size] += 1
        if report.frame_rate:
            self.rates[round(report.frame_rate, 2)] += 1
        self.objects.update(report.objects)
        self.lengths[report.annotated] += 1
        if self.is_video and report.annotated < CLIP_LENGTHS[0]:
            self.short[report.name] = report.annotated

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        sizes = [{"width": width, "height": height, "items": n} for (height, width), n in self.sizes.most_common()]
        plain = ("total", "checked", "sound", "frames", "annotated", "masks", "masklets", "returning", "seen_once")
        return {
            "root": self.config.root,
            "format": self.config.format,
            **{key: getattr(self, key) for key in (*plain, "empty_masks", "tiny_masks")},
            "tiny": {"pixels": TINY_AREA, "at": TRAINING_SIDE},
            "sizes": sizes,
            "frame_rates": dict(sorted(self.rates.items())),
            "annotated_frames": dict(sorted(self.lengths.items())),
            "objects_per_frame": dict(sorted(self.objects.items())),
            "defects": [vars(defect) for defect in self.defects],
        }

    def lines(self) -> list[str]:
        """The counts as text."""
        read = sum(self.sizes.values())
        rows = [
            (self.noun, f"{read:,} read of {self.checked:,} checked, {self.total:,} in all"),
            ("frames", f"{self.frames:,}, {self.annotated:,} of them annotated" if self.is_video else ""),
            ("masks", f"{self.masks:,}" + (f" in {counted(self.masklets, 'masklet')}" if self.is_video else "")),
            ("objects", f"{_spread(self.objects)} a frame; none in {counted(self.objects[0], 'annotated frame')}"),
            ("sizes", self._sizes()),
            ("frame rates", _top((f"{rate:g} a second", count) for rate, count in self.rates.most_common())),
            ("clips", self._clips() if self.is_video else ""),
            ("vanishing", self._vanishing() if self.is_video else ""),
            ("empty masks", f"{self.empty_masks:,}{' of objects that are absent' if self.is_video else ''}"),
            (
                "tiny masks",
                f"{self.tiny_masks:,}{_share(self.tiny_masks, self.masks)} of under {TINY_AREA} pixels at "
                f"{TRAINING_SIDE} x {TRAINING_SIDE}",
            ),
        ]
        return [f"{name:12} {text}" for name, text in rows if text] if read else []

    def _sizes(self) -> str:
        top = _top((f"{width} x {height}", count) for (height, width), count in self.sizes.most_common())
        if len(self.sizes) <= _SHOWN:
            return top
        (low_height, low_width), *_, (height, width) = sorted(self.sizes, key=lambda size: size[0] * size[1])
        return f"{top}; from {low_width} x {low_height} to {width} x {height}"

    def _clips(self) -> str:
        short = [sum(count for frames, count in self.lengths.items() if frames < n) for n in CLIP_LENGTHS]
        parts = [f"{count:,} too short for {n} frames" for n, count in zip(CLIP_LENGTHS, short, strict=True)]
        return f"{_spread(self.lengths)} annotated frames; {', '.join(parts)}"

    def _vanishing(self) -> str:
        text = f"{counted(self.returning, 'masklet')} out of sight for some time and back later"
        return text + (f", {self.seen_once:,} visible in one annotated frame" if self.seen_once else "")


def defect_lines(summary: Summary, whole: bool = False) -> list[str]:
    """Defects by kind, errors first: the whole list, or one line for each of the first items."""
    lines = []
    for is_warning in (False, True):
        kinds: dict[str, list[Defect]] = {}
        for defect in summary.defects:
            if defect.is_warning == is_warning:
                kinds.setdefault(defect.kind, []).append(defect)
        for kind, defects in sorted(kinds.items(), key=lambda entry: -len(entry[1])):
            lines.append(f"{'warning' if is_warning else 'error'}: {kind}: {_count(defects):,}")
            if whole:
                lines += [_line(defect, defect.reason, defect.count) for defect in defects]
            else:
                lines += _brief(defects, summary)
    return lines


def _brief(defects: list[Defect], summary: Summary) -> list[str]:
    """A line for each of the first items, without the remedy and the root of paths."""
    by_item: dict[str, list[Defect]] = {}
    for defect in defects:
        by_item.setdefault(defect.item or defect.reason, []).append(defect)
    lines = []
    for group in list(by_item.values())[:_SHOWN]:
        reason = group[0].reason.replace(f"{summary.config.root.rstrip('/')}/", "").partition("; ")[0]
        lines.append(_line(group[0], reason, _count(group)))
    if len(by_item) > _SHOWN:
        lines.append(f"  and {counted(len(by_item) - _SHOWN, 'more ' + summary.noun.removesuffix('s'))}")
    return lines


def _line(defect: Defect, reason: str, count: int) -> str:
    name = "" if defect.item in reason else f"{defect.item}: "
    return f"  {name}{reason}" + (f" (and {count - 1:,} more in {defect.item})" if count > 1 else "")


def _count(defects: list[Defect]) -> int:
    return sum(defect.count for defect in defects)


def _share(part: int, whole: int) -> str:
    return f" ({100 * part / whole:.2g} %)" if part else ""


def _top(entries: Iterable[tuple[str, int]]) -> str:
    entries = list(entries)
    text = ", ".join(f"{name} ({count:,})" for name, count in entries[:_SHOWN])
    return f"{text} and {len(entries) - _SHOWN:,} others" if len(entries) > _SHOWN else text


def _spread(counts: Counter[int]) -> str:
    """`low to high (median m)` of a histogram; the one value where there is no other."""
    values = sorted(counter for counter in counts if counts[counter])
    if len(values) < 2:
        return f"{values[0] if values else 0:,}"
    half, seen = counts.total() / 2, 0
    for median in values:
        seen += counts[median]
        if seen >= half:
            break
    return f"{values[0]:,} to {values[-1]:,} (median {median:,})"
