"""SA-1B: NAME.jpg with NAME.json, in folders and in tar files, which are read in place through an index.

Scanning the headers of a large tar takes long, so the index of NAME.tar is kept beside it as NAME.tar.index.npz (where
that folder can be written) and used as long as the tar's size and time do not change.
"""

from __future__ import annotations

import os
import tarfile
import zipfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ...config import DatasetConfig
from ..defects import is_collecting, note_warning, report, tolerated
from ..files import (
    IMAGE_SUFFIXES,
    Packed,
    WarnOnce,
    check_image,
    decode_image,
    image_size,
    list_files,
    parse_json,
    read_bytes,
)
from ..masks import FrameMasks, annotated_areas, run_length_masks
from ..sample import DataError
from .selection import select, shorten

_WHOLE_FILE = -1


class _Place(NamedTuple):
    """Where bytes lie: a file, or `size` bytes at `offset` of a tar file that calls them `member`."""

    path: str
    member: str = ""
    offset: int = 0
    size: int = _WHOLE_FILE

    def read(self) -> bytes:
        return read_bytes(self.path, self.offset, self.size)

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else self.path


class Sa1bImage:
    """One image as a video of one frame; see `sample.VideoRecord`."""

    num_frames = 1
    annotated: Sequence[int] = (0,)

    def __init__(self, name: str, image: _Place, annotation: _Place, warn: WarnOnce):
        self.name = name
        self._image, self._annotation, self._warn = image, annotation, warn

    @cached_property
    def size(self) -> tuple[int, int]:
        return image_size(self._bytes, self._image)

    def frames(self, indices: Sequence[int]) -> list[np.ndarray]:
        assert not any(indices), indices
        image = decode_image(self._bytes, self._image)
        return [image for _ in indices]

    def encoded(self, indices: Sequence[int]) -> list[bytes]:
        assert not any(indices), indices
        check_image(self._bytes, self._image)
        return [self._bytes for _ in indices]

    def masks(self, frame: int) -> FrameMasks:
        """Object ids are the positions in the file's list."""
        assert frame == 0, frame
        return run_length_masks(self._run_lengths, self.size, self._warn)

    def areas(self, frame: int) -> tuple[list[int], int]:
        assert frame == 0, frame
        return annotated_areas(self._run_lengths)

    @property
    def _run_lengths(self) -> dict[int, tuple[Any, str]]:
        """Object id -> annotation and its source."""
        return {
            number: (
                annotation.get("segmentation") if isinstance(annotation, dict) else None,
                f"{self._annotation}, annotation {number}",
            )
            for number, annotation in enumerate(self._annotations)
        }

    @cached_property
    def _bytes(self) -> bytes:
        return self._image.read()

    @cached_property
    def _annotations(self) -> list:
        content = parse_json(self._annotation.read(), self._annotation)
        annotations = content.get("annotations") if isinstance(content, dict) else None
        if not isinstance(annotations, list):
            raise DataError(
                f"{self._annotation} is not a SA-1B annotation: it has no list `annotations`; restore the "
                f"file, or name image {self.name!r} in `exclude`"
            )
        return annotations


class Sa1bDataset:
    """Dataset of `Sa1bImage`s. The table of millions of images is kept in tensors (see `files.Packed`)."""

    def __init__(self, name: str, pairs: list[tuple[str, _Place, _Place]]):
        self.name = name
        self._names = Packed(image_name.encode() for image_name, _, _ in pairs)
        places = [place for _, *pair in pairs for place in pair]
        self._paths = Packed("\0".join(place[:2]).encode() for place in places)
        self._spans = torch.tensor([place[2:] for place in places], dtype=torch.int64).reshape(-1, 2, 2)
        paths = {place.path if place.member else os.path.dirname(place.path) for _, _, place in pairs}
        self._sources = [Path(path) for path in sorted(paths)]
        self._warn = WarnOnce()

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Sa1bImage:
        image, annotation = (
            _Place(*self._paths[2 * index + part].decode().split("\0"), *self._spans[index, part].tolist())
            for part in (0, 1)
        )
        return Sa1bImage(self._names[index].decode(), image, annotation, self._warn)

    def sources(self) -> list[Path]:
        """Tar files, and the folders of single files."""
        return self._sources


