"""kill -9 at any step, then the same command: the weights are those of an uninterrupted run, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from conftest import DEEPSPEED, FORKED, TORCHRUN, TWO_FORKED, command, kill_at, losses, run, train

LAST_STEP = 10
EMA = "stages.2.optim.ema=0.8"


def weights(output: Path, name: str = "model.pt") -> dict[str, torch.Tensor]:
    return torch.load(output / "export" / name, weights_only=True)["model"]


@pytest.mark.parametrize(
    "launcher, forked, overrides",
    [
        (FORKED, FORKED, [EMA]),
        ([*DEEPSPEED, "--num_accelerators", "2"], TWO_FORKED, ["engine.kind=deepspeed", EMA]),
        pytest.param([*TORCHRUN, "--nproc_per_node=2"], TWO_FORKED, [], marks=pytest.mark.exhaustive),
    ],
    ids=["python", "deepspeed-2", "torchrun-2"],
)
def test_killed_runs_end_with_the_same_weights(
    launcher: list[str], forked: list[str], overrides: list[str], tmp_path: Path, config: Path, synthetic: Path
) -> None:
    """Killed at a random step and started again, both by the launcher. `ten_kills` does it over and over, without."""
    whole, output = tmp_path / "whole", tmp_path / "killed"
    train(forked, config, synthetic, whole, *overrides)
    launched, unlaunched = (command(by, config, synthetic, output, *overrides) for by in (launcher, forked))
    step = random.SystemRandom().randint(1, LAST_STEP - 1)
    kill_at(launched, output, step)
    done = run(launched, cwd=tmp_path)
    assert done.returncode == 0, (step, done.stderr[-3000:])
    want, got = weights(whole), weights(output)
    different = [name for name in want if not torch.equal(want[name], got[name])]
    assert not different, (step, different[:3])
    assert losses(output) == losses(whole), step
    if EMA in overrides:
        averages = [weights(folder, "model_ema.pt") for folder in (whole, output)]
        assert all(torch.equal(averages[0][name], averages[1][name]) for name in want), step
        assert any(not torch.equal(averages[0][name], want[name]) for name in want)
    again = run(unlaunched, cwd=tmp_path)  # a finished run has nothing left to do
    assert again.returncode == 0 and losses(output) == losses(whole)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "engine",
    [
        "engine.kind=torch",
        "engine.kind=fsdp",
        "engine={kind: fsdp, shard_size: 1}",
        *(f"engine={{kind: deepspeed, zero_stage: {stage}}}" for stage in range(4)),
    ],
)
def test_ten_kills_change_nothing(engine: str, tmp_path: Path, exact_config: Path, synthetic: Path) -> None:
    """Two ranks and dropout; a step that was reached before is killed while the run starts again."""
    whole, output = tmp_path / "whole", tmp_path / "killed"
    settings = [engine, f"stages.0.steps={LAST_STEP}", "checkpoint.every=2", "model.drop_path=0.1"]
    settings += ["model.memory_dropout=0.1"]
    train(TWO_FORKED, exact_config, synthetic, whole, *settings)
    arguments = command(TWO_FORKED, exact_config, synthetic, output, *settings)
    steps = sorted(random.SystemRandom().randint(1, LAST_STEP - 1) for _ in range(10))
    for step in steps:
        kill_at(arguments, output, step)
    done = run(arguments, cwd=tmp_path)
    assert done.returncode == 0, (steps, done.stderr[-3000:])
    want, got = weights(whole), weights(output)
    assert all(torch.equal(want[name], got[name]) for name in want), steps
    assert losses(output) == losses(whole), steps
    print(f"{engine}: equal weights and losses, killed at steps {steps}")


def test_engines_and_numbers_of_ranks_take_turns(tmp_path: Path, exact_config: Path, synthetic: Path) -> None:
    """The same samples in each step, so the same losses as without a change."""
    whole, output = tmp_path / "whole", tmp_path / "changed"
    common = ["checkpoint.every=1", "checkpoint.asynchronous=false"]
    one_rank = "stages.0.data.0.batch_size=2"
    train(FORKED, exact_config, synthetic, whole, *common, one_rank)
    turns = [
        (TWO_FORKED, ["engine.zero_stage=2"]),
        (FORKED, [one_rank]),
        (TWO_FORKED, ["engine.kind=fsdp"]),
    ]
    commands = [command(ranks, exact_config, synthetic, output, *common, *turn) for ranks, turn in turns]
    for number, each in enumerate(commands[:-1]):
        kill_at(each, output, number + 1)
    done = run(commands[-1], cwd=tmp_path)
    assert done.returncode == 0 and "continuing at step" in done.stdout, done.stderr[-3000:]
    assert losses(output) == pytest.approx(losses(whole), rel=1e-5)
