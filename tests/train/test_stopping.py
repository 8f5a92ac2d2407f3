"""SIGTERM and SIGUSR1: the run ends after a step with a checkpoint and exit code 75, and goes on as if nothing was."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from conftest import FORKED, TWO_FORKED, command, losses, run, train
from forked import Launch, environment

from sam2fast.models.official import from_official

STOPPED = 75


def weights(output: Path) -> dict[str, torch.Tensor]:
    return from_official(torch.load(output / "export" / "model.pt", weights_only=True)["model"])


def stop_at(
    arguments: list[str], output: Path, ready: Callable[[], bool], number: int, targets: Callable[[list[int]], list]
) -> subprocess.CompletedProcess:
    """Start training and, when it is `ready`, send a signal to those of its processes that `targets` takes."""
    launch = Launch(arguments[2:], int(arguments[1]), output.parent, environment())
    deadline = time.monotonic() + 200
    while not ready():
        assert launch.poll() is None and time.monotonic() < deadline, launch.wait()
        time.sleep(0.01)
    for pid in targets(launch.pids):
        os.kill(pid, number)
    return launch.wait()


def everything(pids: list[int]) -> list[int]:
    """Ranks, and all that they started: what a cluster sends its signals to. Helpers first, as the worst order."""
    helpers = [child.pid for pid in pids for child in psutil.Process(pid).children(recursive=True)]
    return [*helpers, *pids]


@pytest.mark.parametrize(
    "ranks, number, targets, overrides",
    [
        pytest.param(FORKED, signal.SIGUSR1, everything, ["data.workers=2"], marks=pytest.mark.exhaustive),
        (TWO_FORKED, signal.SIGUSR1, lambda pids: pids[1:], []),
        (TWO_FORKED, signal.SIGTERM, everything, ["data.workers=1", "engine.zero_stage=1"]),
    ],
    ids=["usr1-workers", "usr1-one-rank", "term-zero"],
)
def test_a_signal_saves_and_the_same_command_continues(
    ranks: list[str],
    number: int,
    targets: Callable[[list[int]], list],
    overrides: list[str],
    tmp_path: Path,
    exact_config: Path,
    synthetic: Path,
) -> None:
    """Only the signal saves anything."""
    whole, output = tmp_path / "whole", tmp_path / "stopped"
    overrides = [*overrides, "stages.0.steps=6", "model.drop_path=0.1", "model.memory_dropout=0.1"]
    train(ranks, exact_config, synthetic, whole, *overrides)
    arguments = command(ranks, exact_config, synthetic, output, *overrides)
    log = output / "log.jsonl"
    done = stop_at(arguments, output, lambda: log.is_file() and bool(losses(output)), number, targets)
    assert done.returncode == STOPPED, done.stderr[-3000:]
    said = [line for line in done.stdout.splitlines() if signal.Signals(number).name in line]
    assert len(said) == 1 and "the same command continues" in said[0] and "exit code 75" in said[0]
    assert "Traceback" not in done.stderr and "worker" not in done.stderr and "resource_tracker" not in done.stderr
    step = max(losses(output))
    assert step < 6 and f"after step {step}" in said[0]
    done = run(arguments, cwd=tmp_path)
    assert done.returncode == 0 and f"continuing at step {step}" in done.stdout, done.stderr[-3000:]
    want, got = weights(whole), weights(output)
    assert not [name for name in want if not torch.equal(want[name], got[name])]
    assert losses(output) == losses(whole)


def test_a_signal_before_the_first_step_saves_nothing(tmp_path: Path, exact_config: Path, synthetic: Path) -> None:
    output = tmp_path / "run"
    arguments = command(TWO_FORKED, exact_config, synthetic, output)
    ready = (output / "tensorboard").is_dir  # made before the model is
    done = stop_at(arguments, output, ready, signal.SIGTERM, lambda pids: pids[:1])
    assert done.returncode == STOPPED and done.stdout.count("SIGTERM: stopped") == 1, done.stderr[-3000:]
    assert run(arguments, cwd=tmp_path).returncode == 0
    assert list(losses(output)) == [1, 2, 3, 4]


def test_a_validation_that_a_signal_left_out_is_made_up_for(
    tmp_path: Path, exact_config: Path, synthetic: Path
) -> None:
    path = tmp_path / "config.yaml"
    sets = "validation: {every: 1, overlays: 0, sets: [{dataset: held_out, tag: jf, max_frames: 3, max_items: 1}]}\n"
    text = exact_config.read_text().replace(
        "datasets: {videos:", 'datasets: {held_out: {format: video_folder, root: "${data.root}/held_out"}, videos:'
    )
    path.write_text(text + sets)
    output, whole = tmp_path / "run", tmp_path / "whole"
    train(FORKED, path, synthetic, whole, "validation.patience=0")
    arguments = command(FORKED, path, synthetic, output, "validation.patience=0")
    done = stop_at(arguments, output, (output / "log.jsonl").is_file, signal.SIGTERM, lambda pids: pids)
    assert done.returncode == STOPPED, done.stderr[-3000:]
    assert run(arguments, cwd=tmp_path).returncode == 0
    lines = [(output / "log.jsonl").read_text(), (whole / "log.jsonl").read_text()]
    assert lines[0].count('"val/jf"') == lines[1].count('"val/jf"') == 4
