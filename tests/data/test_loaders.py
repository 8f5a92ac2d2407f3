"""Batches: sharding, resuming and worker processes."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sam2fast.config import AugmentConfig, DatasetConfig, MixItem
from sam2fast.data.formats import open_dataset
from sam2fast.data.loaders import build_loader
from sam2fast.data.sample import DataError, Sample, collate
from sam2fast.data.sampling import ClipDataset

REPOSITORY = Path(__file__).resolve().parents[2]


def clips(root, frames=2):
    dataset = open_dataset(DatasetConfig(root=str(root)), "davis", seed=0)
    return ClipDataset(dataset, MixItem(dataset="davis", frames=frames), AugmentConfig(), 32, seed=0)


def take(count, *args, **kwargs):
    return list(itertools.islice(build_loader(*args, **kwargs), count))


def same(a, b):
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
    assert all(same(a, b) for a, b in zip(take(3, dataset, 2, rank=1, world_size=2, start=3), whole[3:], strict=True))


def test_a_defect_is_one_error(video_folder):
    root = video_folder({"a": 3})
    for path in (root / "JPEGImages/a").iterdir():
        path.write_bytes(path.read_bytes()[:-200])
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"^cannot decode .*\.jpg: [^\n]*`exclude`$") as error:
            next(build_loader(clips(root), 1, workers=workers))
        assert error.value.__cause__ is None


def test_workers_change_nothing_and_end_with_their_loader(dataset):
    loader = build_loader(dataset, 2, start=1, workers=2)
    assert all(same(a, b) for a, b in zip(itertools.islice(loader, 5), take(5, dataset, 2, start=1), strict=True))
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


def test_workers_end_with_a_killed_trainer(video_folder, tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(f"""
import multiprocessing, os, signal, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from sam2fast.config import AugmentConfig, DatasetConfig, MixItem
from sam2fast.data.formats import open_dataset
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
