"""SA-1B: NAME.jpg with NAME.json, in folders and in tar files, which are read in place through an index.

Scanning the headers of a large tar takes long, so the index of NAME.tar is kept as NAME.tar.members.npz (see
`data.cache`). The whole dataset has 11 million images: tables are arrays, and no Python object is made per image.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ...config import DatasetConfig
from ..cache import Arrays, cached
from ..defects import is_collecting, note_warning, report, tolerated
from ..files import (
    IMAGE_SUFFIXES,
    Packed,
    WarnOnce,
    check_image,
    decode_image,
    digest,
    image_size,
    list_files,
    parse_json,
    read_bytes,
)
from ..masks import FrameMasks, annotated_areas, run_length_masks
from ..sample import DataError
from .selection import refuse_twins, select, shorten

_WHOLE_FILE = -1
_INDEX = "members"
"""Kind of what is kept of a tar file; another name where `_index` changes."""


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


@dataclass(frozen=True)
class _Table:
    """Files by name without suffix, ascending; of several of one name the one that was found last."""

    names: np.ndarray
    """bytes [N]"""
    members: np.ndarray
    """bytes [N], what the folder or tar file calls them"""
    spans: np.ndarray
    """int64 [N, 3]: which folder or tar file, offset and size there (size -1 for a file of its own)"""

    def path(self, row: int, containers: Sequence[str]) -> str:
        """Where a file lies."""
        container, _, size = self.spans[row].tolist()
        separator = "/" if size == _WHOLE_FILE else ":"
        return f"{containers[container]}{separator}{self.members[row].decode()}"

    def find(self, names: np.ndarray) -> np.ndarray:
        """Row of each of `names`, -1 where it is missing."""
        if not len(self.names):
            return np.full(len(names), -1)
        rows = np.minimum(np.searchsorted(self.names, names), len(self.names) - 1)
        return np.where(self.names[rows] == names, rows, -1)


class Sa1bDataset:
    """Dataset of `Sa1bImage`s. The table of millions of images lies in tensors, which loader processes share; copies of
    them, or Python objects, would fill the memory of each."""

    def __init__(self, name: str, containers: Sequence[str], images: _Table, annotations: _Table):
        """`images` and `annotations`: of equal names; the first of their `spans` is an index of `containers`."""
        self.name = name
        self._containers = Packed(container.encode() for container in containers)
        self._names = _as_tensor(images.names)
        self._members = [_as_tensor(table.members) for table in (images, annotations)]
        self._spans = torch.from_numpy(np.stack([images.spans, annotations.spans], 1))
        self._warn = WarnOnce()

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Sa1bImage:
        return Sa1bImage(_as_text(self._names[index]), self._place(index, 0), self._place(index, 1), self._warn)

    def _place(self, index: int, part: int) -> _Place:
        container, offset, size = self._spans[index, part].tolist()
        path, member = self._containers[container].decode(), _as_text(self._members[part][index])
        return _Place(f"{path}/{member}") if size == _WHOLE_FILE else _Place(path, member, offset, size)

    def names_digest(self) -> str:
        return digest(self._names.numpy())

    def sources(self) -> list[Path]:
        """Tar files, and the folders of single files."""
        used = self._spans[:, 1, 0].unique().tolist()
        return [Path(self._containers[container].decode()) for container in used]


def open_sa1b(config: DatasetConfig, name: str, seed: int) -> Sa1bDataset:
    """Open a dataset in SA-1B layout; see `formats.open_dataset`."""
    containers = _contents(Path(config.root))
    of_root = len(containers)
    images = _table(containers, False, of_root, name)
    if config.annotations:
        containers |= _contents(Path(config.annotations))
    annotations = _table(containers, True, of_root, name)
    if not len(images.names) or not len(annotations.names):
        raise _without_mates(images, annotations, list(containers), config, name)
    names = annotations.names[select(_Names(annotations.names), config, name, seed)]
    rows = images.find(names)
    lost = [text.decode() for text in names[rows < 0]]
    if lost:
        error = DataError(
            f"dataset {name!r}: {len(lost)} annotations have no image: {shorten(lost)} "
            f"({lost[0]}.json needs {lost[0]}.jpg); add the images, or name them in `exclude`"
        )
        needs = {
            text.decode(): f"{annotations.path(row, list(containers))} needs {text.decode()}.jpg, which is not there"
            for text, row in zip(names[rows < 0], annotations.find(names[rows < 0]), strict=True)
        }
        report(error, "annotations without images", needs)
    if is_collecting():
        unused = np.flatnonzero(annotations.find(images.names) < 0)
        texts = {images.names[row].decode(): images.path(row, list(containers)) for row in unused}
        notes = {text: f"{path} has no {text}.json" for text, path in texts.items()}
        note_warning("images without annotations, which are not used", notes)
    names, rows = names[rows >= 0], rows[rows >= 0]
    return Sa1bDataset(name, list(containers), _rows(images, rows), _rows(annotations, annotations.find(names)))


def _without_mates(
    images: _Table, annotations: _Table, containers: Sequence[str], config: DatasetConfig, name: str
) -> DataError:
    """Where all images or all annotations are missing."""
    if len(images.names):
        return DataError(
            f"dataset {name!r}: none of its {len(images.names)} images has an annotation: {images.path(0, containers)} "
            f"needs {images.names[0].decode()}.json; put the JSON files beside the images, or set `annotations` to "
            "their folder, or to the one instances JSON of all images (COCO)"
        )
    if len(annotations.names):
        return DataError(
            f"dataset {name!r}: none of its {len(annotations.names)} annotations has an image: "
            f"{annotations.path(0, containers)} needs {annotations.names[0].decode()}.jpg in {config.root}; correct "
            "its `root`"
        )
    for folder, files in list_files(Path(config.root), (".tar",)):
        for file in files:
            _read_tar(folder / file)  # says which one cannot be read
    return DataError(
        f"dataset {name!r}: {config.root} holds no images and no JSON files; expected NAME.jpg with NAME.json each, or "
        ".tar files of them (not compressed)"
    )


class _Names(Sequence[str]):
    """Text of a table's names, one at a time."""

    def __init__(self, names: np.ndarray):
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [text.decode() for text in self._names[index]]
        return self._names[index].decode()


