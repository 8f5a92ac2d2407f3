"""kill -9 at any step, then the same command: the weights are those of an uninterrupted run, bit for bit."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import DEEPSPEED, FORKED, TORCHRUN, TWO_FORKED, command, kill_at, losses, run, train
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from sam2fast.models.official import from_official

LAST_STEP = 10
EMA = "stages.2.optim.ema=0.8"
FILE = "__0_0.distcp"
"""What the first rank writes of a checkpoint."""


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
    """Runs of one launcher and of ranks without it take turns; both give the same."""
    whole, output = tmp_path / "whole", tmp_path / "killed"
    train(forked, config, synthetic, whole, *overrides)
    launched, unlaunched = (command(by, config, synthetic, output, *overrides) for by in (launcher, forked))
    first = random.SystemRandom().randint(1, LAST_STEP - 2)
    second = random.SystemRandom().randint(first, LAST_STEP - 1)
    kill_at(launched, output, first)
    kill_at(unlaunched, output, second)
    done = run(launched, cwd=tmp_path)
    assert done.returncode == 0, (first, second, done.stderr[-3000:])
    want, got = weights(whole), weights(output)
    different = [name for name in want if not torch.equal(want[name], got[name])]
    assert not different, (first, second, different[:3])
    assert losses(output) == losses(whole), (first, second)
    if EMA in overrides:
        averages = [weights(folder, "model_ema.pt") for folder in (whole, output)]
        assert all(torch.equal(averages[0][name], averages[1][name]) for name in want), (first, second)
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
    common = ["stages.0.steps=6", "checkpoint.every=1", "checkpoint.asynchronous=false"]
    one_rank = "stages.0.data.0.batch_size=2"
    train(FORKED, exact_config, synthetic, whole, *common, one_rank)
    turns = [
        (TWO_FORKED, ["engine.zero_stage=2"]),
        (FORKED, [one_rank]),
        (TWO_FORKED, ["engine.kind=fsdp"]),
        (TWO_FORKED, ["engine.zero_stage=3"]),
    ]
    commands = [command(ranks, exact_config, synthetic, output, *common, *turn) for ranks, turn in turns]
    for number, each in enumerate(commands[:-1]):
        kill_at(each, output, number + 2)
    done = run(commands[-1], cwd=tmp_path)
    assert done.returncode == 0 and "continuing at step" in done.stdout, done.stderr[-3000:]
    assert losses(output) == pytest.approx(losses(whole), rel=1e-5)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, exact_config: Path, synthetic: Path) -> Path:
    """A run that was killed at step 3, with a checkpoint of each step, the last two of them."""
    output = tmp_path_factory.mktemp("killed") / "run"
    every = ["checkpoint.every=1", "checkpoint.asynchronous=false"]
    kill_at(command(FORKED, exact_config, synthetic, Path(output.name), *every), output, 3)
    return output


@pytest.fixture
def interrupted(killed: Path, tmp_path: Path) -> Path:
    """A copy of that run, in a folder of the same name."""
    return Path(shutil.copytree(killed, tmp_path / killed.name))


def test_a_half_written_checkpoint_is_not_used(tmp_path: Path, exact_config: Path, synthetic: Path) -> None:
    output = tmp_path / "run"
    overrides = ["checkpoint.every=2", "checkpoint.asynchronous=false"]
    arguments = command(FORKED, exact_config, synthetic, output, *overrides)
    kill_at(arguments, output, 3)  # the checkpoint of step 2 is whole by then
    checkpoints = output / "checkpoints"
    partial = checkpoints / ".step_00000004.partial"
    partial.mkdir(parents=True, exist_ok=True)
    (partial / FILE).write_bytes(b"half")
    (partial / "state.json").write_text('{"state": {"step": 3, "global_step": 4}}')
    done = run(arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(losses(output)) == [1, 2, 3, 4] and "continuing at step 2" in done.stdout


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.image_size=96", "model.image_size from 64 to 96"),
        ("checkpoint.resume=false", "checkpoint.resume is false"),
        ("stages.0.freeze=[encoder]", "trained parameters that are frozen now"),
    ],
)
def test_a_run_that_cannot_continue_says_why(
    interrupted: Path, exact_config: Path, synthetic: Path, override: str, message: str
) -> None:
    arguments = command(FORKED, exact_config, synthetic, Path(interrupted.name), "checkpoint.every=1", override)
    done = run(arguments, cwd=interrupted.parent)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "size": (FILE, cut, f"{FILE} has 300 bytes and not"),
    "checksum": (FILE, flip, f"{FILE} has another checksum than when it was written"),
    "missing": (FILE, Path.unlink, f"{FILE} is missing"),
    "state": ("state.json", cut, "state.json cannot be read"),
    "no-state": ("state.json", Path.unlink, "state.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    interrupted: Path, exact_config: Path, synthetic: Path, damage: str
) -> None:
    name, change, reason = DAMAGES[damage]
    *_, before, newest = sorted((interrupted / "checkpoints").glob("step_*"))
    change(newest / name)
    ranks = TWO_FORKED if damage == "size" else FORKED
    arguments = command(ranks, exact_config, synthetic, Path(interrupted.name), "checkpoint.every=1")
    done = run(arguments, cwd=interrupted.parent)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    (warning,) = [line for line in done.stdout.splitlines() if "damaged" in line]
    assert warning.startswith("warning: ") and newest.name in warning and reason in warning
    assert f"continuing from {Path('run') / 'checkpoints' / before.name}" in warning
    assert f"continuing at step {int(before.name[-8:])} " in done.stdout
    assert list(losses(interrupted)) == [1, 2, 3, 4]


def test_without_a_whole_checkpoint_there_is_one_error(interrupted: Path, exact_config: Path, synthetic: Path) -> None:
    found = sorted((interrupted / "checkpoints").glob("step_*"))
    for path in found:
        cut(path / FILE)
    done = run(command(TWO_FORKED, exact_config, synthetic, Path(interrupted.name)), cwd=interrupted.parent)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("error: ") == 1, done.stderr
    assert "no checkpoint can be used" in done.stderr and all(path.name in done.stderr for path in found)


def test_a_changed_learning_rate_is_used(interrupted: Path, exact_config: Path, synthetic: Path) -> None:
    """The optimizer's state keeps the rate it was saved with; what the command says now must win."""
    resumed = sorted((interrupted / "checkpoints").glob("step_*"))[-1]
    dcp_to_torch_save(resumed, interrupted / "tensors.pt")
    before = torch.load(interrupted / "tensors.pt", weights_only=True)
    arguments = command(FORKED, exact_config, synthetic, Path(interrupted.name), "stages.0.optim.lr=1e-12")
    done = run(arguments, cwd=interrupted.parent)
    assert done.returncode == 0 and "changed settings" in done.stdout, done.stderr[-2000:]
    assert "stages.0.optim.lr" in done.stdout
    after = from_official(weights(interrupted))
    assert max((after[name] - before[f"weights/{name}"]).abs().max().item() for name in after) < 1e-9
