"""Predictions drawn over frames: a PNG strip that a person can judge at a glance, and a short video."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from ..data.drawing import draw_masks, write_png
from .vos import FrameResult

Masks = dict[int, np.ndarray]
_ROWS = ("image", "ground truth", "prediction", "first mask")
_MARGIN = 104  # pixels left of the strip for the names of its rows
_HEADER = 22
_WHITE = (255, 255, 255)


class OverlayWriter:
    """Receives the frames of an evaluation (`evaluate_vos(..., save=writer)`) and draws the first videos of them.

    For each video it leaves NAME.png (rows: image, ground truth, prediction, copy of the first mask; columns: annotated
    frames spread over the video) and NAME.mp4 (the prediction on every frame), renamed when they are complete.

    Args:
        folder: created when the first video comes.
        max_videos: later videos are ignored.
        columns: most frames of a strip.
        tile_width: width of a frame in the strip, in pixels.
        fps: frames per second of the video.
    """

    def __init__(self, folder: Path, max_videos: int, columns: int = 8, tile_width: int = 256, fps: int = 10) -> None:
        self.folder, self.max_videos = folder, max_videos
        self.columns, self.tile_width, self.fps = columns, tile_width, fps
        self._finished = 0
        self._strip: _Strip | None = None
        self._movie: _Movie | None = None

    def __call__(self, result: FrameResult) -> None:
        if self._finished >= self.max_videos:
            return
        if self._strip is None or self._movie is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._strip = _Strip(result.num_frames, self.columns, self.tile_width)
            self._movie = _Movie(self._path(result, "mp4"), self.fps)
        self._strip.add(result)
        self._movie.add(draw_masks(result.image, result.predictions))
        if result.index == result.num_frames - 1:
            self._movie.close()
            self._strip.write(self._path(result, "png"))
            self._strip = self._movie = None
            self._finished += 1

    def _path(self, result: FrameResult, suffix: str) -> Path:
        return self.folder / f"{result.video.replace('/', '_')}.{suffix}"


class _Strip:
    """Columns of a strip, shrunk when they arrive, so that memory does not grow with the video."""

    def __init__(self, num_frames: int, columns: int, tile_width: int) -> None:
        self._wanted = np.linspace(0, num_frames - 1, min(columns, num_frames)).round().astype(int).tolist()
        self._tile_width = tile_width
        self._columns: list[np.ndarray] = []

    def add(self, result: FrameResult) -> None:
        if result.targets is None or not self._wanted or result.index < self._wanted[0]:
            return
        self._wanted = [frame for frame in self._wanted if frame > result.index]
        tiles = [self._shrink(result.image)]
        tiles += [self._tile(result.image, masks) for masks in (result.targets, result.predictions, result.copies)]
        header = np.zeros((_HEADER, self._tile_width, 3), np.uint8)
        _write(header, f"frame {result.index}", 4)
        self._columns.append(np.vstack([header, *tiles]))

    def write(self, path: Path) -> None:
        height = (self._columns[0].shape[0] - _HEADER) // len(_ROWS)
        margin = np.zeros((self._columns[0].shape[0], _MARGIN, 3), np.uint8)
        for row, name in enumerate(_ROWS):
            _write(margin[_HEADER + row * height :], name, 6)
        write_png(path, np.hstack([margin, *self._columns]))

    def _tile(self, image: np.ndarray, masks: Masks) -> np.ndarray:
        small = {object_id: self._shrink(mask.astype(np.uint8)) > 0 for object_id, mask in masks.items()}
        return draw_masks(self._shrink(image), small)

    def _shrink(self, picture: np.ndarray) -> np.ndarray:
        size = (self._tile_width, max(1, round(picture.shape[0] * self._tile_width / picture.shape[1])))
        return cv2.resize(picture, size, interpolation=cv2.INTER_AREA if picture.ndim == 3 else cv2.INTER_NEAREST)


class _Movie:
    """H.264 in yuv420p, which every player reads; larger frames are shrunk to 640 pixels."""

    _LONGEST = 640

    def __init__(self, path: Path, fps: int) -> None:
        import av

        self._path, self._partial = path, path.with_name(f".partial.{path.name}")
        self._container = av.open(self._partial, "w")
        self._stream = self._container.add_stream("libx264", rate=fps, options={"crf": "20", "preset": "veryfast"})
        self._stream.pix_fmt = "yuv420p"

    def add(self, image: np.ndarray) -> None:
        import av

        height, width = image.shape[:2]
        scale = min(1.0, self._LONGEST / max(height, width))
        even = [max(2, round(side * scale / 2) * 2) for side in (width, height)]  # 4:2:0 needs even sides
        if not self._stream.codec_context.is_open:
            self._stream.width, self._stream.height = even
        frame = av.VideoFrame.from_ndarray(cv2.resize(image, even, interpolation=cv2.INTER_AREA), format="rgb24")
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        self._container.mux(self._stream.encode())
        self._container.close()
        self._partial.replace(self._path)


def _write(canvas: np.ndarray, text: str, x: int) -> None:
    cv2.putText(canvas, text, (x, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.45, _WHITE, 1, cv2.LINE_AA)
