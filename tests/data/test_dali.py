"""The DALI back end beside the OpenCV one: the same samples in the same order, and damaged files."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from sam2fast.config import AugmentConfig, ConfigError, DataConfig, DatasetConfig, MixItem, OcclusionConfig, UserError
from sam2fast.data import dali
from sam2fast.data.dali import DaliDecoder, build_decoder, build_pipeline, choose_backend
from sam2fast.data.dali_plan import assemble, encode
from sam2fast.data.formats import open_dataset
from sam2fast.data.loaders import build_loader
from sam2fast.data.sample import DataError
from sam2fast.data.sampling import ClipDataset
from sam2fast.data.synthetic import write_dataset
from sam2fast.data.video import VideoReader

needs_dali = pytest.mark.skipif(importlib.util.find_spec("nvidia.dali") is None, reason=f"needs {dali.PACKAGE}")
CPU = torch.device("cpu")
COLORS = {"brightness": 0.3, "contrast": 0.4, "saturation": 0.4, "frame_brightness": 0.1, "frame_contrast": 0.1,
          "frame_saturation": 0.1, "grayscale": 0.2, "blur": 0.5, "mosaic": 0.3}  # fmt: skip
CROP = AugmentConfig(scale=(0.6, 1.5), **COLORS)
WARP = AugmentConfig(scale=(0.6, 1.5), degrees=25, shear=20, **COLORS)
CLIP = MixItem(
    dataset="x", frames=4, reverse=0.5, stride=(1, 2), occlusion=OcclusionConfig(probability=0.6, max_frames=1)
)
IMAGES = MixItem(dataset="x", max_objects=4)


def clips(root: Path, item: MixItem, augment: AugmentConfig, side: int, seed: int = 0) -> ClipDataset:
    return ClipDataset(open_dataset(DatasetConfig(root=str(root)), "x", 0), item, augment, side, seed)


def take(dataset: ClipDataset, count: int, decoder: DaliDecoder | None = None, **kwargs) -> list:
    loader = build_loader(dataset, 2, decoder=decoder, **kwargs)
    batches = list(itertools.islice(loader, count))
    loader.close()
    return batches


def assert_same_samples(dataset: ClipDataset, count: int, decoder: DaliDecoder, mean: float, permille: float) -> None:
    """Everything but the pixels of frames is equal. They may differ by `mean` on average over a batch, and one in a
    thousand by more than `permille`."""
    for ours, theirs in zip(take(dataset, count), take(dataset, count, decoder), strict=True):
        ours, theirs = ours.to("cpu"), theirs.to("cpu")
        assert ours.sample_ids == theirs.sample_ids
        assert torch.equal(ours.masks, theirs.masks) and torch.equal(ours.object_to_clip, theirs.object_to_clip)
        assert theirs.frames.dtype == torch.uint8 and ours.frames.shape == theirs.frames.shape
        difference = (ours.frames.int() - theirs.frames.int()).abs().numpy()
        assert difference.mean() <= mean, ours.sample_ids
        assert np.quantile(difference, 0.999) <= permille, ours.sample_ids


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("dali")
    write_dataset(root / "video_folder", "video_folder", 3, seed=0, frames=8, size=(120, 160))
    write_dataset(root / "sa1b", "sa1b", 6, seed=0, size=(150, 200), tar=True)
    write_dataset(root / "sav", "sav", 3, seed=0, frames=8, size=(120, 160))
    return root


@needs_dali
@pytest.mark.parametrize("augment", [CROP, WARP], ids=["crop", "warp"])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("name", "item"), [("video_folder", CLIP), ("sav", CLIP), ("sa1b", IMAGES)])
def test_same_samples_in_the_same_order(synthetic, name, item, augment, seed):
    # axes shrink to down to a third here, where an area average and DALI's Gaussian filter differ at edges
    assert_same_samples(clips(synthetic / name, item, augment, 96, seed), 2, DaliDecoder(CPU), mean=0.8, permille=14)


@needs_dali
def test_same_samples_of_real_frames(shared_data):
    item = CLIP.model_copy(update={"frames": 2, "occlusion": OcclusionConfig()})
    for augment in (CROP, WARP):
        dataset = clips(shared_data / "davis2016", item, augment, 256)
        assert_same_samples(dataset, 1, DaliDecoder(CPU), mean=0.8, permille=14)


@needs_dali
@pytest.mark.parametrize("rotation", [0, 25])
def test_only_rounding_differs_where_nothing_shrinks(synthetic, rotation):
    augment = WARP.model_copy(update={"scale": (1.0, 1.5), "degrees": rotation, "shear": rotation, "mosaic": 0.0})
    for name, item in (("video_folder", CLIP), ("sa1b", IMAGES)):
        assert_same_samples(clips(synthetic / name, item, augment, 256), 1, DaliDecoder(CPU), mean=0.3, permille=3)


@needs_dali
def test_resumes_bit_for_bit(synthetic):
    dataset, decoder = clips(synthetic / "sav", CLIP, WARP, 32), DaliDecoder(CPU)
    whole = take(dataset, 4, decoder)
    for workers, prefetch in ((0, 1), (2, 3)):
        rest = take(dataset, 2, DaliDecoder(CPU, prefetch, threads=2), start=4, workers=workers)
        for a, b in zip(whole[2:], rest, strict=True):
            assert (
                a.sample_ids == b.sample_ids
                and torch.equal(a.frames, b.frames)
                and torch.equal(a.packed_masks, b.packed_masks)
            )


def damage(path: Path, keep: float) -> None:
    """Cut the data of a JPEG off and end it again, so that only decoding can tell."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)] + b"\xff\xd9")


