"""A tiny run on synthetic data, started with the commands that users type."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import Launch, environment, kill

from sam2fast.data.synthetic import write_dataset
from sam2fast.parallel.mesh import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = str(REPOSITORY / "sam2fast" / "train.py")
PYTHON = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
DEEPSPEED = [sys.executable, str(Path(sys.executable).with_name("deepspeed"))]
FORKED = ["forked", "1"]
"""One rank in a process that starts at once; the second entry is the number of ranks. See `forked`."""
TWO_FORKED = ["forked", "2"]

CONFIG = """
name: tiny
output_dir: ???
device: cpu
log_every: 1
model: {size: micro, image_size: 64, drop_path: 0.1, memory_dropout: 0.1}
data:
  root: ???
  workers: 0
  datasets:
    images: {format: sa1b, root: "${data.root}/images"}
    videos: {format: sav, root: "${data.root}/videos"}
    held_out: {format: video_folder, root: "${data.root}/held_out"}
stages:
  - name: images
    steps: 3
    data: [{dataset: images, batch_size: 2, max_objects: 2}]
    freeze: [memory]
    prompts: &prompts {correction_clicks: 1}
    optim: &optim {lr: 1.0e-3, warmup: 1}
  - name: video
    steps: 3
    data: [{dataset: videos, frames: 3, batch_size: 1, max_objects: 2}]
    freeze: [prompt_encoder]
    prompts: *prompts
    loss: {temporal: 0.5}
    optim: *optim
  - name: joint
    steps: 4
    accumulate: 2
    mixture: alternate
    data:
      - {dataset: images, batch_size: 2, max_objects: 2, balance: true}
      - {dataset: videos, frames: 3, max_objects: 2, balance: true, occlusion: {probability: 0.5, max_frames: 1}}
    prompts: *prompts
    optim: *optim
validation:
  every: 0
  sets: [{dataset: held_out, tag: davis_jf, kind: vos, max_items: 1, max_frames: 4}]
  overlays: 1
checkpoint: {every: 2}
"""

EXACT = """
# Mask prompts without dropout: nothing is random that depends on the rank or on how a batch is split.
name: exact
output_dir: ???
device: cpu
log_every: 1
model: {size: micro, image_size: 64, drop_path: 0.0, memory_dropout: 0.0}
data:
  root: ???
  workers: 0
  datasets: {videos: {format: sav, root: "${data.root}/videos"}}
stages:
  - name: video
    steps: 4
    data: [{dataset: videos, frames: 3, batch_size: 1, max_objects: 2, balance: true}]
    prompts: {video: {mask: 1, click: 0, box: 0}, init_frames: 1, corrected_frames: 0}
    loss: {temporal: 0.5}
    optim: {lr: 1.0e-3}
checkpoint: {every: 100}
"""


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("synthetic")
    for name, layout, count in (("images", "sa1b", 8), ("videos", "sav", 3), ("held_out", "video_folder", 1)):
        write_dataset(root / name, layout, count, seed=1, frames=6, size=(96, 128))
    return root


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="session")
def exact_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "exact.yaml"
    path.write_text(EXACT)
    return path


def command(launcher: list[str], config: Path, synthetic: Path, output: Path, *overrides: str) -> list[str]:
    if launcher[:2] == DEEPSPEED:
        launcher = [*launcher, "--master_port", str(free_port())]  # its default port may be taken
    return [*launcher, TRAIN, "--config", str(config), f"data.root={synthetic}", f"output_dir={output}", *overrides]


def run(arguments: list[str], cwd: Path, timeout: float = 300, **variables: str) -> subprocess.CompletedProcess:
    env = {**environment(), **variables}
    if arguments[0] == FORKED[0]:
        return Launch(arguments[2:], int(arguments[1]), cwd, env).wait(timeout)
    return subprocess.run(arguments, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


def train(
    launcher: list[str], config: Path, synthetic: Path, output: Path, *overrides: str
) -> subprocess.CompletedProcess:
    """Train and insist on success."""
    done = run(command(launcher, config, synthetic, output, *overrides), cwd=output.parent)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def losses(output: Path) -> dict[int, float]:
    """Training loss by step, from the log."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def kill_at(arguments: list[str], output: Path, step: int, **variables: str) -> None:
    """Start training and kill every process of it when `step` is in the log."""
    env = {**environment(), **variables}
    if arguments[0] == FORKED[0]:
        process = Launch(arguments[2:], int(arguments[1]), output.parent, env)
    else:
        process = subprocess.Popen(
            arguments, cwd=output.parent, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    deadline = time.monotonic() + 200
    while not ((output / "log.jsonl").is_file() and max(losses(output), default=0) >= step):
        assert process.poll() is None and time.monotonic() < deadline, "training ended before it could be killed"
        time.sleep(0.02)
    kill(process.pids if isinstance(process, Launch) else [process.pid])
    process.wait()
