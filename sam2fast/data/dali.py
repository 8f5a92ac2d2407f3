"""Frames decoded and augmented by NVIDIA DALI: on a GPU by its JPEG and video decoders, or on a CPU to compare.

Which sample comes when, and all that is drawn of it, is decided by our own sampler (`sampling.ClipDataset`). Loader
workers make the plans, read the encoded frames and draw the masks (`dali_plan`). The trainer's process feeds them to
one DALI graph, which decodes every frame, resamples it once, changes its colors and gives uint8 [3, S, S] on the
device.

So samples and order are those of the OpenCV back end, and DALI keeps no state: a run resumes by sample number.
"""

from __future__ import annotations

import importlib.util
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ..config import ConfigError, DataConfig, UserError
from .augment import FILL, GRAY
from .dali_plan import EncodedBatch, EncodedSample, Kind, encode
from .files import decode_image
from .render import SamplePlan
from .sample import DataError, PackedBatch

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

PACKAGE = "nvidia-dali-cuda130"
_OF_MEMORY = re.compile(r"out of memory|bad_alloc|allocat(e|ion)", re.IGNORECASE)
_OF_DECODING = re.compile(r"decoders\.|\bdecod(e|er|ing)\b|nvjpeg|nvdec", re.IGNORECASE)


def choose_backend(backend: Literal["auto", "opencv", "dali"], device: torch.device) -> Literal["opencv", "dali"]:
    """The back end that `DataConfig.backend` stands for: `auto` is DALI on a GPU where it is installed.

    Raises:
        ConfigError: `dali` is not installed, or has no version for this kind of device.
    """
    installed = is_installed()
    if backend == "auto":
        return "dali" if installed and device.type == "cuda" else "opencv"
    if backend == "dali" and not installed:
        raise ConfigError(f"data.backend=dali needs {PACKAGE}, which is not installed: pip install {PACKAGE}, or set "
                          "data.backend=auto")  # fmt: skip
    if backend == "dali" and device.type not in ("cuda", "cpu"):
        raise ConfigError(f"data.backend=dali works on cuda and cpu, not on {device.type}; set data.backend=opencv")
    return backend


