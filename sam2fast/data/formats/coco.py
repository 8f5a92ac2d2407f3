"""COCO instances JSON: polygons and run lengths; crowd regions are skipped, as are images without other annotations."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...config import DatasetConfig
from ..defects import is_collecting, note_warning, report, tolerated
from ..files import (
    IMAGE_SUFFIXES,
    Packed,
    WarnOnce,
    check_image,
    decode_image,
    digest_of_names,
    image_size,
    list_files,
    parse_json,
    read_bytes,
)
from ..masks import FrameMasks, annotated_areas, check_size, polygons_to_rle, run_length_masks
from ..sample import DataError
from .selection import select, shorten


class CocoImage:
    """One image as a video of one frame; see `sample.VideoRecord`. Object ids are the annotation ids."""

    num_frames = 1
    annotated: Sequence[int] = (0,)

    def __init__(self, name: str, path: Path, entry: dict[str, Any], json_path: Path, warn: WarnOnce):
        self.name = name
        self.image_id: int = entry["id"]
        self._path, self._entry, self._json, self._warn = path, entry, json_path, warn

    @cached_property
    def size(self) -> tuple[int, int]:
        return image_size(self._bytes, self._path)

    def frames(self, indices: Sequence[int]) -> list[np.ndarray]:
        assert not any(indices), indices
        image = decode_image(self._bytes, self._path)
        return [image for _ in indices]

    def encoded(self, indices: Sequence[int]) -> list[bytes]:
        assert not any(indices), indices
        check_image(self._bytes, self._path)
        return [self._bytes for _ in indices]

    def masks(self, frame: int) -> FrameMasks:
        assert frame == 0, frame
        check_size(self._drawn_on, self.size, f"{self._json}, image {self.name}", self._warn)
        return run_length_masks(self._run_lengths(), self.size, self._warn)

    def areas(self, frame: int) -> tuple[list[int], int]:
        assert frame == 0, frame
        return annotated_areas(self._run_lengths())

    @property
    def _drawn_on(self) -> tuple[int, int]:
        """Height and width that the polygons were drawn on."""
        return self._entry["height"], self._entry["width"]

    def _run_lengths(self) -> dict[int, tuple[Any, str]]:
        """Object id -> annotation and its source."""
        rles = {}
        for object_id, segmentation in self._entry["objects"]:
            source = f"{self._json}, annotation {object_id} (image {self.name})"
            with tolerated():
                if object_id in rles:
                    raise DataError(f"{source} has an id that another one has; give every annotation its own")
                is_rle = isinstance(segmentation, dict)
                rle = segmentation if is_rle else polygons_to_rle(segmentation, self._drawn_on, source)
                rles[object_id] = rle, source
        return rles

    @cached_property
    def _bytes(self) -> bytes:
        return read_bytes(self._path)


class CocoDataset:
    """Dataset of `CocoImage`s. Annotations are kept as JSON text in tensors (see `files.Packed`)."""

    def __init__(self, name: str, images: list[tuple[str, Path, dict[str, Any]]], json_path: Path):
        self.name = name
        self._names = Packed(image_name.encode() for image_name, _, _ in images)
        self._paths = Packed(str(path).encode() for _, path, _ in images)
        self._entries = Packed(json.dumps(entry).encode() for _, _, entry in images)
        self._json = json_path
        self._warn = WarnOnce()

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> CocoImage:
        path, entry = Path(self._paths[index].decode()), json.loads(self._entries[index])
        return CocoImage(self._names[index].decode(), path, entry, self._json, self._warn)

    def names_digest(self) -> str:
        return digest_of_names(self._names)

    def sources(self) -> list[Path]:
        return [self._json]


def open_coco(config: DatasetConfig, name: str, seed: int) -> CocoDataset:
    """Open a dataset in COCO layout; see `formats.open_dataset`."""
    json_path = _find_json(config, name)
    entries = _read(json_path)
    names = sorted(entries)
    names = [names[index] for index in select(names, config, name, seed)]
    root = Path(config.root)
    on_disk = {folder / file for folder, files in list_files(root, IMAGE_SUFFIXES) for file in files}
    folders = [root, root / "images", root / json_path.stem.rpartition("_")[2]]
    paths: dict[str, Path] = {}
    for image in names:
        candidates = (folder / entries[image]["file_name"] for folder in folders)
        path = next((path for path in candidates if path in on_disk), None)
        if path is not None:
            paths[image] = path
    lost = [image for image in names if image not in paths]
    if lost:
        error = DataError(
            f"dataset {name!r}: {len(lost)} of {len(names)} images of {json_path} are missing: "
            f"{shorten([entries[image]['file_name'] for image in lost])}; looked in "
            f"{', '.join(map(str, folders))}; correct `root`, or name the images in `exclude`"
        )
        needs = {image: f"{json_path} needs {entries[image]['file_name']}, which is not there" for image in lost}
        report(error, "annotations without images", needs)
    return CocoDataset(name, [(image, path, entries[image]) for image, path in paths.items()], json_path)


def _find_json(config: DatasetConfig, name: str) -> Path:
    where = Path(config.annotations or config.root)
    if where.is_file():
        return where
    found = sorted({*where.glob("instances*.json"), *where.glob("annotations/instances*.json")})
    if not found and (images := next(iter(list_files(Path(config.root), IMAGE_SUFFIXES)), None)):
        raise DataError(
            f"dataset {name!r}: {images[0] / images[1][0]} has no annotation, because there is no instances*.json in "
            f"{where} or its annotations/; set `annotations` to the JSON file of the images"
        )
    if len(found) != 1:
        seen = shorten(found, 6) if found else "none"
        raise DataError(
            f"dataset {name!r}: need one instances*.json in {where} or its annotations/, found {seen}; set "
            "`annotations` to the JSON file"
        )
    return found[0]


def _note_strays(content: dict[str, Any], objects: Mapping[int, list], path: Path) -> None:
    """Warn of annotations without an image, and of images that are listed twice."""
    listed = Counter(_image_name(image) for image in content["images"])
    for image, count in listed.items():
        if count > 1:
            note_warning(
                "images that are listed twice", {image: f"{path} lists {image} {count} times; the last counts"}
            )
    strays = objects.keys() - {image["id"] for image in content["images"]}
    if strays:
        count = sum(len(objects[image_id]) for image_id in strays)
        example = shorten(sorted(map(str, strays)))
        note_warning(
            "annotations of no image", f"{path}: {count} annotations of images that it does not list: {example}"
        )


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Image name -> file_name, id, height, width and objects (id, segmentation)."""
    content = parse_json(read_bytes(path), path)
    try:
        objects: dict[int, list] = defaultdict(list)
        for annotation in content["annotations"]:
            if not annotation.get("iscrowd"):
                objects[annotation["image_id"]].append((annotation["id"], annotation.get("segmentation")))
        if is_collecting():
            _note_strays(content, objects, path)
        images = {
            _image_name(image): {
                "file_name": image["file_name"],
                "id": image["id"],
                "height": int(image["height"]),
                "width": int(image["width"]),
                "objects": objects[image["id"]],
            }
            for image in content["images"]
            if image["id"] in objects
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{path} is not a COCO instances file: {_brief(error)} in `images` or `annotations`; set `annotations` to "
            "the right JSON"
        ) from None
    if not images:
        raise DataError(
            f"{path} annotates no image ({len(content['images'])} images, {len(content['annotations'])} "
            "annotations); set `annotations` to an instances JSON with segmentations"
        )
    return images


def _image_name(image: dict[str, Any]) -> str:
    """The file name without its suffix."""
    return str(Path(image["file_name"]).with_suffix(""))


def _brief(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)
