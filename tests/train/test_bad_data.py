"""Damaged images and videos are replaced, counted and listed, and stop a run when they are too many."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import TWO_FORKED, command, losses, run

from sam2fast.cli import train
from sam2fast.config import AugmentConfig, DatasetConfig, MixItem
from sam2fast.data.formats import open_dataset
from sam2fast.data.sampling import ClipDataset
from sam2fast.telemetry.bad_data import read_bad_data

SETTINGS = [
    "stages.0.data=[{dataset: images, max_objects: 2}]",
    "stages.0.steps=8",
    "data.datasets.images.format=sa1b",
    "data.datasets.images.root=${data.root}/images",
]


@pytest.fixture
def damaged(synthetic: Path, tmp_path: Path) -> list[str]:
    """Two of the eight images are cut off; their names."""
    shutil.copytree(synthetic / "images", tmp_path / "data" / "images")
    (tmp_path / "data" / "videos").mkdir()
    images = sorted((tmp_path / "data" / "images").rglob("*.jpg"))
    for path in images[2:4]:
        path.write_bytes(path.read_bytes()[:-200])
    return [path.stem for path in images[2:4]]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` describes its process group in the environment; the next test must not see it."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)


def test_all_ranks_and_workers_count(tmp_path: Path, exact_config: Path, damaged: list[str]) -> None:
    output = tmp_path / "run"
    settings = [*SETTINGS, "data.workers=1", "data.max_bad_share=0.25", "data.datasets.videos.root=${data.root}/images",
                "data.datasets.videos.format=sa1b"]  # fmt: skip
    arguments = command(TWO_FORKED, exact_config, tmp_path / "data", output, *settings)
    done = run(arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(losses(output)) == list(range(1, 9))
    listed = [json.loads(line) for line in (output / "bad_data.jsonl").read_text().splitlines()]
    assert sorted(entry["name"] for entry in listed) == damaged
    assert all(entry["dataset"] == "images" and "cannot decode" in entry["reason"] for entry in listed)
    last = json.loads((output / "log.jsonl").read_text().splitlines()[-1])
    assert last["data/bad_records"] == 2
    assert done.stdout.count("warning: ") == 1 and "is replaced by another" in done.stdout
    assert "could not be used: 2 of images" in done.stdout and all(name in done.stdout for name in damaged)


def test_too_many_stop_the_run(
    tmp_path: Path, exact_config: Path, damaged: list[str], capfd: pytest.CaptureFixture
) -> None:
    output = tmp_path / "run"
    settings = [*SETTINGS, "data.workers=0", "data.max_bad_share=0.2", "log_every=100",
                "data.datasets.videos.root=${data.root}/images", "data.datasets.videos.format=sa1b"]  # fmt: skip
    code = train(str(exact_config), [f"data.root={tmp_path}/data", f"output_dir={output}", *settings])
    err = capfd.readouterr().err
    assert code == 2 and "Traceback" not in err
    assert "2 of the 8 videos or images of dataset 'images'" in err and "cannot decode" in err
    listed = [json.loads(line)["name"] for line in (output / "bad_data.jsonl").read_text().splitlines()]
    assert sorted(listed) == damaged


def test_what_another_rank_met_is_listed_when_the_run_ends(tmp_path: Path, exact_config: Path, synthetic: Path) -> None:
    """The second rank, which takes the odd samples, meets two unusable images; one is allowed."""
    shutil.copytree(synthetic / "images", tmp_path / "data" / "images")
    dataset = open_dataset(DatasetConfig(root=str(tmp_path / "data" / "images")), "images", 0)
    item = MixItem(dataset="images", max_objects=2)
    clips = ClipDataset(dataset, item, AugmentConfig(), 64, [0, 0, 0])
    names = [clips[number].sample_id.split("/")[1].split("@")[0] for number in (1, 3)]
    for name in names:
        (path,) = (tmp_path / "data").rglob(f"{name}.jpg")
        path.write_bytes(path.read_bytes()[:-200])
    output = tmp_path / "run"
    settings = [*SETTINGS, "data.max_bad_share=0.125", "log_every=100", "data.datasets.videos.format=sa1b",
                "data.datasets.videos.root=${data.root}/images"]  # fmt: skip
    arguments = command(TWO_FORKED, exact_config, tmp_path / "data", output, *settings)
    done = run(arguments, cwd=tmp_path)
    assert done.returncode != 0 and "error: 2 of the 8 videos or images" in done.stderr, done.stderr[-3000:]
    assert {entry.name for entry in read_bad_data(output)} == set(names)
