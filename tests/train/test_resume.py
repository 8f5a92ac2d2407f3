"""kill -9 at any step, then the same command: the weights are those of an uninterrupted run, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from conftest import DEEPSPEED, PYTHON, TORCHRUN, command, kill_at, losses, run, train

from sam2fast.models.official import from_official

LAST_STEP = 10


def weights(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "export" / "model.pt", weights_only=True)["model"]


@pytest.fixture(
    scope="module",
    params=[PYTHON, [*DEEPSPEED, "--num_accelerators", "2"], [*TORCHRUN, "--nproc_per_node=2"]],
    ids=["python", "deepspeed-2", "torchrun-2"],
)
def uninterrupted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, config: Path, synthetic: Path
):
    output = tmp_path_factory.mktemp("resume") / "whole"
    train(request.param, config, synthetic, output)
    return request.param, output


def test_killed_runs_end_with_the_same_weights(uninterrupted, tmp_path: Path, config: Path, synthetic: Path) -> None:
    launcher, whole = uninterrupted
    output = tmp_path / "killed"
    arguments = command(launcher, config, synthetic, output)
    first = random.SystemRandom().randint(1, LAST_STEP - 2)
    second = random.SystemRandom().randint(first, LAST_STEP - 1)
    for step in (first, second):
        kill_at(arguments, output, step)
    done = run(arguments, cwd=tmp_path)
    assert done.returncode == 0, (first, second, done.stderr[-3000:])
    want, got = weights(whole), weights(output)
    different = [name for name in want if not torch.equal(want[name], got[name])]
    assert not different, (first, second, different[:3])
    assert losses(output) == losses(whole), (first, second)
    again = run(arguments, cwd=tmp_path)  # a finished run has nothing left to do
    assert again.returncode == 0 and losses(output) == losses(whole)


def test_a_half_written_checkpoint_is_not_used(tmp_path: Path, exact_config: Path, synthetic: Path) -> None:
    output = tmp_path / "run"
    arguments = command(PYTHON, exact_config, synthetic, output, "checkpoint.every=2")
    kill_at(arguments, output, 3)  # the checkpoint of step 2 is whole by then
    checkpoints = output / "checkpoints"
    partial = checkpoints / ".step_00000004.partial"
    partial.mkdir(parents=True, exist_ok=True)
    (partial / "torch.pt").write_bytes(b"half")
    (partial / "state.json").write_text('{"state": {"step": 3, "global_step": 4}, "layout": {}}')
    done = run(arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(losses(output)) == [1, 2, 3, 4] and "continuing at step 2" in done.stdout


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.image_size=96", "model.image_size from 64 to 96"),
        ("checkpoint.resume=false", "checkpoint.resume is false"),
        ("engine.kind=deepspeed", "engine torch (now deepspeed)"),
        ("precision=float16", "precision float32 (now float16)"),
        ("stages.0.freeze=[encoder]", "trained parameters per group"),
    ],
)
def test_a_run_that_cannot_continue_says_why(
    tmp_path: Path, exact_config: Path, synthetic: Path, override: str, message: str
) -> None:
    output = tmp_path / "run"
    kill_at(command(PYTHON, exact_config, synthetic, output, "checkpoint.every=1"), output, 2)
    done = run(command(PYTHON, exact_config, synthetic, output, "checkpoint.every=1", override), cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_damaged_checkpoint_is_named(tmp_path: Path, exact_config: Path, synthetic: Path) -> None:
    output = tmp_path / "run"
    arguments = command(PYTHON, exact_config, synthetic, output, "checkpoint.every=1")
    kill_at(arguments, output, 2)
    newest = sorted((output / "checkpoints").glob("step_*"))[-1]
    (newest / "torch.pt").write_bytes((newest / "torch.pt").read_bytes()[:1000])
    done = run(arguments, cwd=tmp_path)
    assert done.returncode == 2 and newest.name in done.stderr and "delete this folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_changed_learning_rate_is_used(tmp_path: Path, exact_config: Path, synthetic: Path) -> None:
    """The optimizer's state keeps the rate it was saved with; what the command says now must win."""
    output = tmp_path / "run"
    kill_at(command(PYTHON, exact_config, synthetic, output, "checkpoint.every=1"), output, 2)
    resumed = sorted((output / "checkpoints").glob("step_*"))[-1]
    before = torch.load(resumed / "torch.pt", weights_only=True)["module"]
    done = run(command(PYTHON, exact_config, synthetic, output, "stages.0.optim.lr=1e-12"), cwd=tmp_path)
    assert done.returncode == 0 and "changed settings" in done.stdout, done.stderr[-2000:]
    after = from_official(weights(output))
    assert max((after[name] - before[name]).abs().max().item() for name in before) < 1e-9