def open_sa1b(config: DatasetConfig, name: str, seed: int) -> Sa1bDataset:
    """Open a dataset in SA-1B layout; see `formats.open_dataset`."""
    images, annotations = _scan(Path(config.root))
    if config.annotations:
        annotations.update(_scan(Path(config.annotations))[1])
    names = sorted(annotations)
    if not images or not names:
        raise DataError(
            f"dataset {name!r}: {config.root} holds {len(images)} images and {len(names)} JSON files; "
            "expected NAME.jpg with NAME.json each, or .tar files of them (not compressed)"
        )
    names = [names[index] for index in select(names, config, name, seed)]
    lost = [image for image in names if image not in images]
    if lost:
        error = DataError(
            f"dataset {name!r}: {len(lost)} annotations have no image: {shorten(lost)} "
            f"({annotations[lost[0]]} needs {lost[0]}.jpg); add the images, or name them in `exclude`"
        )
        needs = {image: f"{annotations[image]} needs {image}.jpg, which is not there" for image in lost}
        report(error, "annotations without images", needs)
    if is_collecting():
        unused = {image: f"{images[image]} has no {image}.json" for image in sorted(images.keys() - annotations.keys())}
        note_warning("images without annotations, which are not used", unused)
    pairs = [(image, images[image], annotations[image]) for image in names if image in images]
    return Sa1bDataset(name, pairs)


def _scan(root: Path) -> tuple[dict[str, _Place], dict[str, _Place]]:
    """Images and annotations below a folder, by name."""
    images: dict[str, _Place] = {}
    annotations: dict[str, _Place] = {}
    for folder, files in list_files(root, (*IMAGE_SUFFIXES, ".json", ".tar")):
        for file in files:
            stem, suffix = os.path.splitext(file)
            if suffix.lower() == ".tar":
                with tolerated():
                    for place in _tar_members(folder / file):
                        stem, suffix = os.path.splitext(os.path.basename(place.member))
                        (annotations if suffix.lower() == ".json" else images)[stem] = place
            else:
                (annotations if suffix.lower() == ".json" else images)[stem] = _Place(str(folder / file))
    return images, annotations


def _tar_members(path: Path) -> list[_Place]:
    """Images and JSON files of a tar file."""
    state = path.stat()
    stamp = np.array([state.st_size, state.st_mtime_ns])
    index = path.with_name(f"{path.name}.index.npz")
    if index.is_file():
        try:
            with np.load(index) as stored:
                if (stored["stamp"] == stamp).all():
                    return [
                        _Place(str(path), name, offset, size)
                        for name, (offset, size) in zip(stored["names"].tolist(), stored["spans"].tolist(), strict=True)
                    ]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # written by something else, or damaged: it is only a cache
    try:
        with tarfile.open(path, "r:") as tar:
            members = [
                (member.name, member.offset_data, member.size)
                for member in tar
                if member.isfile() and member.name.lower().endswith((*IMAGE_SUFFIXES, ".json"))
            ]
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"cannot read {path}: {error}; it is damaged, cut off or compressed: restore or unpack it"
        ) from None
    _write_index(index, members, stamp)
    return [_Place(str(path), *member) for member in members]


def _write_index(path: Path, members: list[tuple[str, int, int]], stamp: np.ndarray) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            np.savez(
                file,
                names=np.array([member[0] for member in members], dtype=np.str_),
                spans=np.array([member[1:] for member in members], dtype=np.int64).reshape(-1, 2),
                stamp=stamp,
            )
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)  # a read-only dataset: the tar is scanned at each start
