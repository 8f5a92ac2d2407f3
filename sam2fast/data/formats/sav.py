"""SA-V: VIDEO.mp4 with VIDEO_manual.json and VIDEO_auto.json, anywhere below the root.

The masklets of a file lie on a regular grid of frames: every 4th (24 frames and 6 annotations a second), unless the
file's `fps` (annotations a second) or its counts say otherwise. A frame where some object has no entry (null) is not
annotated; an object that is absent has an empty mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...config import DatasetConfig
from ..defects import is_collecting, note_warning, report
from ..files import Packed, WarnOnce, digest_of_names, list_files, parse_json, read_bytes
from ..masks import FrameMasks, annotated_areas, run_length_masks
from ..sample import DataError
from ..video import VideoReader
from .selection import counted, refuse_twins, select, shorten

AUTO_ID_OFFSET = 1000
"""Added to the ids of automatic masklets, which count from 0 as those of the manual ones do."""
_DEFAULT_STEP = 4
_VIDEO_FPS = 24


class SavVideo:
    """One video; see `sample.VideoRecord`. The JSON is parsed at first use, the video opened when its frames, masks or
    size are asked for: that reads the whole file."""

    def __init__(self, name: str, video: Path, jsons: list[Path], warn: WarnOnce):
        self.name = name
        self._reader, self._jsons, self._warn = VideoReader(video), jsons, warn

    @property
    def num_frames(self) -> int:
        return self._reader.num_frames

    @property
    def size(self) -> tuple[int, int]:
        return self._reader.size

    @property
    def frame_rate(self) -> float:
        """Frames a second of the video, on average."""
        return self._reader.frame_rate

    @property
    def annotated(self) -> Sequence[int]:
        return self._annotated

    def frames(self, indices: Sequence[int]) -> list[np.ndarray]:
        if max(indices, default=0) >= self.num_frames:
            self._check_length()
        return self._reader.frames(indices)

    @property
    def plain_video(self) -> Path | None:
        """The file, where any decoder finds the frames by number (`VideoReader.plain`)."""
        return self._reader.path if self._reader.plain else None

    def masks(self, frame: int) -> FrameMasks:
        self._check_length()
        return run_length_masks(self._run_lengths(frame), self.size, self._warn)

    def areas(self, frame: int) -> tuple[list[int], int]:
        return annotated_areas(self._run_lengths(frame))

    def _run_lengths(self, frame: int) -> dict[int, tuple[Any, str]]:
        """Object id -> annotation and its source."""
        return {
            object_id: (rle, f"{track.path}, frame {frame}, object {object_id}")
            for track in self._tracks
            for object_id, rle in zip(track.object_ids, track.masklets[frame // track.step], strict=True)
        }

    def __del__(self) -> None:
        # PyAV's objects refer to each other: the open file and the decoder's frames would wait for Python's collector
        # of cycles, which seldom runs in a loader
        self._reader.close()

    @cached_property
    def _tracks(self) -> list[_Masklets]:
        return [_Masklets(path) for path in self._jsons]

    @cached_property
    def _annotated(self) -> list[int]:
        annotated = sorted(set.intersection(*(track.annotated() for track in self._tracks)))
        if not annotated:
            raise DataError(f"{shorten(self._jsons)} annotates no frame; name video {self.name!r} in `exclude`")
        return annotated

    def _check_length(self) -> None:
        if self._annotated[-1] >= self.num_frames:
            raise DataError(
                f"{self._reader.path} has {self.num_frames} frames, its annotation goes up to frame "
                f"{self._annotated[-1]} ({shorten(self._jsons)}); restore the video, or name {self.name!r} in `exclude`"
            )


class _Masklets:
    """The masklets of one JSON file."""

    def __init__(self, path: Path):
        self.path = path
        content = parse_json(read_bytes(path), path)
        masklets = content.get("masklet") if isinstance(content, dict) else None
        if not isinstance(masklets, list) or not all(isinstance(entry, (list, type(None))) for entry in masklets):
            raise self._broken("`masklet` must be a list over frames of lists over objects")
        self.masklets: list[list[Any] | None] = masklets
        widths = {len(entry) for entry in masklets if entry}
        count = max(widths, default=0)
        ids = content.get("masklet_id") or list(range(count))
        if not isinstance(ids, list) or not all(isinstance(number, int) for number in ids):
            raise self._broken(f"masklet_id must be a list of whole numbers, not {ids!r:.80}")
        if len(widths) > 1 or len(ids) != count:
            raise self._broken(f"its frames list {sorted(widths)} objects, masklet_id {len(ids)}")
        if twins := sorted({number for number in ids if ids.count(number) > 1}):
            raise self._broken(f"masklet_id has {shorten(twins)} more than once")
        offset = AUTO_ID_OFFSET if path.stem.endswith("_auto") else 0
        self.object_ids = [number + offset for number in ids]
        self.step = self._grid(content)

    def annotated(self) -> set[int]:
        """Numbers of the video frames for which every object has an entry."""
        return {number * self.step for number, entry in enumerate(self.masklets) if entry and None not in entry}

    def _grid(self, content: dict[str, Any]) -> int:
        """Video frames from one annotated frame to the next."""
        count, duration, rate = (_number(content.get(key)) for key in ("video_frame_count", "video_duration", "fps"))
        if rate:
            step = (count / duration if count and duration else _VIDEO_FPS) / rate
            if not math.isfinite(step):
                raise self._broken(f"`fps` of {rate:g} with {count:g} frames in {duration:g} s")
            return max(1, round(step))
        if count == len(self.masklets):
            return 1
        return _DEFAULT_STEP

    def _broken(self, what: str) -> DataError:
        return DataError(
            f"{self.path} is not a SA-V annotation: {what}; restore the file, or name the video in `exclude`"
        )


class SavDataset:
    """Dataset of `SavVideo`s. The table of its files is kept in tensors (see `files.Packed`)."""

    def __init__(self, name: str, videos: list[tuple[str, str, list[str]]]):
        """`videos`: name, path of the mp4, paths of the JSON files."""
        self.name = name
        self._videos = Packed("\0".join((video, path, *jsons)).encode() for video, path, jsons in videos)
        self._warn = WarnOnce()

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, index: int) -> SavVideo:
        name, video, *jsons = self._videos[index].decode().split("\0")
        return SavVideo(name, Path(video), [Path(path) for path in jsons], self._warn)

    def names_digest(self) -> str:
        return digest_of_names(self._videos)

    def sources(self) -> list[Path]:
        return [Path(path) for row in self._videos for path in row.decode().split("\0")[2:]]


def open_sav(config: DatasetConfig, name: str, seed: int) -> SavDataset:
    """Open a dataset in SA-V layout; see `formats.open_dataset`."""
    root, annotations = Path(config.root), Path(config.annotations or config.root)
    kinds = ("manual", "auto") if config.sav_annotations == "both" else (config.sav_annotations,)
    endings = (".mp4", *(f"_{kind}.json" for kind in kinds))
    found = _paths(root, endings, name)
    annotated = _paths(annotations, endings, name) if annotations != root else found
    jsons: dict[str, list[str]] = {}
    for kind in kinds:
        ending = f"_{kind}.json"
        for file, path in annotated.items():
            if file.endswith(ending):
                jsons.setdefault(file.removesuffix(ending), []).append(path)
    if not jsons:
        wanted = " or ".join(f"*_{kind}.json" for kind in kinds)
        other = "" if len(kinds) > 1 else " or `sav_annotations`"
        raise DataError(
            f"dataset {name!r}: no {wanted} in {annotations}; correct its `root` (and `annotations`, where "
            f"they lie elsewhere){other}"
        )
    videos = {file[:-4]: path for file, path in found.items() if file[-4:].lower() == ".mp4"}
    names = sorted(jsons)
    names = [names[index] for index in select(names, config, name, seed)]
    lost = [video for video in names if video not in videos]
    if lost:
        error = DataError(
            f"dataset {name!r}: {counted(len(lost), 'annotated video')} without an mp4 in {root}: {shorten(lost)} "
            f"({jsons[lost[0]][0]} needs {lost[0]}.mp4); add the videos, or name them in `exclude`"
        )
        needs = {video: f"{jsons[video][0]} needs {video}.mp4, which is not in {root}" for video in lost}
        report(error, "annotations without videos", needs)
    if is_collecting():
        unused = {video: f"{videos[video]} has no annotations" for video in sorted(videos.keys() - jsons.keys())}
        note_warning("videos without annotations, which are not used", unused)
    return SavDataset(name, [(video, videos[video], jsons[video]) for video in names if video in videos])


def _paths(root: Path, endings: tuple[str, ...], dataset: str) -> dict[str, str]:
    """Path of each file below a folder with one of `endings`, by its name.

    Raises:
        DataError: two of them have the same name.
    """
    paths: dict[str, str] = {}
    twins: dict[str, str] = {}
    for folder, files in list_files(root, endings):
        for file in files:
            path = f"{folder}/{file}"
            if paths.setdefault(file, path) != path:
                twins[file] = f"{paths[file]} and {path} have the same name"
    refuse_twins(twins, dataset)
    return paths


def _number(value: Any) -> float:
    value = value[0] if isinstance(value, list) and value else value
    return float(value) if isinstance(value, (int, float)) and value > 0 else 0.0
