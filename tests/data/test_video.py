"""Frame-exact decoding."""

from __future__ import annotations

import json
import zlib
from fractions import Fraction
from pathlib import Path

import av
import cv2
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
    assert reader.num_frames == len(times) and reader.frame_rate == pytest.approx(24 * 11 / 43)
    assert all((reader.frames([index])[0] == expected[index]).all() for index in (9, 3, 11, 0))


def test_reading_forward_never_seeks(tmp_path, write_video, monkeypatch):
    path = tmp_path / "video.mp4"
    write_video(path, 40, g="4")
    reader = VideoReader(path)
    reader.frames([0])
    monkeypatch.setattr(VideoReader, "_seek", lambda *_: pytest.fail("a seek"))
    for index in range(1, 40):
        reader.frames([index])


def test_what_an_edit_list_hides_is_not_a_frame(tmp_path, write_video):
    """A video that starts in the middle of a group of pictures: the frames before are decoded but not shown."""
    shown = write_video(tmp_path / "whole.mp4", 30, **B_FRAMES)[5:]
    copy_stream(tmp_path / "whole.mp4", 0, tmp_path / "video.mp4", shift=Fraction(-5, 24), use_editlist="1")
    with av.open(str(tmp_path / "video.mp4")) as source:
        assert sum(packet.is_discard for packet in source.demux(video=0)) == 5
    reader = VideoReader(tmp_path / "video.mp4")
    assert reader.num_frames == 25 and reader.frame_rate == pytest.approx(24)
    for wanted in ([20, 3], [0], [13, 24, 14], [1]):
        assert all((image == shown[i]).all() for i, image in zip(wanted, reader.frames(wanted), strict=True)), wanted


def test_frames_that_nobody_needs_are_not_decoded(tmp_path, write_video, monkeypatch):
    expected = write_video(tmp_path / "video.mp4", 49, bf="3", g="60", b_strategy="0", **{"x264-params": "b-pyramid=0"})
    decoded = []
    decode = VideoReader._decode
    monkeypatch.setattr(VideoReader, "_decode", lambda self: (decoded.append(f.pts) or f for f in decode(self)))
    reader = VideoReader(tmp_path / "video.mp4")
    images = reader.frames([3, 40])
    assert (images[0] == expected[3]).all() and (images[1] == expected[40]).all()
    assert len(decoded) < 15  # a reference every 4 frames, and frame 3
    assert all((reader.frames([index])[0] == expected[index]).all() for index in range(41, 49))


@pytest.mark.parametrize("rotation", [0, 90, -90, 180])
def test_rotation_is_applied(tmp_path, write_video, rotation):
    expected = write_video(tmp_path / "video.mp4", 3, rotation=rotation)
    reader = VideoReader(tmp_path / "video.mp4")
    assert reader.size == ((64, 48) if rotation % 180 else (48, 64))
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


def test_a_codec_that_ffmpeg_does_not_know_is_named(tmp_path, write_video):
    path = tmp_path / "v.mp4"
    write_video(path, 4)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    with pytest.raises(DataError, match=r"v\.mp4: its codec is not known to this FFmpeg"):
        len(VideoReader(path).frames([0]))


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


REAL = {
    "bedroom.mp4": 200,
    "sam2_gallery_01_dog.mp4": 289,
    "sam2_gallery_05_default_juggle.mp4": 247,
    "torchcodec/h265_video.mp4": 10,
    "torchcodec/nasa_13013.mp4": 390,
}
"""Frames of each; the last has several video streams, of which the largest counts."""


@pytest.mark.parametrize("name", REAL)
def test_real_videos_in_random_order(shared_data, name):
    """Every frame, by random access, is the one that a plain decoder shows at that place."""
    path = shared_data / "videos" / name
    with av.open(str(path)) as source:
        stream = source.streams.best("video")
        expected = [zlib.crc32(frame.to_ndarray(format="rgb24")) for frame in source.decode(stream)]
        rate = float(stream.average_rate)
    reader = VideoReader(path)
    assert reader.num_frames == len(expected) == REAL[name] and reader.frame_rate == pytest.approx(rate, rel=1e-3)
    for numbers in np.array_split(np.random.default_rng(0).permutation(len(expected)), 3):
        images = reader.frames(numbers.tolist())
        assert [zlib.crc32(image) for image in images] == [expected[number] for number in numbers]


@pytest.mark.parametrize(("video", "stream"), [("nasa_13013", 0), ("nasa_13013", 3), ("h265_video", 0)])
def test_reference_frames_of_torchcodec(shared_data, tmp_path, video, stream):
    folder = shared_data / "videos" / "torchcodec"
    copy_stream(folder / f"{video}.mp4", stream, tmp_path / "video.mp4")
    reader = VideoReader(tmp_path / "video.mp4")
    references = sorted(folder.glob(f"{video}.mp4.stream{stream}.frame*.pt"), reverse=True)
    for path in references:
        image = reader.frames([int(path.stem[-6:])])[0]
        assert torch.equal(torch.from_numpy(image), torch.load(path, weights_only=True)), path.name
    if video == "nasa_13013":
        frames = json.loads((folder / f"{video}.mp4.stream{stream}.all_frames_info.json").read_text())
        assert reader.num_frames == len(frames)
    assert len(references) == {"nasa_13013": 3 + (stream == 3), "h265_video": 1}[video]


def test_reference_pictures_of_a_real_video(shared_data):
    """JPEGs that were saved from a video: the frames are theirs, and not the neighbors."""
    reader = VideoReader(shared_data / "videos" / "bedroom.mp4")
    paths = sorted((shared_data / "videos" / "bedroom_jpg").glob("*.jpg"))
    assert len(paths) == 8
    numbers = [int(path.stem) for path in paths]
    neighbors = [min(max(number + step, 0), 199) for number in numbers for step in (-1, 1)]
    images = dict(zip(numbers + neighbors, reader.frames(numbers + neighbors), strict=True))
    for number, path in zip(numbers, paths, strict=True):
        picture = cv2.imread(str(path))[..., ::-1].astype(np.int16)
        distance = {near: float(np.abs(images[near] - picture).mean()) for near in images if abs(near - number) <= 1}
        assert min(distance, key=distance.get) == number and distance[number] < 2


def copy_stream(path: Path, index: int, to: Path, shift: Fraction = Fraction(0), **options: str) -> None:
    """Copy one stream of a video without decoding it, `shift` seconds later."""
    with av.open(str(path)) as source, av.open(str(to), "w", options=options) as target:
        stream = source.streams[index]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.size:
                packet.pts += int(shift / packet.time_base)
                packet.dts += int(shift / packet.time_base)
                packet.stream = copy
                target.mux(packet)
