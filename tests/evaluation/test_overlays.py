"""Pictures and videos of predictions."""

from __future__ import annotations

import av
import cv2
import numpy as np

from sam2fast.data.drawing import draw_masks, object_color
from sam2fast.evaluation.overlays import OverlayWriter
from sam2fast.evaluation.vos import FrameResult


def play(writer: OverlayWriter, video: str, num_frames: int, size: tuple[int, int] = (61, 81), every: int = 1) -> None:
    """Frames of a gray video whose object 3 is predicted in the left half and annotated in the right half."""
    half = np.zeros(size, bool)
    half[:, : size[1] // 2] = True
    for t in range(num_frames):
        image = np.full((*size, 3), 100, np.uint8)
        writer(FrameResult(video, t, num_frames, image, {3: ~half} if t % every == 0 else None, {3: half}, {}))


def test_masks_are_tinted_and_the_rest_is_not():
    image = np.full((40, 40, 3), 100, np.uint8)
    mask = np.zeros((40, 40), bool)
    mask[10:30, 10:30] = True
    drawn = draw_masks(image, {5: mask}).astype(int)
    tint = np.array(object_color(5))
    assert (np.abs(drawn[20, 20] - tint) < np.abs(100 - tint)).all()
    assert (drawn[~mask] == 100).all() and (image == 100).all()


def test_colors_of_neighboring_ids_differ():
    colors = np.array([object_color(k) for k in range(8)], int)
    distances = np.abs(colors[:, None] - colors[None]).sum(-1)
    assert distances[~np.eye(8, dtype=bool)].min() > 80


def test_a_strip_and_a_movie_for_each_video(tmp_path):
    writer = OverlayWriter(tmp_path / "overlays", max_videos=2, columns=4, tile_width=64)
    for video in ("set/one", "two", "three"):
        play(writer, video, 12)
    assert sorted(path.name for path in (tmp_path / "overlays").iterdir()) == [
        "set_one.mp4",
        "set_one.png",
        "two.mp4",
        "two.png",
    ]
    with av.open(tmp_path / "overlays" / "two.mp4") as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 12
    left, right = frames[0][30, 20].astype(int), frames[0][30, 60].astype(int)
    assert np.ptp(left) > 60 and np.ptp(right) < 20  # the prediction is on the left


def test_rows_of_the_strip(tmp_path):
    play(OverlayWriter(tmp_path, max_videos=1, columns=4, tile_width=64), "clip", 12)
    strip = cv2.cvtColor(cv2.imread(str(tmp_path / "clip.png")), cv2.COLOR_BGR2RGB).astype(int)
    tile = round(61 * 64 / 81)
    header, margin = strip.shape[0] - 4 * tile, strip.shape[1] - 4 * 64
    colorful = [[np.ptp(strip[header + row * tile + tile // 2, margin + x]) > 60 for x in (16, 48)] for row in range(4)]
    assert colorful == [[False, False], [False, True], [True, False], [False, False]]  # image, truth, prediction, copy


def test_columns_are_annotated_frames(tmp_path):
    play(OverlayWriter(tmp_path, max_videos=1, columns=8, tile_width=64), "sparse", 12, every=4)
    strip, full = cv2.imread(str(tmp_path / "sparse.png")), 8 * 64
    assert strip.shape[1] < full and (strip.shape[1] - 104) == 3 * 64


def test_large_frames_are_shrunk_in_the_movie(tmp_path):
    play(OverlayWriter(tmp_path, max_videos=1), "large", 1, size=(721, 1281))
    with av.open(tmp_path / "large.mp4") as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == (640, 360) and stream.codec_context.name == "h264"
