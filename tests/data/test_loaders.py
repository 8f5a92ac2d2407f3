"""Batches: sharding, resuming and worker processes."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sam2fast.config import AugmentConfig, DatasetConfig, MixItem
from sam2fast.data import in_flight
from sam2fast.data.bad_records import BadRecords
from sam2fast.data.formats import open_dataset
from sam2fast.data.loaders import build_loader
from sam2fast.data.sample import Batch, DataError, Sample, collate
from sam2fast.data.sampling import ClipDataset
from sam2fast.data.transfer import Transfer
from sam2fast_kernels.masks import pack_masks

REPOSITORY = Path(__file__).resolve().parents[2]


def clips(root, frames=2):
    dataset = open_dataset(DatasetConfig(root=str(root)), "davis", seed=0)
    return ClipDataset(dataset, MixItem(dataset="davis", frames=frames), AugmentConfig(), 32, seed=0)


def take(count, *args, **kwargs):
    return list(itertools.islice(build_loader(*args, **kwargs), count))


def same(a, b):
    a, b = a.to("cpu"), b.to("cpu")
    return (
        a.sample_ids == b.sample_ids
        and torch.equal(a.frames, b.frames)
        and torch.equal(a.masks, b.masks)
        and torch.equal(a.object_to_clip, b.object_to_clip)
    )


@pytest.fixture
def dataset(video_folder):
    return clips(video_folder({name: 5 for name in "abcdefg"}))


def test_collate_puts_objects_side_by_side():
    samples = [
        Sample(
            torch.full((2, 3, 8, 8), clip, dtype=torch.uint8),
            torch.full((2, count, 8, 8), clip == 1),
            list(range(count)),
            f"clip{clip}",
        )
        for clip, count in enumerate((1, 3, 2))
    ]
    batch = collate(samples)
    assert batch.frames.shape == (3, 2, 3, 8, 8) and batch.masks.shape == (2, 6, 8, 8)
    assert batch.object_to_clip.tolist() == [0, 1, 1, 1, 2, 2] and batch.object_to_clip.dtype == torch.int64
    assert (batch.num_frames, batch.num_objects, batch.is_video) == (2, 6, True)
    assert batch.masks[:, 1:4].all() and not batch.masks[:, [0, 4, 5]].any()
    moved = batch.to("cpu", non_blocking=True)
    assert same(moved, batch)


def test_ranks_share_one_sequence(dataset):
    """Two ranks of batch 2, one rank of batch 4 and one of batch 2 with two micro-batches a step see the same."""
    whole = [batch.sample_ids for batch in take(4, dataset, 4)]
    ranks = [take(4, dataset, 2, rank=rank, world_size=2) for rank in (0, 1)]
    assert [a.sample_ids + b.sample_ids for a, b in zip(*ranks, strict=True)] == whole
    micro = [batch.sample_ids for batch in take(8, dataset, 2, accumulate=2)]
    assert [a + b for a, b in zip(micro[::2], micro[1::2], strict=True)] == whole
    assert len({name for batch in whole for name in batch}) > 7


def test_a_resumed_loader_continues_exactly(dataset):
    whole = take(6, dataset, 2, rank=1, world_size=2)
    assert all(same(a, b) for a, b in zip(take(3, dataset, 2, rank=1, world_size=2, start=12), whole[3:], strict=True))


def test_another_number_of_ranks_continues_with_the_next_sample(dataset):
    """Three steps of two ranks, then others with other batches and micro-batches: every sample of an epoch once."""
    whole = [name for batch in take(21, dataset, 1) for name in batch.sample_ids]
    seen: list[str] = []
    for steps, world_size, batch_size, accumulate in ((3, 1, 1, 1), (2, 2, 2, 1), (1, 3, 1, 2), (1, 1, 4, 1)):
        ranks = [
            iter(take(steps * accumulate, dataset, batch_size, rank, world_size, start=len(seen)))
            for rank in range(world_size)
        ]
        for _ in range(steps * accumulate):
            seen += [name for rank in ranks for name in next(rank).sample_ids]
    assert seen == whole
    assert all(len({name.split("@")[0] for name in seen[first : first + 7]}) == 7 for first in (0, 7, 14))


def test_a_defect_is_one_error(video_folder):
    root = video_folder({"a": 3})
    for path in (root / "JPEGImages/a").iterdir():
        path.write_bytes(path.read_bytes()[:-200])
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"^cannot decode .*\.jpg: [^\n]*`exclude`$") as error:
            next(build_loader(clips(root), 1, workers=workers))
        assert error.value.__cause__ is None


def test_workers_change_nothing_and_end_with_their_loader(dataset):
    loader = build_loader(dataset, 2, start=2, workers=2)
    assert all(same(a, b) for a, b in zip(itertools.islice(loader, 5), take(5, dataset, 2, start=2), strict=True))
    assert len(multiprocessing.active_children()) == 2
    loader.close()
    del loader
    assert not multiprocessing.active_children()


def test_workers_warn_once_between_them(video_folder):
    root = video_folder({"a": 2, "b": 2})
    for path in (root / "Annotations").rglob("*.png"):
        Image.fromarray(np.ones((40, 61), np.uint8)).save(path)
    dataset = clips(root)
    loader = build_loader(dataset, 2, workers=2)
    next(loader)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a worker has said it
        dataset[0]
    loader.close()


def test_a_killed_worker_is_one_error(dataset):
    loader = build_loader(dataset, 2, workers=1)
    next(loader)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"a data loading process died .*data\.workers"):
        for _ in range(10):
            next(loader)


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), RuntimeError("Pin memory thread exited unexpectedly")]
)
def test_a_worker_is_dead_only_where_it_is(dataset, monkeypatch, error):
    """What torch raises where a connection breaks, or the thread that pins memory ends at that."""
    loaders = [build_loader(dataset, 2, workers=1) for _ in range(2)]
    for loader in loaders:
        next(loader)

    def broken(self):
        raise error

    monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "_next_data", broken)
    monkeypatch.setattr(in_flight, "_ENDING", 0.2)
    with pytest.raises(type(error), match=re.escape(str(error))) as raised:
        next(loaders[0])
    assert raised.type is type(error)
    loaders[0].close()
    monkeypatch.setattr(in_flight, "_ENDING", 30.0)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"a data loading process died between two samples \(.*(Pin|Input)"):
        next(loaders[1])


def test_a_lack_of_file_descriptors_is_its_own_error(dataset):
    loader = build_loader(dataset, 2, workers=1, prefetch=4)
    next(loader)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.open(os.devnull, os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(DataError, match=r"^too many open files: .*ulimit -n"):
            next(loader)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for each in taken:
            os.close(each)


class Buggy:
    """A dataset whose record meets a bug."""

    name = "davis"

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return BuggyRecord()


class BuggyRecord:
    name, num_frames, annotated = "video 7", 1, (0,)

    def masks(self, frame):
        return 1 // 0


def test_a_bug_is_told_with_its_sample():
    dataset = ClipDataset(Buggy(), MixItem(dataset="davis"), AugmentConfig(), 32, seed=0)
    with pytest.raises(ZeroDivisionError, match="while loading sample 3 of dataset 'davis', record 'video 7'"):
        next(build_loader(dataset, 1, start=3))


def test_what_workers_get_is_small():
    """Tables of all records lie in tensors, which are shared; 11 million numbers in each pickle would be 88 MB."""

    class Many(Buggy):
        def __len__(self):
            return 200_000

    for item in (MixItem(dataset="davis"), MixItem(dataset="davis", repeat=1.5)):
        clips = ClipDataset(Many(), item, AugmentConfig(), 32, seed=0)
        clips._dataset = None  # is for its reader to keep small
        assert len(ForkingPickler.dumps(clips)) < 10_000


def test_a_sample_that_ends_its_worker_is_named(video_folder, tmp_path):
    """One record makes its process exit, as a crash inside a decoder would; another one gets it killed."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from sam2fast.config import AugmentConfig, DatasetConfig, MixItem