@needs_dali
def test_corrupt_image_is_one_error_that_names_it(video_folder):
    root = video_folder({"fine": 8, "broken": 8}, height=240, width=320)
    first = root / "JPEGImages" / "broken" / "00000.jpg"
    first.write_bytes(first.read_bytes()[:-20])
    dataset = clips(root, MixItem(dataset="x", frames=8), AugmentConfig(), 32)
    with pytest.raises(DataError, match=r"broken.00000\.jpg: cut off"):
        take(dataset, 4, DaliDecoder(CPU))


@needs_dali
def test_image_that_dali_cannot_decode_ends_the_batches_before_it_first(synthetic):
    dataset = clips(synthetic / "sa1b", IMAGES, AugmentConfig(), 32)
    encode_image = functools.partial(encode, hardware_video=False)
    ids = [dataset[number].sample_id for number in range(6)]

    def batches():
        for k in range(6):
            batch = assemble([dataset.draw(2 * k + clip, encode_image) for clip in (0, 1)])
            if k == 2:
                second = batch.image_bytes[0]
                batch.data[0][second + 2 :] = 0
            yield batch

    taken = []
    with pytest.raises(DataError, match=rf"cannot decode a frame of sample {ids[5]}: "):
        for batch in DaliDecoder(CPU).decode(batches()):
            taken += batch.sample_ids
    assert taken == ids[:4]


@needs_dali
def test_only_decoding_blames_a_file(synthetic, monkeypatch):
    from nvidia.dali import Pipeline

    dataset = clips(synthetic / "sa1b", IMAGES, AugmentConfig(), 32)
    batches = [assemble([dataset.draw(k, functools.partial(encode, hardware_video=False))]) for k in range(3)]
    batches[1].parameters["sigma"] = np.zeros((1, 3, 3), np.float32)
    taken = []

    def endless():
        yield from itertools.chain(batches, itertools.repeat(batches[0]))

    with pytest.raises(RuntimeError, match=rf"(?s)dimensions.*while DALI worked on {dataset[1].sample_id}$"):
        for batch in DaliDecoder(CPU).decode(endless()):
            taken += batch.sample_ids
    assert taken == [dataset[0].sample_id]

    def fails(*_):
        raise RuntimeError("CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory")

    monkeypatch.setattr(Pipeline, "share_outputs", fails)
    with pytest.raises(UserError, match=r"DALI ran out of memory .*data\.dali_prefetch") as error:
        next(DaliDecoder(CPU).decode(endless()))
    assert not isinstance(error.value, DataError)


@needs_dali
def test_memory_is_bounded(synthetic):
    loader = build_loader(clips(synthetic / "sa1b", IMAGES, CROP, 32), 2, decoder=DaliDecoder(CPU, prefetch=4))
    resident = []
    for number in range(310):
        next(loader)
        if number >= 60:
            resident.append(psutil.Process().memory_info().rss)
    loader.close()
    # decoded images that were kept would be 250 batches of 180 kB, 45 MB
    assert np.mean(resident[-50:]) - np.mean(resident[:50]) < 20e6


