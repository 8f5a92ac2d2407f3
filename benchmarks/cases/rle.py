"""Run-length masks of SA-V: every masklet of a video, frame by frame, at full size or cropped and resized."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from harness import FOLDER
from harness.case import Case, Outputs, Provider, Run, cpp_obstacle
from torch import Tensor

from sam2fast_kernels.masks import pack_masks
from sam2fast_kernels.rle import decode, parse
from sam2fast_kernels.rle.reference import compress

FORM = re.compile(r"(sav|random)(?:@([1-9]\d{0,4}))?")
CROP = 0.9
"""Share of the height and width that a resized mask shows."""
BASELINE_ERROR = 1e-4
"""Share of pixels that fixed-point interpolation may put on the other side of one half."""


CHECKED = 8
"""Every how manieth frame is compared before timing; tests/kernels/test_rle.py compares them all."""


class Frame(NamedTuple):
    """Masks of one frame."""

    counts: list[str]
    size: tuple[int, int]


@dataclass(frozen=True)
class RleShape:
    text: str
    source: str
    side: int | None
    """Of the square that the masks are cropped and resized to; None draws them at full size."""

    full_size_bytes = 0


class Inputs(NamedTuple):
    frames: list[Frame]
    side: int | None


Drawn = Callable[[Frame, int | None], Tensor]
"""All masks of a frame, bool or uint8 [N, H, W], or packed."""


def crop(size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns in the middle."""
    margins = [int(length * (1 - CROP) / 2) for length in size]
    return tuple(slice(margin, length - margin) for margin, length in zip(margins, size, strict=True))


def official(frame: Frame, side: int | None) -> Tensor:
    """pycocotools, then OpenCV: linear interpolation of 0 and 255, since of 0 and 1 it rounds off up to a quarter."""
    from pycocotools import mask as coco

    masks = coco.decode([{"size": frame.size, "counts": counts} for counts in frame.counts])
    if side is None:
        return torch.from_numpy(masks).permute(2, 0, 1)
    squares = np.empty((len(frame.counts), side, side), np.uint8)
    for mask, square in zip(np.moveaxis(masks, 2, 0), squares, strict=True):
        part = np.ascontiguousarray(mask[crop(frame.size)]) * 255
        cv2.resize(part, (side, side), dst=square, interpolation=cv2.INTER_LINEAR)
        cv2.threshold(square, 127, 1, cv2.THRESH_BINARY, dst=square)
    return torch.from_numpy(squares)


def native(frame: Frame, side: int | None, packed: bool) -> Tensor:
    if side is None:
        return decode(frame.counts, frame.size, "cpp", packed=packed)
    whole = (slice(0, side), slice(0, side))
    return parse(frame.counts, frame.size, "cpp").check().resample(crop(frame.size), whole, side, packed=packed)


def _provider(draw: Drawn, obstacle: Callable[[torch.device], str | None] = lambda device: None) -> Provider:
    def run(inputs: Inputs) -> Outputs:
        """Keeps the last frame only: a data loader frees the masks of a frame before it reads the next."""
        masks = None
        for frame in inputs.frames:
            masks = draw(frame, inputs.side)
        return {"masks": masks}

    return Provider(lambda: run, obstacle=obstacle)


class RleCase(Case):
    name = "rle"
    about = "COCO run lengths of all masklets of a SA-V video to masks, sav@1024 cropped to 0.9 and resized"
    modes = ("fwd",)
    shapes = ("sav", "sav@1024")
    check_shape = "random@37"
    baseline = "pycocotools"
    providers = {
        "pycocotools": _provider(official),
        "cpp": _provider(lambda frame, side: native(frame, side, packed=False), cpp_obstacle),
        "cpp_bits": _provider(lambda frame, side: native(frame, side, packed=True), cpp_obstacle),
    }

    def shape(self, text: str) -> RleShape:
        match = FORM.fullmatch(text)
        if match is None:
            raise ValueError(f"unknown shape {text!r} of case rle: write sav or sav@SIDE, for instance sav@1024")
        if match[1] == "sav" and not _files():
            raise ValueError(
                f"case rle needs sav/*_manual.json or *_auto.json in {_folder()}; set SAM2FAST_TEST_DATA to the folder "
                "that holds sav/, or take --shape random"
            )
        return RleShape(text, match[1], int(match[2]) if match[2] else None)

    def make_inputs(self, shape: RleShape, device: torch.device) -> Inputs:
        return Inputs(_masklets() if shape.source == "sav" else _random(), shape.side)

    def dtype(self, inputs: Inputs) -> torch.dtype:
        return torch.bool

    def observe(self, run: Run, inputs: Inputs) -> Outputs:
        """Some frames, packed: what a run keeps is its last frame."""
        outputs = {}
        for number, frame in enumerate(inputs.frames[::CHECKED]):
            masks = run(Inputs([frame], inputs.side))["masks"]
            width = inputs.side or frame.size[1]
            outputs[f"frame {number}"] = masks if masks.shape[2] != width else pack_masks(masks)
        return outputs

    def reference(self, inputs: Inputs) -> Outputs:
        return {
            f"frame {n}": pack_masks(_exact(frame, inputs.side)) for n, frame in enumerate(inputs.frames[::CHECKED])
        }

    def fault(self, provider: str, observed: Outputs, expected: Outputs) -> str | None:
        allowed = BASELINE_ERROR if provider == self.baseline else 0
        for name, want in expected.items():
            wrong = int(np.bitwise_count((observed[name] ^ want).numpy()).sum())
            if wrong > allowed * 8 * want.numel():
                return f"{name}: {wrong} pixels are wrong"
        return None

    def ideal_bytes(self, inputs: Inputs, mode: str) -> int:
        """Text read and masks of one byte a pixel written once."""
        return sum(
            sum(map(len, frame.counts))
            + len(frame.counts) * (inputs.side**2 if inputs.side else frame.size[0] * frame.size[1])
            for frame in inputs.frames
        )


def _exact(frame: Frame, side: int | None) -> Tensor:
    """What the plain back end draws, by interpolation in whole numbers."""
    runs = parse(frame.counts, frame.size, "reference").check()
    if side is None:
        return runs.decode(backend="reference")
    return runs.resample(crop(frame.size), (slice(0, side), slice(0, side)), side, backend="reference")


def _folder() -> Path:
    return Path(os.environ.get("SAM2FAST_TEST_DATA") or FOLDER.parent.parent / "shared" / "data")


def _files() -> list[Path]:
    return sorted([*_folder().glob("sav/*_manual.json"), *_folder().glob("sav/*_auto.json")])


def _masklets() -> list[Frame]:
    frames = []
    for path in _files():
        for entries in filter(None, json.loads(path.read_bytes())["masklet"]):
            frames.append(Frame([entry["counts"] for entry in entries], tuple(entries[0]["size"])))
    return frames


def _random() -> list[Frame]:
    """Masks of odd sizes, of few and of many runs."""
    rng = random.Random(0)
    frames = []
    for height, width in ((53, 71), (1, 9), (130, 41)):
        counts = []
        for runs in (0, 1, 8, 200):
            cuts = sorted(rng.randint(0, height * width) for _ in range(runs))
            ends = [0, *cuts, height * width]
            counts.append(compress([b - a for a, b in zip(ends, ends[1:], strict=False)]).decode())
        frames.append(Frame(counts, (height, width)))
    return frames


CASE = RleCase()
