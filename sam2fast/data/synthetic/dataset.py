"""Whole synthetic datasets: the folder appears only when it is complete, and an equal one is reused."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...config import UserError
from .scene import Scene, SceneConfig
from .writers import CocoWriter, SA1BWriter, SAVWriter, VideoFolderWriter, Writer

FORMATS = ("video_folder", "sav", "sa1b", "coco")
MANIFEST = "synthetic.manifest"
_VERSION = 2  # raise it when the same parameters give other pixels or files


class SyntheticError(UserError):
    """Parameters or a target folder that cannot be used."""


def write_dataset(
    root: str | os.PathLike,
    format: str,
    count: int,
    seed: int = 0,
    *,
    frames: int = 16,
    size: tuple[int, int] = (192, 256),
    tar: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write `count` scenes below `root` and return it; a complete dataset of the same parameters is left as it is.

    Scene i depends on (seed, i) alone. Nothing is visible at `root` before everything is written.

    Args:
        root: folder of the dataset; its parents are created.
        format: "video_folder", "sav" (mp4 at 24 fps, every 4th frame annotated), "sa1b" or "coco" (single images).
        count: videos or images.
        frames: annotated frames of a video; sav videos have 4 * (frames - 1) + 1 frames. Ignored for images.
        size: height and width in pixels, even numbers.
        tar: sa1b only, tar files in place of loose files.
        overwrite: replace a synthetic dataset of other parameters; nothing else is ever replaced.

    Raises:
        SyntheticError: impossible parameters, or `root` holds something else.
    """
    root = Path(root)
    _check(format, count, seed, frames, size, tar)
    manifest = {
        "version": _VERSION,
        "format": format,
        "count": count,
        "seed": seed,
        "frames": frames,
        "size": list(size),
        "tar": tar,
    }
    if not _must_write(root, manifest, overwrite):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = root.parent / f".{root.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        writer = _writer(format, partial, tar)
        config = writer.scene_config(SceneConfig(height=size[0], width=size[1]))
        for index in range(count):
            writer.add(index, Scene(config, np.random.default_rng([seed, index])), frames)
        writer.finish()
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        _publish(partial, root, manifest)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: `python -m sam2fast.data.synthetic --root R --format sav --count 8 --seed 0`."""
    parser = argparse.ArgumentParser(prog="python -m sam2fast.data.synthetic", description="Write a synthetic dataset.")
    parser.add_argument("--root", required=True, help="folder of the dataset")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--count", type=int, required=True, help="number of videos or images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=16, help="annotated frames of a video (default %(default)s)")
    parser.add_argument("--size", type=int, nargs=2, default=(192, 256), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--tar", action="store_true", help="sa1b: tar files in place of loose files")
    parser.add_argument("--overwrite", action="store_true", help="replace a synthetic dataset of other parameters")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        root = write_dataset(
            options.root,
            options.format,
            options.count,
            options.seed,
            frames=options.frames,
            size=tuple(options.size),
            tar=options.tar,
            overwrite=options.overwrite,
        )
    except (SyntheticError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{root}: {options.count} {options.format} items, seed {options.seed} ({time.perf_counter() - start:.1f} s)")
    return 0


def _check(format: str, count: int, seed: int, frames: int, size: tuple[int, int], tar: bool) -> None:
    if format not in FORMATS:
        raise SyntheticError(f"unknown format {format!r}; choose one of {', '.join(FORMATS)}")
    for name, value, least in (("count", count, 1), ("frames", frames, 1), ("seed", seed, 0)):
        if value < least:
            raise SyntheticError(f"{name} must be at least {least}, got {value}")
    if any(side < 32 or side % 2 for side in size):
        raise SyntheticError(f"size must be two even numbers of at least 32 (height width), got {size[0]} {size[1]}")
    if tar and format != "sa1b":
        raise SyntheticError(f"tar is a form of sa1b only, got format {format!r}; drop tar")


def _must_write(root: Path, manifest: dict[str, Any], overwrite: bool) -> bool:
    """Whether there is work to do; False where the same dataset is complete."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return True
    found = _read_manifest(root)
    if found is None:
        raise SyntheticError(f"{root} exists and is not a synthetic dataset; choose another root")
    if found == manifest:
        return False
    if not overwrite:
        wanted = {key: value for key, value in manifest.items() if found.get(key) != value}
        changed = ", ".join(f"{key} {found.get(key)} instead of {value}" for key, value in wanted.items())
        raise SyntheticError(f"{root} holds another synthetic dataset ({changed}); overwrite it or choose another root")
    return True


def _read_manifest(root: Path) -> dict[str, Any] | None:
    try:
        return json.loads((root / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError):
        return None


def _publish(partial: Path, root: Path, manifest: dict[str, Any]) -> None:
    """Give the finished folder its name; of two processes that write the same dataset at once, either may win."""
    old = root.parent / f".{root.name}.old-{os.getpid()}"
    if root.exists():
        if _read_manifest(root) == manifest:
            return
        root.rename(old)
    try:
        partial.rename(root)
    except OSError:
        if _read_manifest(root) != manifest:
            if old.exists() and not root.exists():
                old.rename(root)
            raise
    shutil.rmtree(old, ignore_errors=True)


def _writer(format: str, root: Path, tar: bool) -> Writer:
    if format == "video_folder":
        return VideoFolderWriter(root)
    if format == "sav":
        return SAVWriter(root)
    return SA1BWriter(root, tar) if format == "sa1b" else CocoWriter(root)