from sam2fast.data.formats import open_dataset
from sam2fast.data.formats.video_folder import FolderVideo
from sam2fast.data.loaders import build_loader
from sam2fast.data.sample import DataError
from sam2fast.data.sampling import ClipDataset
frames = FolderVideo.frames
def fatal(self, indices):
    if self.name == "c":
        os._exit(3)
    if self.name == "e":
        os.kill(os.getpid(), signal.SIGKILL)
    return frames(self, indices)
FolderVideo.frames = fatal
if __name__ == "__main__":
    dataset = open_dataset(DatasetConfig(root={str(video_folder({key: 2 for key in "abcdef"}))!r}), "davis", 0)
    clips = ClipDataset(dataset, MixItem(dataset="davis"), AugmentConfig(), 32, 0)
    order = [clips.draw(number, lambda plan: plan.record.name) for number in range(6)]
    for name in "ce":
        try:
            for batch in build_loader(clips, 1, workers=1, start=order.index(name)):
                print(batch.sample_ids)
        except DataError as error:
            print(order.index(name), error)
""")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    for name, line in zip("ce", done.stdout.splitlines(), strict=True):
        number = line.split(" ")[0]
        assert f"while it loaded sample {number} of dataset 'davis', '{name}' (" in line, done.stderr[-2000:]


def test_workers_end_with_a_killed_trainer(video_folder, tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(f"""
import multiprocessing, os, signal, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from sam2fast_kernels.masks import pack_masks