@needs_dali
def test_webdataset_reader_of_dali_reads_the_same_but_cannot_be_told_the_order(synthetic):
    from nvidia.dali import Pipeline, fn, types

    tar = next((synthetic / "sa1b").glob("*.tar"))
    pipeline = Pipeline(batch_size=6, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        jpeg, _ = fn.readers.webdataset(paths=[str(tar)], ext=["jpg", "json"])
        pipeline.set_outputs(jpeg, fn.decoders.image(jpeg, device="cpu", output_type=types.RGB))
    pipeline.build()
    encoded, decoded = pipeline.run()
    dataset = open_dataset(DatasetConfig(root=str(synthetic / "sa1b")), "x", 0)
    assert len(dataset) == 6
    ours = {dataset[index].encoded([0])[0]: dataset[index].frames([0])[0] for index in range(6)}
    assert {np.array(encoded[index]).tobytes() for index in range(6)} == set(ours)
    for index in range(6):
        np.testing.assert_array_equal(np.array(decoded[index]), ours[np.array(encoded[index]).tobytes()])


@needs_dali
def test_video_decoder_of_dali_finds_the_frames(tmp_path, write_video):
    """VP9, the codec that it decodes on a CPU; the graph is the one that decodes H.264 on a GPU."""
    frames = write_video(tmp_path / "v.mp4", 12, 96, 128, codec="libvpx-vp9")
    numbers = [7, 3, 3, 11]
    reader = VideoReader(tmp_path / "v.mp4")
    assert reader.plain
    pipeline = build_pipeline("video", False, 96, 1, None, 1)
    pipeline.build()
    inputs = {
        "data": np.fromfile(tmp_path / "v.mp4", np.uint8), "numbers": np.array(numbers, np.int32),
        "start": np.zeros(2, np.int32), "shape": np.array([96, 128], np.int32), "size": np.array([96, 128], np.float32),
        "shrink": np.array(1, np.int32), "matrix": np.eye(2, 3, dtype=np.float32),
        "square": np.array([96, 96], np.float32), "color": np.tile(np.eye(3, dtype=np.float32), (4, 1, 1)),
        "pivot": np.zeros((4, 1), np.float32), "base": np.zeros((4, 3), np.float32),
        "sigma": np.array(1, np.float32), "window": np.array(1, np.int32),
    }  # fmt: skip
    for name, values in inputs.items():
        pipeline.feed_input(name, [values])
    (output,) = pipeline.run()
    for found, number in zip(np.array(output[0]), numbers, strict=True):
        shown = found.transpose(1, 2, 0).astype(int)
        distances = [np.abs(shown - frame[:, :96]).mean() for frame in frames]
        assert np.argmin(distances) == number and distances[number] < 6  # it converts colors in its own way


def test_videos_that_other_decoders_number_or_show_differently(tmp_path, write_video):
    write_video(tmp_path / "plain.mp4", 6)
    write_video(tmp_path / "rotated.mp4", 6, rotation=90)
    assert VideoReader(tmp_path / "plain.mp4").plain and not VideoReader(tmp_path / "rotated.mp4").plain


@needs_dali
@pytest.mark.parametrize("kind", ["image", "frames", "video"])
@pytest.mark.parametrize("mosaic", [False, True])
def test_gpu_graph_is_well_formed(kind, mosaic):
    # the operators' schemas and the devices of their inputs are checked here; building takes a GPU
    build_pipeline(kind, mosaic, side=64, batch_size=4, device_id=0, threads=1)


@needs_dali
@pytest.mark.gpu
@pytest.mark.parametrize(("name", "item"), [("video_folder", CLIP), ("sav", CLIP), ("sa1b", IMAGES)])
def test_same_samples_on_a_gpu(synthetic, name, item):
    # nvJPEG and NVDEC round and convert colors differently from libjpeg and FFmpeg
    dataset, decoder = clips(synthetic / name, item, WARP, 128), DaliDecoder(torch.device("cuda", 0))
    assert take(dataset, 1, decoder)[0].frames.is_cuda
    assert_same_samples(dataset, 3, decoder, mean=4, permille=30)


def test_backend_is_chosen_or_refused(monkeypatch):
    cuda = torch.device("cuda", 0)
    datasets = {"x": DatasetConfig(root="x")}
    assert DataConfig(datasets=datasets).backend == "opencv" and choose_backend("auto", CPU) == "opencv"
    assert choose_backend("opencv", cuda) == "opencv"
    monkeypatch.setattr(dali, "is_installed", lambda: True)
    assert choose_backend("auto", cuda) == "dali" and choose_backend("dali", CPU) == "dali"
    decoder = build_decoder("dali", DataConfig(datasets=datasets, dali_prefetch=3, workers=0), CPU)
    assert decoder == DaliDecoder(CPU, prefetch=3, threads=1)
    with pytest.raises(ConfigError, match=r"data\.backend=dali works on cuda and cpu, not on mps"):
        choose_backend("dali", torch.device("mps"))
    monkeypatch.setattr(dali, "is_installed", lambda: False)
    assert choose_backend("auto", cuda) == "opencv"
    with pytest.raises(ConfigError, match=r"data\.backend=dali needs nvidia-dali-cuda130"):
        choose_backend("dali", cuda)
