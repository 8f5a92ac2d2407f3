"""Small datasets on disk, written without the package's own writers."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image


def write_image(path: Path, image: np.ndarray) -> None:
    """RGB uint8 [H, W, 3] as the format that the suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image[..., ::-1])


def write_labels(path: Path, labels: np.ndarray, palette: bool = True) -> None:
    """Object numbers uint8 [H, W] as a palette (or gray) PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels)
    if palette:
        image.putpalette([value for index in range(256) for value in (255 - index, index, 7)])
    image.save(path)


def noise_frame(height: int, width: int, seed: int) -> np.ndarray:
    """A smooth random picture that differs clearly from those of other seeds."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.fixture
def video_folder(tmp_path) -> Callable[..., Path]:
    """Write videos in DAVIS layout: object 1 a square that moves right by 2 pixels a frame, object 2 in even frames."""

    def write(videos: dict[str, int], height: int = 40, width: int = 60, every: int = 1) -> Path:
        root = tmp_path / "davis"
        for seed, (name, count) in enumerate(videos.items()):
            for frame in range(count):
                image = noise_frame(height, width, 100 * seed + frame)
                write_image(root / "JPEGImages" / name / f"{frame:05d}.jpg", image)
                if frame % every == 0:
                    labels = np.zeros((height, width), np.uint8)
                    left = min(5 + 2 * frame, width - 12)
                    labels[5:15, left : left + 10] = 1
                    labels[25:35, 30:40] = 2 * (frame % 2 == 0)
                    write_labels(root / "Annotations" / name / f"{frame:05d}.png", labels)
        return root

    return write


@pytest.fixture
def write_video() -> Callable[..., list[np.ndarray]]:
    """Encode frames as mp4 and return what a plain decoder shows, in order of presentation."""

    def write(
        path: Path,
        count: int,
        height: int = 48,
        width: int = 64,
        *,
        codec: str = "libx264",
        rotation: int = 0,
        times: list[int] | None = None,
        container: dict[str, str] | None = None,
        **options: str,
    ) -> list[np.ndarray]:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w", options=container or {}) as output:
            stream = output.add_stream(codec, rate=24, options={"crf": "18", **options})
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            stream.codec_context.time_base = Fraction(1, 24)
            if rotation:
                stream.set_display_rotation(rotation)
            for index in range(count):
                frame = av.VideoFrame.from_ndarray(noise_frame(height, width, index), format="rgb24")
                frame.pts = times[index] if times else index
                frame.time_base = Fraction(1, 24)
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        with av.open(str(path)) as source:
            return [frame.to_ndarray(format="rgb24") for frame in source.decode(video=0)]

    return write