from sam2fast.config import AugmentConfig, DatasetConfig, MixItem
from sam2fast.data.formats import open_dataset
from sam2fast.data.bad_records import BadRecords
from sam2fast.data.loaders import build_loader
from sam2fast.data.sampling import ClipDataset
if __name__ == "__main__":
    dataset = open_dataset(DatasetConfig(root={str(video_folder({"a": 3}))!r}), "davis", 0)
    loader = build_loader(ClipDataset(dataset, MixItem(dataset="davis"), AugmentConfig(), 32, 0), 1, workers=2)
    next(loader)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
""")
    command = [sys.executable, str(script)]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    workers = [int(pid) for pid in trainer.stdout.readline().split()]
    assert trainer.wait() == -signal.SIGKILL and len(workers) == 2
    deadline = time.monotonic() + 20
    while any(_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [pid for pid in workers if _alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("width", [32, 61, 7])
def test_packed_masks_are_exact(width):
    masks = torch.rand(3, 5, 9, width, generator=torch.Generator().manual_seed(0)) > 0.5
    frames = torch.zeros(1, 3, 3, 9, width, dtype=torch.uint8)
    batch = Batch(frames, masks, torch.zeros(5, dtype=torch.int64), ["clip"])
    packed = batch.pack()
    assert torch.equal(packed.packed_masks, pack_masks(masks)) and same(packed, batch)
    assert (packed.num_frames, packed.num_objects) == (3, 5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_transfer_gives_batches_in_order(dataset, device):
    """Also while the device is busy, and where memory of a batch is free for the next one before it was read."""
    batches = take(8, dataset, 2, pin_memory=device == "cuda")
    transfer, sums = Transfer(torch.device(device)), []
    ballast = torch.randn(1500, 1500, device=device)
    transfer.start(batches[0])
    for following in [*batches[1:], None]:
        batch = transfer.take()
        assert batch.masks.dtype == torch.bool and batch.masks.device.type == device
        if following is not None:
            transfer.start(following)
        if device == "cuda":
            for _ in range(20):
                ballast = ballast @ ballast.t() / 1500
        sums.append(torch.stack([batch.frames.sum(), batch.masks.sum()]))
        del batch
    whole = [batch.to("cpu") for batch in batches]
    assert torch.stack(sums).tolist() == [[batch.frames.sum().item(), batch.masks.sum().item()] for batch in whole]


@pytest.fixture
def damaged(video_folder):
    """Ten videos, of which two cannot be decoded."""
    root = video_folder({name: 3 for name in "abcdefghij"})
    for name in "dh":
        for path in (root / "JPEGImages" / name).iterdir():
            path.write_bytes(path.read_bytes()[:-200])
    return clips(root)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_records_are_replaced_and_counted(damaged, workers):
    bad = BadRecords({"davis": 10}, 0.2)
    loader = build_loader(damaged, 1, workers=workers, bad_records=bad)
    ids = [next(loader).sample_ids[0] for _ in range(20)]
    loader.close()
    videos = [name.split("@")[0].removeprefix("davis/") for name in ids]
    order = [damaged.draw(number, lambda plan: plan.record.name) for number in range(20)]
    assert all(video == expected for video, expected in zip(videos, order, strict=True) if expected not in "dh")
    assert not {"d", "h"} & set(videos) and sum(name in "dh" for name in order) == 4
    again = [batch.sample_ids[0] for batch in take(8, damaged, 1, start=12, bad_records=BadRecords({"davis": 10}, 1))]
    assert again == ids[12:]  # what replaces a record depends on the number of the sample alone
    found = bad.take_new()
    assert len(bad) == 2 and sorted(record.name for record in found) == ["d", "h"] and not bad.take_new()
    assert all(record.dataset == "davis" and "cannot decode" in record.reason for record in found)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_records_are_an_error(damaged, workers):
    bad = BadRecords({"davis": 10}, 0.1)
    with pytest.raises(DataError, match="2 of the 10 .* of dataset 'davis' .*data.max_bad_share=0.1 .*cannot decode"):
        for _ in zip(range(20), build_loader(damaged, 1, workers=workers, bad_records=bad), strict=False):
            pass
    assert len(bad) == 2
