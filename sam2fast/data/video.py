"""Frame-exact video decoding with PyAV."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from .sample import DataError

_SEEK_GAIN = 8
"""A seek must save decoding more frames than this: it empties the decoder's pipeline."""
_GPU_CODECS = ("h264", "hevc", "av1", "libdav1d", "vp9")
"""Names of FFmpeg's decoders."""


class VideoReader:
    """Frames of a video file by number, in order of presentation.

    The file is opened at the first use. Frame numbers come from the presentation times of all packets, so they are
    exact with B-frames, variable frame rate and edit lists. Reading forward continues to decode; only a jump back, or
    one that a later key frame shortens, seeks. On the way to the frames of a call, those are not decoded that neither
    it nor another frame needs (about half of a video with B-frames).

    Raises (all methods):
        DataError: not a video, cut off, or a frame that cannot be decoded.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._container: av.container.InputContainer | None = None
        self._times = np.empty(0, np.int64)  # presentation time of each frame
        self._key_frames = np.empty(0, np.int64)  # their numbers
        self._needed: frozenset[int] = frozenset()  # presentation times of the frames of a call
        self._decoder: Iterator[av.VideoFrame] = iter(())
        self._position = -1  # number of the frame that `_last` is
        self._last: av.VideoFrame | None = None
        self._converter = VideoReformatter()  # one for all frames: setting it up costs a third of a conversion

    @property
    def num_frames(self) -> int:
        self._open()
        return len(self._times)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels, as displayed (after the rotation that the file asks for)."""
        self._open()
        if self._last is None:
            self._decode_until(0)
        height, width = self._last.height, self._last.width
        return (width, height) if self._last.rotation % 180 else (height, width)

    @property
    def frame_rate(self) -> float:
        """Frames a second, on average over the video; 0 for a single frame, which has no rate."""
        self._open()
        ticks = int(self._times[-1] - self._times[0])
        return (len(self._times) - 1) / float(ticks * self._stream.time_base) if ticks else 0.0

    def frames(self, indices: Sequence[int]) -> list[np.ndarray]:
        """uint8 [H, W, 3] RGB of each frame number, in the order given."""
        self._open()
        assert all(0 <= index < len(self._times) for index in indices), (self.path, indices, len(self._times))
        wanted = sorted(set(indices))
        self._needed = frozenset(self._times[wanted].tolist())
        images = {}
        for index in wanted:
            self._decode_until(index)
            image = self._converter.reformat(self._last, format="rgb24").to_ndarray()
            images[index] = np.rot90(image, self._last.rotation // 90) if self._last.rotation else image
        return [images[index] for index in indices]

    @property
    def plain(self) -> bool:
        """Whether decoders that know neither edit lists nor rotation number and show the frames as this one does: every
        packet is one frame with a time of its own, upright, 8 bits, 4:2:0, of a codec that GPUs decode."""
        self._open()
        if self._last is None:
            self._decode_until(0)
        codec = self._stream.codec_context
        return (
            self._every_packet_shown
            and not self._last.rotation
            and codec.pix_fmt in ("yuv420p", "yuvj420p")
            and codec.name in _GPU_CODECS
        )

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
        self._container, self._last, self._position, self._needed = None, None, -1, frozenset()
        self._stream, self._decoder = None, iter(())  # which refer to the container

    def _open(self) -> None:
        if self._container is not None:
            return
        if not self.path.is_file():
            raise DataError(f"no video at {self.path}; check the dataset's root")
        try:
            self._container = av.open(str(self.path), metadata_errors="ignore")
            self._stream = self._container.streams.best("video")
            if self._stream is None:
                raise self._unreadable("no video stream in it")
            if self._stream.codec_context is None:
                raise self._unreadable("its codec is not known to this FFmpeg")
            self._stream.codec_context.thread_count = 1  # one decoder per worker process is parallel enough
            self._index()
        except (av.FFmpegError, OSError) as error:
            raise self._unreadable(f"cannot open: {error.strerror or error}") from None

    def _index(self) -> None:
        """Read all packet headers, without decoding, for the presentation time of every frame."""
        times, keys, packets = [], [], 0
        for packet in self._container.demux(self._stream):
            if packet.size == 0 or packet.is_corrupt:
                continue
            packets += 1
            time = packet.dts if packet.pts is None else packet.pts
            if packet.is_discard or time is None:  # outside the edit list: decoded, never shown
                continue
            times.append(time)
            if packet.is_keyframe:
                keys.append(time)
        if not times or packets < self._stream.frames:
            raise self._unreadable(f"the file ends after {packets} of {self._stream.frames or 'its'} frames")
        self._times = np.unique(times)
        self._every_packet_shown = len(self._times) == packets
        self._key_frames = np.searchsorted(self._times, np.unique(keys)) if keys else np.zeros(1, np.int64)
        self._seek(0)

    def _decode_until(self, index: int) -> None:
        """Make `_last` frame `index`."""
        if index == self._position:
            return
        key_frame = self._key_frame_before(index)
        if index < self._position or key_frame > self._position + _SEEK_GAIN:
            self._seek(key_frame)
        while not self._advance_to(index):
            # a key frame from which decoding cannot start cleanly (an open group of pictures): start one earlier
            if key_frame == 0:
                raise self._unreadable(f"frame {index} of {len(self._times)} cannot be decoded")
            key_frame = self._key_frame_before(key_frame - 1)
            self._seek(key_frame)

    def _advance_to(self, index: int) -> bool:
        """Decode on to frame `index`; False where the decoder is beyond it or at its end."""
        wanted = self._times[index]
        try:
            for frame in self._decoder:
                time = frame.dts if frame.pts is None else frame.pts
                if time is None or time > wanted:
                    break
                if time == wanted:
                    self._last, self._position = frame, index
                    return True
        except av.FFmpegError as error:
            raise self._unreadable(f"frame {index} of {len(self._times)} cannot be decoded: {error.strerror}") from None
        return False

    def _seek(self, key_frame: int) -> None:
        if key_frame == 0:  # before the first time: some containers start at negative decoding times
            self._container.seek(int(self._times[0]) - 1 if self._times[0] < 0 else 0, stream=self._stream)
        else:
            self._container.seek(int(self._times[key_frame]), stream=self._stream)
        self._decoder = self._decode()
        self._position = -1

    def _decode(self) -> Iterator[av.VideoFrame]:
        """Frames from here on. Those that no other is predicted from are left out where they are presented before the
        last frame that is needed and are not needed themselves."""
        codec = self._stream.codec_context
        for packet in self._container.demux(self._stream):
            time = packet.dts if packet.pts is None else packet.pts
            passed_by = time is not None and time not in self._needed and any(time < other for other in self._needed)
            codec.skip_frame = "NONREF" if passed_by else "DEFAULT"
            yield from packet.decode()

    def _key_frame_before(self, index: int) -> int:
        """Number of the last key frame that is not after frame `index`."""
        found = np.searchsorted(self._key_frames, index, side="right") - 1
        return int(self._key_frames[found]) if found >= 0 else 0

    def _unreadable(self, what: str) -> DataError:
        self.close()
        return DataError(
            f"{self.path}: {what}; the file is damaged or not a video: restore or re-encode it, or name "
            "it in the dataset's `exclude`"
        )