def is_installed() -> bool:
    """Whether DALI can be imported."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # of the package above
        return False


def build_decoder(backend: Literal["opencv", "dali"], config: DataConfig, device: torch.device) -> DaliDecoder | None:
    """What `loaders.build_loader` takes as `decoder`, once `choose_backend` has decided; None where OpenCV renders."""
    if backend == "opencv":
        return None
    return DaliDecoder(device, config.dali_prefetch, threads=max(1, config.workers))


@dataclass(frozen=True)
class DaliDecoder:
    """Two halves of rendering: `encode` in the loader's workers, and `decode` in the trainer's process."""

    device: torch.device
    prefetch: int = 2
    """Batches that DALI works on while another one is used."""
    threads: int = 1
    """CPU threads of DALI."""

    def encode(self, plan: SamplePlan) -> EncodedSample:
        """Read what `decode` needs of a sample; `dali_plan.assemble` makes batches of several. On a CPU videos are
        decoded here, since DALI decodes few codecs there.

        Raises:
            DataError: a file is damaged.
        """
        return encode(plan, hardware_video=self.device.type == "cuda")

    def decode(self, batches: Iterator[EncodedBatch]) -> Iterator[PackedBatch]:
        """Batches with their frames on the device, in the order given. Closing the iterator closes `batches`.

        Raises:
            DataError: from the iterator: that of `batches`, or a frame that DALI cannot decode.
            UserError: memory ran out.
        """
        graphs: dict[tuple[Kind, bool], _Graph] = {}
        running: deque[EncodedBatch] = deque()
        problem: DataError | None = None
        try:
            while True:
                while problem is None and len(running) <= self.prefetch:
                    try:
                        encoded = next(batches)
                    except DataError as error:  # after the batches before it
                        problem = error
                        break
                    if _key(encoded) not in graphs:
                        graphs[_key(encoded)] = _Graph(encoded, self)
                    graphs[_key(encoded)].start(encoded)
                    running.append(encoded)
                if not running:
                    raise problem
                encoded = running.popleft()
                yield replace(encoded.batch, frames=graphs[_key(encoded)].result(encoded))
        finally:
            batches.close()


def _key(encoded: EncodedBatch) -> tuple[Kind, bool]:
    return encoded.kind, encoded.mosaic


class _Graph:
    """A built DALI pipeline and the batches that it works on."""

    def __init__(self, example: EncodedBatch, decoder: DaliDecoder):
        self._shapes = (len(example.batch.sample_ids), example.batch.num_frames)
        self._device = decoder.device
        gpu = decoder.device.type == "cuda"
        self._pipeline = build_pipeline(
            example.kind,
            example.mosaic,
            side=example.side,
            batch_size=len(example.parameters["sigma"]),
            device_id=(decoder.device.index or 0) if gpu else None,
            threads=decoder.threads,
        )
        self._pipeline.build()
        self._error: Exception | None = None

    def start(self, encoded: EncodedBatch) -> None:
        """Begin to work on a batch."""
        if self._error is not None:
            return
        try:
            self._pipeline.feed_input("data", encoded.arrays())
            for name, values in encoded.parameters.items():
                self._pipeline.feed_input(name, list(values))
            self._pipeline.schedule_run()
        except (RuntimeError, MemoryError) as error:  # perhaps of a batch that was started before; `result` says it
            self._error = error

    def result(self, encoded: EncodedBatch) -> torch.Tensor:
        """uint8 [B, T, 3, S, S] of the batch that was started first of those not taken yet."""
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            (frames,) = self._pipeline.share_outputs(stream)  # memory is given back in the order of that stream
            tensor = torch.from_dlpack(frames.as_tensor())
            self._pipeline.release_outputs()
        except (RuntimeError, MemoryError) as error:
            raise _failure(encoded, self._error or error) from None
        return tensor.reshape(*self._shapes, *tensor.shape[2:])


def build_pipeline(
    kind: Kind, mosaic: bool, side: int, batch_size: int, device_id: int | None, threads: int
) -> Pipeline:
    """The graph; its inputs are `data` and the parameters that `dali_plan.encode` makes.

    Args:
        kind: of the frames that are fed, see `dali_plan.Kind`.
        mosaic: whether the graph can make mosaics, for which it handles four times the pixels of the square.
        side: S of the square that frames are brought to.
        batch_size: the most samples of one run.
        device_id: the GPU; None works on the CPU.
        threads: of the CPU.

    Returns:
        A pipeline of one output, uint8 [F, 3, S, S] by sample. It is not built yet.
    """
    from nvidia.dali import Pipeline

    # A depth of 1 starts one run a call, as many as wanted: `DaliDecoder.prefetch` is the depth.
    pipeline = Pipeline(batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=1)
    with pipeline:
        frames = _decoded(kind, device_id is not None)  # uint8 [F, H, W, 3]
        pipeline.set_outputs(_augmented(frames, side, device_id is not None, mosaic))
    return pipeline


def _decoded(kind: Kind, gpu: bool) -> Any:
    from nvidia.dali import fn, types

    if kind == "frames":
        frames = _input("data", types.UINT8, 4, layout="FHWC")
        return frames.gpu() if gpu else frames
    decoder = "mixed" if gpu else "cpu"
    data = _input("data", types.UINT8, 1)
    if kind == "video":
        return fn.decoders.video(data, frames=_input("numbers", types.INT32, 1), device=decoder)
    image = fn.decoders.image(
        data, device=decoder, output_type=types.RGB, adjust_orientation=False, jpeg_fancy_upsampling=True
    )
    return fn.expand_dims(image, axes=0, new_axis_names="F")


def _augmented(frames: Any, side: int, gpu: bool, mosaic: bool) -> Any:
    """uint8 [F, H, W, 3] to [F, 3, S, S], with the parameters of `dali_plan`."""
    from nvidia.dali import fn, types

    luma = types.Constant(GRAY.astype(np.float32), device="cpu")
    mean = fn.reductions.mean(frames, axes=(1, 2)).cpu()  # [F, 3]; parameters of GPU operators are read on the host
    gray = fn.reductions.sum(mean * luma, axes=1, keep_dims=True)  # [F, 1]
    # a resize of a part of the image would look at pixels outside of it
    frames = fn.slice(frames, start=_input("start", types.INT32, 1), shape=_input("shape", types.INT32, 1), axes=(1, 2))
    shrink = fn.reinterpret(_input("shrink", types.INT32, 0), dtype=types.INTERP_TYPE)
    frames = fn.resize(frames, size=_input("size", types.FLOAT, 1), mag_filter=types.INTERP_LINEAR, min_filter=shrink)
    warp = {"matrix": _input("matrix", types.FLOAT, 2), "size": _input("square", types.FLOAT, 1)}
    everywhere = fn.reinterpret(fn.ones_like(frames), layout="FHWC")
    inside = fn.warp_affine(everywhere, **warp, fill_value=0, interp_type=types.INTERP_NN)
    frames = fn.warp_affine(frames, **warp, interp_type=types.INTERP_LINEAR)
    frames = fn.coord_transform(
        frames,
        M=fn.per_frame(_input("color", types.FLOAT, 3)),
        T=fn.per_frame(gray * _input("pivot", types.FLOAT, 2) + _input("base", types.FLOAT, 2)),
        dtype=types.UINT8,
    )
    fill = types.Constant(np.array(FILL, np.uint8), device="gpu" if gpu else "cpu")
    frames = frames * inside + fill * (inside ^ types.Constant(np.uint8(1)))
    if mosaic:
        frames = _mosaic(frames, side)
    frames = fn.gaussian_blur(
        frames, sigma=_input("sigma", types.FLOAT, 0), window_size=_input("window", types.INT32, 0)
    )
    return fn.transpose(frames, perm=(0, 3, 1, 2))


def _mosaic(frames: Any, side: int) -> Any:
    """Two by two cells, each mirrored or not. Samples without a mosaic lie in the first one, whose side is S then."""
    from nvidia.dali import fn, types

    cells = [fn.flip(frames, horizontal=_input(f"flip{cell}", types.INT32, 0)) for cell in range(4)]
    rows = [fn.cat(*cells[:2], axis=2), fn.cat(*cells[2:], axis=2)]
    return fn.slice(fn.cat(*rows, axis=1), start=(0, 0), shape=(side, side), axes=(1, 2))


def _input(name: str, dtype: Any, dimensions: int, layout: str | None = None) -> Any:
    from nvidia.dali import fn

    return fn.external_source(name=name, dtype=dtype, ndim=dimensions, layout=layout)


def _failure(encoded: EncodedBatch, error: Exception) -> Exception:
    """What to raise of an error of DALI. A frame is blamed where decoding failed: an image that OpenCV cannot decode
    either, else all of the batch."""
    ids, text = encoded.batch.sample_ids, str(error)
    lines = [line for line in text.splitlines() if "ailed" in line or "rror" in line] or [text]
    reason = lines[-1].strip() or type(error).__name__
    if isinstance(error, MemoryError) or _OF_MEMORY.search(text):
        return UserError(
            f"DALI ran out of memory on {', '.join(ids)}: {reason}; lower data.dali_prefetch or `batch_size`, or set "
            "data.backend=opencv"
        )
    if encoded.kind == "frames" or not _OF_DECODING.search(text):
        error.add_note(f"while DALI worked on {', '.join(ids)}")
        return error
    if encoded.kind == "image":
        for number, data in enumerate(encoded.arrays()):
            try:
                decode_image(data.tobytes(), f"a frame of sample {ids[number // encoded.batch.num_frames]}")
            except DataError as found:
                return found
    return DataError(
        f"DALI cannot decode a frame of {', '.join(ids)}: {reason}; restore the file from the source, name it in the "
        "dataset's `exclude`, or set data.backend=opencv"
    )
