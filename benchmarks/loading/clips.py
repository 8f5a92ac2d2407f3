"""Videos with three objects for measuring loaders: cut from DAVIS 2016 where it is at hand, else synthetic.

DAVIS 2016 has one object per video. Its mask is cut into three of equal area, by columns from left to right, and
written as a palette PNG of three objects, which is what DAVIS 2017, MOSE and YouTube-VOS look like; frames are the
original JPEGs. Every pipeline reads the same files.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
from harness import FOLDER
from PIL import Image

from sam2fast.config import DatasetConfig
from sam2fast.data.formats import open_dataset
from sam2fast.data.palette import davis_palette
from sam2fast.data.sample import Dataset
from sam2fast.data.synthetic import main as synthesize

VIDEOS = ("blackswan", "bmx-trees", "horsejump-high")
NUM_FRAMES = 12


def open_clips(folder: Path) -> Dataset:
    """Write the videos below `folder` and open them."""
    real = Path(os.environ.get("SAM2FAST_TEST_DATA") or FOLDER.parent.parent / "shared" / "data") / "davis2016"
    if (real / "JPEGImages").is_dir():
        for video in VIDEOS:
            _cut(real, folder, video)
    else:
        print(f"no DAVIS 2016 in {real}; SAM2FAST_TEST_DATA names a folder that has it: synthetic videos instead",
              file=sys.stderr)  # fmt: skip
        options = ["--format", "video_folder", "--count", str(len(VIDEOS)), "--frames", str(NUM_FRAMES)]
        synthesize(["--root", str(folder), *options, "--size", "480", "854"])
    return open_dataset(DatasetConfig(format="video_folder", root=str(folder)), "clips", seed=0)


def _cut(source: Path, folder: Path, video: str) -> None:
    frames, masks = (folder / kind / video for kind in ("JPEGImages", "Annotations"))
    frames.mkdir(parents=True)
    masks.mkdir(parents=True)
    for path in sorted((source / "JPEGImages" / "480p" / video).glob("*.jpg"))[:NUM_FRAMES]:
        shutil.copy(path, frames)
        mask = np.asarray(Image.open(source / "Annotations" / "480p" / video / f"{path.stem}.png")) > 0
        image = Image.fromarray(thirds(mask))
        image.putpalette(davis_palette().ravel().tolist())
        image.save(masks / f"{path.stem}.png")


def thirds(mask: np.ndarray) -> np.ndarray:
    """Labels 1, 2, 3 of a mask bool [H, W], uint8: three parts of equal area, to a pixel, from left to right."""
    labels = np.zeros(mask.shape[::-1], np.uint8)  # column by column
    pixels = np.flatnonzero(mask.T)
    for number, part in enumerate(np.array_split(pixels, 3), start=1):
        labels.ravel()[part] = number
    return np.ascontiguousarray(labels.T)