def _contents(root: Path) -> dict[str, Arrays]:
    """Images and JSON files by the path of the folder, or tar file, that holds them; see `_index`."""
    found: dict[str, Arrays] = {}
    for folder, files in list_files(root, (*IMAGE_SUFFIXES, ".json", ".tar")):
        loose = [file for file in files if not file.lower().endswith(".tar")]
        if loose:
            found[str(folder)] = _index((file, 0, _WHOLE_FILE) for file in loose)
        for file in files:
            if file.lower().endswith(".tar"):
                with tolerated():
                    path = folder / file
                    found[str(path)] = cached(path, _INDEX, lambda path=path: _read_tar(path))
    return found


def _read_tar(path: Path) -> Arrays:
    try:
        with tarfile.open(path, "r:") as tar:
            return _index(
                (member.name, member.offset_data, member.size)
                for member in tar
                if member.isfile() and member.name.lower().endswith((*IMAGE_SUFFIXES, ".json"))
            )
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"cannot read {path}: {error}; it is damaged, cut off or compressed: restore or unpack it"
        ) from None


def _index(members: Iterable[tuple[str, int, int]]) -> Arrays:
    """Arrays of files (path, offset, size): `members` the paths, `stems` their names without folder and suffix, bytes
    [N]; `json` bool [N]; `spans` int64 [N, 2]."""
    members = list(members)
    stems, suffixes = [], []
    for name, _, _ in members:
        stem, _, suffix = name.rpartition("/")[2].rpartition(".")
        stems.append(stem.encode())
        suffixes.append(suffix.lower())
    return {
        "members": np.array([name.encode() for name, _, _ in members], dtype=np.bytes_),
        "stems": np.array(stems, dtype=np.bytes_),
        "json": np.array([suffix == "json" for suffix in suffixes], dtype=bool),
        "spans": np.array([span for _, *span in members], dtype=np.int64).reshape(-1, 2),
    }


def _table(contents: Mapping[str, Arrays], json: bool, of_root: int, dataset: str) -> _Table:
    """The JSON files, or the images, of all containers; the first `of_root` of these lie in the dataset's root.

    Raises:
        DataError: two of them have the same name in different folders.
    """
    names, members, spans = [np.empty(0, "S1")], [np.empty(0, "S1")], [np.empty((0, 3), np.int64)]
    for number, files in enumerate(contents.values()):
        chosen = files["json"] == json
        names.append(files["stems"][chosen])
        members.append(files["members"][chosen])
        spans.append(np.insert(files["spans"][chosen], 0, number, axis=1))
    table = _Table(np.concatenate(names), np.concatenate(members), np.concatenate(spans))
    order = np.argsort(table.names, kind="stable")
    table = _rows(table, order)
    last = np.append(table.names[1:] != table.names[:-1], True)[: len(order)]
    twins, containers = {}, list(contents)
    for row in np.flatnonzero(~last):
        paths = [table.path(each, containers) for each in (row, row + 1)]
        one_side = len({container < of_root for container in table.spans[row : row + 2, 0]}) == 1
        places = {(table.spans[each, 0], _folder(table.members[each])) for each in (row, row + 1)}
        if one_side and len(places) > 1:
            twins[table.names[row].decode()] = f"{paths[0]} and {paths[1]} have the same name"
    refuse_twins(twins, dataset)
    return _rows(table, np.flatnonzero(last))


def _folder(member: bytes) -> bytes:
    return member.removeprefix(b"./").rpartition(b"/")[0]


def _rows(table: _Table, rows: np.ndarray) -> _Table:
    return _Table(table.names[rows], table.members[rows], table.spans[rows])


def _as_tensor(texts: np.ndarray) -> torch.Tensor:
    """bytes [N] to uint8 [N, longest]."""
    return torch.from_numpy(np.ascontiguousarray(texts).view(np.uint8).reshape(len(texts), texts.itemsize))


def _as_text(row: torch.Tensor) -> str:
    return row.numpy().tobytes().rstrip(b"\0").decode()
