"""Frame-exact decoding."""

from __future__ import annotations

import av
import numpy as np
import pytest
import torch

from sam2fast.data.sample import DataError
from sam2fast.data.video import VideoReader

B_FRAMES = {"bf": "3", "g": "12", "b_strategy": "0"}
ENCODINGS = {
    "b-frames": B_FRAMES,
    "open groups of pictures": {**B_FRAMES, "x264-params": "open-gop=1"},
    "intra only": {"g": "1"},
    "hevc": {"codec": "libx265", "x265-params": "keyint=10:bframes=3:open-gop=1:log-level=none"},
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_any_order_of_frames_is_exact(tmp_path, write_video, encoding):
    path = tmp_path / "video.mp4"
    expected = write_video(path, 50, **ENCODINGS[encoding])
    reader = VideoReader(path)
    assert reader.num_frames == len(expected) == 50 and reader.size == (48, 64)
    rng = np.random.default_rng(0)
    for _ in range(15):
        wanted = rng.integers(0, 50, 4).tolist()
        for index, image in zip(wanted, reader.frames(wanted), strict=True):
            assert (image == expected[index]).all(), index
    assert all((reader.frames([index])[0] == expected[index]).all() for index in range(50))


def test_uneven_presentation_times(tmp_path, write_video):
    times = [0, 1, 2, 7, 8, 20, 21, 22, 40, 41, 42, 43]
    expected = write_video(tmp_path / "video.mp4", len(times), times=times, **B_FRAMES)
    reader = VideoReader(tmp_path / "video.mp4")
    assert reader.num_frames == len(times)
    assert all((reader.frames([index])[0] == expected[index]).all() for index in (9, 3, 11, 0))


def test_reading_forward_never_seeks(tmp_path, write_video, monkeypatch):
    path = tmp_path / "video.mp4"
    write_video(path, 40, g="4")
    reader = VideoReader(path)
    reader.frames([0])
    monkeypatch.setattr(VideoReader, "_seek", lambda *_: pytest.fail("a seek"))
    for index in range(1, 40):
        reader.frames([index])


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_rotation_is_applied(tmp_path, write_video, rotation):
    expected = write_video(tmp_path / "video.mp4", 3, rotation=rotation)
    reader = VideoReader(tmp_path / "video.mp4")
    assert reader.size == ((48, 64) if rotation == 180 else (64, 48))
    assert (reader.frames([1])[0] == np.rot90(expected[1], rotation // 90)).all()


def test_damaged_files_are_named(tmp_path, write_video):
    whole = tmp_path / "whole.mp4"
    write_video(whole, 40, container={"movflags": "faststart"})
    data = whole.read_bytes()
    for name, content, what in (
        ("cut.mp4", data[: len(data) * 2 // 3], r"ends after \d+ of 40 frames"),
        ("header.mp4", data[:100], "no video stream"),
        ("empty.mp4", b"", "cannot open"),
        ("text.mp4", b"not a video" * 50, "cannot open"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=what) as error:
            VideoReader(tmp_path / name).frames([0])
        assert name in str(error.value) and "exclude" in str(error.value)
    with pytest.raises(DataError, match=r"no video at .*missing\.mp4"):
        VideoReader(tmp_path / "missing.mp4").frames([0])


def test_damage_inside_is_named(tmp_path, write_video):
    path = tmp_path / "video.mp4"
    write_video(path, 40, g="10")
    with av.open(str(path)) as source:
        packets = [packet for packet in source.demux(video=0) if packet.size]
        start, size = packets[10].pos, packets[10].size
    data = bytearray(path.read_bytes())
    data[start : start + size] = bytes(size)
    path.write_bytes(data)
    reader = VideoReader(path)
    with pytest.raises(DataError, match=r"video\.mp4: frame 10 of 40 cannot be decoded"):
        reader.frames([10])
    assert len(reader.frames([0, 39])) == 2


def test_real_videos(shared_data):
    folder = shared_data / "videos"
    counts = {"bedroom.mp4": 200, "sam2_gallery_01_dog.mp4": 289, "torchcodec/h265_video.mp4": 10}
    assert {name: VideoReader(folder / name).num_frames for name in counts} == counts
    nasa = VideoReader(folder / "torchcodec" / "nasa_13013.mp4")
    for number in (389, 35, 0):
        expected = torch.load(folder / f"torchcodec/nasa_13013.mp4.stream3.frame{number:06d}.pt", weights_only=True)
        assert torch.equal(torch.from_numpy(nasa.frames([number])[0]), expected)
