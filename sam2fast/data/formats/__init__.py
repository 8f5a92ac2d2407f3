"""Datasets on disk as sequences of records; one module per format."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from pathlib import Path

from ...config import DatasetConfig
from ..defects import is_collecting, note_warning
from ..files import IMAGE_SUFFIXES, list_files
from ..sample import DataError, Dataset
from .selection import shorten

LAYOUTS = {
    "video_folder": "JPEGImages/VIDEO/*.jpg with Annotations/VIDEO/*.png or Annotations/VIDEO/OBJECT/*.png "
    "(DAVIS, MOSE, YouTube-VOS)",
    "sav": "VIDEO.mp4 with VIDEO_manual.json or VIDEO_auto.json (SA-V)",
    "sa1b": "NAME.jpg with NAME.json, or .tar files of them (SA-1B)",
    "coco": "an instances JSON (its path in `annotations`) with a folder of images (COCO)",
}


def open_dataset(config: DatasetConfig, name: str, seed: int) -> Dataset:
    """Open a dataset for reading; nothing is decoded yet.

    Args:
        config: where it lies, its format (`auto` recognizes it) and which part of it to use.
        name: what messages and sample ids call it.
        seed: of the share that `config.fraction` takes.

    Raises:
        DataError: missing or unrecognized folder, annotations without their images or videos, nothing left to use.
            Defects inside a file are raised when a record reads it.
    """
    config = resolve(config, name)
    if is_collecting():
        _note_other_formats(config)
    if config.format == "video_folder":
        from .video_folder import open_video_folder as opener
    elif config.format == "sav":
        from .sav import open_sav as opener
    elif config.format == "sa1b":
        from .sa1b import open_sa1b as opener
    else:
        from .coco import open_coco as opener
    return opener(config, name, seed)


def resolve(config: DatasetConfig, name: str) -> DatasetConfig:
    """The configuration with the format that `auto` stands for and paths as they are on disk.

    Raises:
        DataError: missing or unrecognized folder.
    """
    if not config.root.strip():
        raise DataError(f"dataset {name!r}: its `root` is empty; set it to a folder with {_layouts(config.format)}")
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise DataError(_missing_folder(root, config.format, name))
    annotations = config.annotations and str(Path(config.annotations).expanduser())
    if annotations and not Path(annotations).exists():
        raise DataError(
            f"dataset {name!r}: no annotations at {annotations}; correct `annotations`, or leave it empty "
            "where they lie in `root`"
        )
    config = config.model_copy(update={"root": str(root), "annotations": annotations})
    format_name = _recognize(root, config, name) if config.format == "auto" else config.format
    return config.model_copy(update={"format": format_name})


def _recognize(root: Path, config: DatasetConfig, name: str) -> str:
    from .video_folder import find_folders, missing_half

    if config.annotations and config.annotations.endswith(".json"):
        return "coco"
    if find_folders(config) is not None:
        return "video_folder"
    for place in (config.root, config.annotations):
        if place and Path(place).is_dir():
            found = next(_formats_of_files(Path(place)), None)
            if found:
                return found
    if lost := missing_half(root):
        raise DataError(
            f"dataset {name!r}: cannot recognize the format of {root}, which holds {_contents(root)}; for a folder of "
            f"videos {lost} is missing: add it, or set `root` to the folder of frames and `annotations` to that of "
            "masks"
        )
    if images := next(iter(list_files(root, IMAGE_SUFFIXES)), None):
        path = images[0] / images[1][0]
        raise DataError(
            f"dataset {name!r}: cannot recognize the format of {root}: {path} has no annotation, nor has another image "
            f"there; put {path.stem}.json beside it (SA-1B) or set `annotations` to the instances JSON (COCO) or the "
            f"folder of annotations; `root` must be a folder with {_layouts('auto')}"
        )
    raise DataError(
        f"dataset {name!r}: cannot recognize the format of {root}, which holds {_contents(root)}; set "
        f"`format`, or `root` to a folder with {_layouts('auto')}"
    )


def _note_other_formats(config: DatasetConfig) -> None:
    from .video_folder import find_folders

    root = Path(config.root)
    found = dict.fromkeys(_formats_of_files(root)) | ({"video_folder": None} if find_folders(config) else {})
    others = [name for name in found if name != config.format]
    if others:
        what = " and ".join(f"{name} ({LAYOUTS[name].partition(' (')[0]})" for name in others)
        reason = (
            f"{root} is read as {config.format} and also holds what looks like {what}; give each format a folder and a "
            "dataset of its own, or say which is meant with `format`"
        )
        note_warning("data of another format, which is not used", {"": reason})


def _formats_of_files(root: Path) -> Iterator[str]:
    """The formats that the names of JSON and tar files speak for, of one folder below `root` after the other."""
    patterns = (
        ("*_manual.json", "sav"),
        ("*_auto.json", "sav"),
        ("*.tar", "sa1b"),
        ("sa_*.json", "sa1b"),
        ("instances*.json", "coco"),
    )
    for folder, files in list_files(root, (".json", ".tar")):
        found = [format_name for pattern, format_name in patterns if fnmatch.filter(files, pattern)]
        yield from found
        if not found and any(
            (folder / file).with_suffix(suffix).is_file() for file in files[:100] for suffix in IMAGE_SUFFIXES
        ):
            yield "sa1b"


def _missing_folder(root: Path, format_name: str, name: str) -> str:
    if root.is_file():
        return f"dataset {name!r}: {root} is a file; give the folder that holds it (a COCO json goes to `annotations`)"
    existing = next((parent for parent in root.parents if parent.is_dir()), Path("."))
    return (
        f"dataset {name!r}: no folder at {root} ({existing} holds {_contents(existing)}); set its `root` to a "
        f"folder with {_layouts(format_name)}"
    )


def _layouts(format_name: str) -> str:
    return LAYOUTS.get(format_name) or "".join(["one of:", *(f"\n  {key}: {text}" for key, text in LAYOUTS.items())])


def _contents(folder: Path) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
    return shorten(names, 6) if names else "nothing"
