"""Every mistake ends training with exit code 2 and one error that names the file and the remedy."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import pytest
import torch

from sam2fast.cli import train
from sam2fast.models.architecture import architecture
from sam2fast.models.official import save_checkpoint
from sam2fast.models.sam2 import SAM2
from sam2fast.train import main as train_main


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` describes its process group in the environment; the next test must not see it."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)


@pytest.fixture
def data(synthetic: Path, tmp_path: Path) -> Path:
    """A copy of the synthetic data to damage."""
    return Path(shutil.copytree(synthetic, tmp_path / "data"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def first(folder: Path, pattern: str) -> Path:
    return sorted(folder.rglob(pattern))[0]


def edit_rle(path: Path) -> None:
    content = json.loads(path.read_text())
    for masklets in content["masklet"]:
        for rle in masklets:
            rle["counts"] = rle["counts"][: len(rle["counts"]) // 2]
    path.write_text(json.dumps(content))


def shrink_mask(folder: Path) -> None:
    for path in folder.rglob("Annotations/**/*.png"):
        mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        cv2.imwrite(str(path), mask[::2, ::2])


FOLDER = ["data.datasets.videos.format=video_folder", "data.datasets.videos.root=${data.root}/held_out"]

DAMAGE: dict[str, tuple[Callable[[Path], object], list[str], list[str]]] = {
    "missing folder": (lambda data: shutil.rmtree(data / "videos"), [], ["no folder at", "videos"]),
    "empty folder": (lambda data: (shutil.rmtree(data / "videos"), (data / "videos").mkdir()), [], ["videos"]),
    "unreadable mp4": (lambda data: [cut(path) for path in (data / "videos").rglob("*.mp4")], [], [".mp4"]),
    "empty json": (lambda data: [path.write_text("") for path in (data / "videos").rglob("*.json")], [], [".json"]),
    "broken json": (lambda data: [cut(path) for path in (data / "videos").rglob("*.json")], [], [".json"]),
    "broken RLE": (lambda data: [edit_rle(path) for path in (data / "videos").rglob("*.json")], [], [".json"]),
    "clip shorter than the window": (lambda data: None, ["stages.0.data.0.frames=40"], ["40", "frames"]),
    "unreadable jpeg": (lambda data: [cut(path) for path in (data / "held_out").rglob("*.jpg")], FOLDER, [".jpg"]),
    "masks of another size": (lambda data: shrink_mask(data / "held_out"), FOLDER, [".png"]),
    "masks without frames": (lambda data: first(data / "held_out", "*.jpg").unlink(), FOLDER, [".png"]),
}


@pytest.mark.parametrize("case", list(DAMAGE))
@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_data(
    case: str, workers: int, data: Path, exact_config: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    damage, overrides, named = DAMAGE[case]
    damage(data)
    check(
        exact_config,
        [f"data.root={data}", f"output_dir={tmp_path}/run", f"data.workers={workers}", *overrides],
        named,
        capfd,
    )


@pytest.mark.parametrize(
    "override, named",
    [
        ("model.sise=tiny", ["model.sise", "did you mean 'size'"]),
        ("stages.0.data.0.frames=0", ["stages.0.data.0.frames", "0"]),
        ("stages.0.optim.lr=-1", ["stages.0.optim.lr", "-1"]),
        ("stages.0.freeze=[memori]", ["memori", "memory"]),
        ("device=cuda", ["device", "device=cpu"]),
        ("stages.0.optim.missing_grad=skip engine.kind=deepspeed", ["missing_grad", "zero"]),
        ("engine.deepspeed_config=nowhere.json", ["nowhere.json"]),
        ("engine.kind=fsdp engine.zero_stage=2", ["engine.kind is fsdp", "engine.kind=deepspeed"]),
        ("engine.kind=fsdp engine.shard_size=2", ["engine.shard_size is 2", "1 ranks", "[1]"]),
        ("engine.shard_size=2", ["engine.kind is auto", "engine.kind=fsdp"]),
        ("engine.offload_optimizer=true engine.zero_stage=0", ["stage 0", "engine.zero_stage=1"]),
        ("engine.zero_stage=3 stages.0.optim.ema=0.9", ["optim.ema", "engine.zero_stage=2"]),
        ("engine.zero_stage=3 model.compile=true", ["model.compile", "engine.zero_stage=2"]),
    ],
)
def test_impossible_settings(
    override: str, named: list[str], exact_config: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Said before the data, which is not there, is looked for, and before anything is written."""
    if override == "device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    output = tmp_path / "run"
    check(exact_config, [f"data.root={tmp_path}/none", f"output_dir={output}", *override.split()], named, capfd)
    assert not output.exists()


def test_an_engine_beside_the_option_of_another(exact_config: Path, capfd: pytest.CaptureFixture) -> None:
    assert train_main(["--config", str(exact_config), "--deepspeed", "engine.kind=torch"]) == 2
    assert capfd.readouterr().err == (
        "error: --deepspeed and --deepspeed_config choose DeepSpeed, engine.kind=torch does not; remove one\n"
    )


class Payload:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_wrong_checkpoints(synthetic: Path, exact_config: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    trap, other, empty = tmp_path / "executed", tmp_path / "tiny.pt", tmp_path / "empty.pt"
    save_checkpoint(SAM2(architecture("tiny")), other)
    empty.write_bytes(b"")
    malicious = tmp_path / "malicious.pt"
    torch.save({"model": {"weight": Payload(trap)}}, malicious)
    raw = tmp_path / "raw.pkl"
    raw.write_bytes(pickle.dumps(Payload(trap)))
    base = [f"data.root={synthetic}", f"output_dir={tmp_path}/run"]
    for path, named in (
        (other, ["tiny.pt", "tiny"]),
        (empty, ["empty.pt"]),
        (malicious, ["malicious.pt"]),
        (raw, ["raw.pkl"]),
        (tmp_path / "none.pt", ["none.pt"]),
    ):
        check(exact_config, [*base, f"model.checkpoint={path}"], named, capfd)
    assert not trap.exists()


def test_output_that_cannot_be_written(
    synthetic: Path, exact_config: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    check(
        exact_config, [f"data.root={synthetic}", f"output_dir={tmp_path}/file/run"], ["output_dir", "file/run"], capfd
    )


def check(config: Path, overrides: list[str], named: list[str], capfd: pytest.CaptureFixture) -> None:
    capfd.readouterr()
    code = train(str(config), overrides)
    err = capfd.readouterr().err
    errors = [line for line in err.splitlines() if "error: " in line]
    assert code == 2, err
    assert len(errors) == 1 and "Traceback" not in err, err
    for text in named:
        assert text in errors[0], errors[0]
