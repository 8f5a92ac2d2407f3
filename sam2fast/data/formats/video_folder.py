"""Video folders: JPEGImages/VIDEO/*.jpg with masks in Annotations/VIDEO (DAVIS, MOSE, YouTube-VOS, SA-V val and test).

Masks are one PNG per frame (`files.decode_labels`) or, in one folder per object, one PNG per frame and object whose
pixels above 0 are the object. Annotations may be sparse. A frame has the name of its mask; numbers match whatever
their zeros (00005.jpg and 0005.png).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from ...config import DatasetConfig
from ..defects import is_collecting, note_warning, report, tolerated
from ..files import (
    IMAGE_SUFFIXES,
    Packed,
    WarnOnce,
    check_image,
    decode_image,
    decode_labels,
    digest_of_names,
    image_size,
    read_bytes,
)
from ..masks import FrameMasks, check_size, label_masks
from ..sample import DataError, SizeMismatch
from .selection import counted, select, shorten

_PAIRS = (("JPEGImages", "Annotations"), ("JPEGImages_24fps", "Annotations_6fps"), ("images", "masks"))
"""Names of the folders of frames and masks: DAVIS and its successors, SA-V val and test, and a common plain one."""
_RESOLUTION = re.compile(r"\d+p|Full-Resolution")
_Key = tuple[str, int]


class FolderVideo:
    """One video; see `sample.VideoRecord`."""

    def __init__(self, name: str, frames: Path, masks: Path, warn: WarnOnce):
        self.name = name
        self._frames_folder, self._masks_folder, self._warn = frames, masks, warn

    @property
    def num_frames(self) -> int:
        return len(self._frame_files)

    @cached_property
    def size(self) -> tuple[int, int]:
        return image_size(read_bytes(self._frame_files[0]), self._frame_files[0])

    @property
    def annotated(self) -> Sequence[int]:
        return list(self._mask_files)

    def frames(self, indices: Sequence[int]) -> list[np.ndarray]:
        images = []
        for index in indices:
            path = self._frame_files[index]
            images.append(decode_image(read_bytes(path), path))
            self._check_frame_size(images[-1].shape[:2], path)
        return images

    def encoded(self, indices: Sequence[int]) -> list[bytes]:
        files = []
        for index in indices:
            path = self._frame_files[index]
            files.append(read_bytes(path))
            self._check_frame_size(check_image(files[-1], path), path)
        return files

    def _check_frame_size(self, size: tuple[int, int], path: Path) -> None:
        if size != self.size:
            raise SizeMismatch(
                f"{path} is {size[1]} x {size[0]}, the first frame of the video {self.size[1]} x {self.size[0]} "
                "(width x height); give all frames one size, or name the video in `exclude`"
            )

    def masks(self, frame: int) -> FrameMasks:
        files = self._mask_files[frame]
        if isinstance(files, Path):
            return label_masks(self._labels(files), self.size)
        per_object: dict[int, np.ndarray] = {}
        for object_id, path in files.items():
            with tolerated():
                per_object[object_id] = self._labels(path, void=False) > 0
        areas = {object_id: int(np.count_nonzero(mask)) for object_id, mask in per_object.items()}
        return FrameMasks(self.size, areas, per_object.__getitem__)

    def areas(self, frame: int) -> tuple[list[int], int]:
        return self.masks(frame).areas()

    def _labels(self, path: Path, void: bool = True) -> np.ndarray:
        labels = decode_labels(read_bytes(path), path, void)
        check_size(labels.shape, self.size, str(path), self._warn)
        return labels

    @cached_property
    def _frame_files(self) -> list[Path]:
        by_key = _by_key(self._frames_folder, IMAGE_SUFFIXES)
        if not by_key:
            raise DataError(
                f"{self._frames_folder} holds no JPEG or PNG frames; add them, or name video {self.name!r} in `exclude`"
            )
        return list(by_key.values())

    @cached_property
    def _mask_files(self) -> Mapping[int, Path | dict[int, Path]]:
        """Frame number -> its label image, or object id -> its image; ascending."""
        numbers = {_key(path.name): number for number, path in enumerate(self._frame_files)}
        merged = _by_key(self._masks_folder, (".png",))
        if merged:
            labels: dict[int, Path] = {}
            for key, path in merged.items():
                with tolerated():
                    labels[self._frame_of(key, path, numbers)] = path
            return labels
        found: dict[int, dict[int, Path]] = {}
        objects = sorted(path for path in self._masks_folder.iterdir() if path.is_dir())
        numbers_of = {int(folder.name) for folder in objects if folder.name.isdecimal()}
        numbered = len(numbers_of) == len(objects)
        for position, folder in enumerate(objects):
            object_id = int(folder.name) if numbered else position + 1
            for key, path in _by_key(folder, (".png",)).items():
                with tolerated():
                    found.setdefault(self._frame_of(key, path, numbers), {})[object_id] = path
        if not found:
            raise DataError(
                f"{self._masks_folder} holds no mask PNGs; add them, or name video {self.name!r} in `exclude`"
            )
        return dict(sorted(found.items()))

    def _frame_of(self, key: _Key, mask: Path, numbers: dict[_Key, int]) -> int:
        if key not in numbers:
            raise DataError(
                f"mask {mask} has no frame of that name in {self._frames_folder}, which holds "
                f"{len(numbers)} frames ({shorten([path.name for path in self._frame_files])}); remove the "
                f"mask, add the frame, or name video {self.name!r} in `exclude`"
            )
        return numbers[key]


class VideoFolder:
    """Dataset of `FolderVideo`s. The table of its folders is kept in tensors (see `files.Packed`)."""

    def __init__(self, name: str, videos: list[tuple[str, str, str]]):
        """`videos`: name, folder of frames, folder of masks."""
        self.name = name
        self._videos = Packed("\0".join(video).encode() for video in videos)
        self._warn = WarnOnce()

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, index: int) -> FolderVideo:
        name, frames, masks = self._videos[index].decode().split("\0")
        return FolderVideo(name, Path(frames), Path(masks), self._warn)

    def names_digest(self) -> str:
        return digest_of_names(self._videos)

    def sources(self) -> list[Path]:
        return [Path(row.decode().split("\0")[2]) for row in self._videos]


def open_video_folder(config: DatasetConfig, name: str, seed: int) -> VideoFolder:
    """Open a dataset of video folders; see `formats.open_dataset`."""
    found = find_folders(config)
    if found is None:
        wanted = " or ".join(f"{frames}/ with {masks}/" for frames, masks in _PAIRS)
        raise DataError(
            f"dataset {name!r}: {config.root} does not hold frames and masks; expected {wanted} in it, or "
            "set `root` to the folder of frames and `annotations` to that of masks"
        )
    frames_root, masks_root = found
    frames, masks = _subfolders(frames_root), _subfolders(masks_root)
    if images := _images(frames_root):
        if frames:
            paths = shorten([str(frames_root / image) for image in images])
            reason = f"{paths}: beside the folders of videos; remove them, or give them a folder and masks"
            note_warning("images outside of any video, which are not used", {"": reason})
        else:  # a single video, without a folder of its own
            single = Path(config.root).resolve().name
            frames, masks = {single: str(frames_root)}, {single: str(masks_root)}
    names = sorted(frames | masks)
    if not names:
        raise DataError(f"dataset {name!r}: {frames_root} is empty; expected one folder of frames per video")
    names = [names[index] for index in select(names, config, name, seed)]
    lost = [video for video in names if video not in frames]
    if lost:
        error = DataError(
            f"dataset {name!r}: {counted(len(lost), 'video')} with masks in {masks_root} but no frames in "
            f"{frames_root}: {shorten(lost)}; add the frames, or name the videos in `exclude`"
        )
        needs = {video: f"{masks[video]} has masks, but {frames_root / video} no frames" for video in lost}
        report(error, "masks without frames", needs)
    if is_collecting():
        unused = {video: f"{frames[video]} has no masks in {masks_root}" for video in names if video not in masks}
        note_warning("videos without masks, which are not used", unused)
    usable = [(video, frames[video], masks[video]) for video in names if video in masks and video in frames]
    if not usable and not lost:
        raise DataError(
            f"dataset {name!r}: none of its {len(names)} videos ({shorten(names)}) has masks in "
            f"{masks_root}; expected a folder of the same name there"
        )
    return VideoFolder(name, usable)


def find_folders(config: DatasetConfig) -> tuple[Path, Path] | None:
    """The folders that hold one entry per video, of frames and of masks; None where the layout is another one."""
    root = Path(config.root)
    pairs = [(root / frames, root / masks) for frames, masks in _PAIRS]
    if config.annotations:
        masks_root = Path(config.annotations)
        pairs = [(frames, masks_root) for frames, _ in pairs] + [(root, masks_root)]
    for frames, masks in pairs:
        if frames.is_dir() and masks.is_dir() and (not config.annotations or _has_png(masks)):
            return _descend(frames), _descend(masks)
    return None


def missing_half(root: Path) -> Path | None:
    """The folder that is missing where `root` holds the frames or the masks of videos alone."""
    for frames, masks in ((root / frames, root / masks) for frames, masks in _PAIRS):
        for there, lost in ((frames, masks), (masks, frames)):
            if not lost.exists() and there.is_dir() and _subfolders(there):
                return lost
    return None


def _descend(folder: Path) -> Path:
    """Into the resolution folder that DAVIS puts between (JPEGImages/480p); the smallest where there are several."""
    inside = sorted(
        (path for path in folder.iterdir() if path.is_dir() and _RESOLUTION.fullmatch(path.name)),
        key=lambda path: (not path.name[0].isdigit(), len(path.name), path.name),
    )
    return inside[0] if inside else folder


def _has_png(folder: Path) -> bool:
    return next(folder.rglob("*.png"), None) is not None


def _subfolders(folder: Path) -> dict[str, str]:
    with os.scandir(folder) as entries:
        return {entry.name: entry.path for entry in entries if not entry.name.startswith(".") and entry.is_dir()}


def _images(folder: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.lower().endswith(suffixes) and not name.startswith("."))


def _by_key(folder: Path, suffixes: tuple[str, ...]) -> dict[_Key, Path]:
    """Image files of a folder in the order of their numbers."""
    names = _images(folder, suffixes)
    by_key = {_key(name): name for name in names}
    for name in names:
        if by_key[_key(name)] != name:
            with tolerated():
                raise DataError(f"{folder / name} and {by_key[_key(name)]} have the same number; keep one of them")
    return {key: folder / by_key[key] for key in sorted(by_key)}


def _key(name: str) -> _Key:
    """A file's place among its neighbors: the text before the last number of its name, and that number."""
    stem = os.path.splitext(name)[0]
    text = stem.rstrip("0123456789")
    return text, int(stem[len(text) :] or -1)
