"""The same run through deepspeed, torchrun and plain python."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import DEEPSPEED, FORKED, PYTHON, TORCHRUN, TWO_FORKED, losses, run, train

from sam2fast.config_file import load_config
from sam2fast.models.official import to_official
from sam2fast.recipe import build_model

LAUNCHERS = {
    "python": PYTHON,
    "torchrun": [*TORCHRUN, "--nproc_per_node=1"],
    "deepspeed": DEEPSPEED,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, config: Path, synthetic: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("launch")
    for name, launcher in LAUNCHERS.items():
        train(launcher, config, synthetic, folder / name)
    return {name: folder / name for name in LAUNCHERS}


@pytest.mark.parametrize("name", ["torchrun", "deepspeed"])
def test_loss_curves_are_equal(runs: dict[str, Path], name: str) -> None:
    want, got = losses(runs["python"]), losses(runs[name])
    assert list(got) == list(want) == list(range(1, 11))
    for step, value in want.items():
        assert abs(got[step] - value) <= 1e-5 * abs(value), (step, value, got[step])


@pytest.mark.parametrize("name", list(LAUNCHERS))
def test_a_run_leaves_what_it_promises(runs: dict[str, Path], name: str) -> None:
    folder = runs[name]
    for path in (
        "config.yaml",
        "export/model.pt",
        "export/encoder.pt",
        "export/decoder.pt",
        "export/memory.pt",
        "curves/losses.png",
        "stages/1_images/model.pt",
        "stages/2_video/model.pt",
        "stages/3_joint/model.pt",
    ):
        assert (folder / path).is_file(), path
    assert list(folder.glob("overlays/*/davis_jf/*.png")) and list(folder.glob("overlays/*/davis_jf/*.mp4"))
    assert list(folder.glob("tensorboard/events*"))


def test_stages_train_what_they_say(runs: dict[str, Path]) -> None:
    """The image stage leaves the memory modules alone, the video stage the prompt encoder; the rest moves."""
    start = to_official(build_model(load_config(runs["python"] / "config.yaml")).state_dict())
    states = [
        torch.load(runs["python"] / "stages" / stage / "model.pt", weights_only=True)["model"]
        for stage in ("1_images", "2_video", "3_joint")
    ]

    def moved(before: dict, after: dict, prefix: str) -> bool:
        return any(not torch.equal(before[name], after[name]) for name in before if name.startswith(prefix))

    assert not moved(start, states[0], "memory_attention.") and not moved(start, states[0], "memory_encoder.")
    assert moved(start, states[0], "sam_prompt_encoder.") and moved(start, states[0], "image_encoder.")
    assert moved(states[0], states[1], "memory_attention.") and moved(states[0], states[1], "image_encoder.")
    assert not moved(states[0], states[1], "sam_prompt_encoder.") and moved(states[1], states[2], "sam_prompt_encoder.")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, exact_config: Path, synthetic: Path) -> dict[int, float]:
    """Losses of one rank with batches of a number of clips, the default precision and one micro-step."""
    folder = tmp_path_factory.mktemp("whole")

    def run_with(clips: int) -> dict[int, float]:
        train(FORKED, exact_config, synthetic, folder / str(clips), f"stages.0.data.0.batch_size={clips}")
        return losses(folder / str(clips))

    return {clips: run_with(clips) for clips in (2, 4)}


@pytest.mark.parametrize(
    "launcher, overrides",
    [
        (TWO_FORKED, ["stages.0.data.0.batch_size=2"]),
        (FORKED, ["stages.0.data.0.batch_size=2", "stages.0.accumulate=2"]),
        (TWO_FORKED, ["stages.0.accumulate=2", "engine.zero_stage=2"]),
        pytest.param(TWO_FORKED, ["stages.0.data.0.batch_size=2", "engine.zero_stage=3"], marks=pytest.mark.exhaustive),
    ],
    ids=["two ranks", "two micro-steps", "both, ZeRO-2", "two ranks, ZeRO-3"],
)
def test_splitting_a_batch_changes_nothing(
    tmp_path: Path,
    exact_config: Path,
    synthetic: Path,
    whole: dict[int, dict[int, float]],
    launcher: list[str],
    overrides: list[str],
) -> None:
    """Four clips a step in one batch, over ranks and over micro-steps; clips have different numbers of objects."""
    train(launcher, exact_config, synthetic, tmp_path / "split", *overrides)
    want, got = whole[4], losses(tmp_path / "split")
    assert len(want) == 4
    for step, value in want.items():
        assert abs(got[step] - value) <= 1e-5 * abs(value), (step, value, got[step])


def test_evaluate_gives_the_scores_of_the_last_validation(runs: dict[str, Path], tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (runs["python"] / "log.jsonl").read_text().splitlines()]
    want = [line for line in lines if "val/davis_jf" in line][-1]
    arguments = ["evaluate", "--config", str(runs["python"] / "config.yaml"), f"output_dir={tmp_path}"]
    checkpoint = ["--checkpoint", str(runs["python"] / "export" / "model.pt")]
    done = run([*FORKED, "-m", "sam2fast.cli", *arguments, *checkpoint], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    got = dict(line.split() for line in done.stdout.splitlines() if line.startswith("val/"))
    assert abs(float(got["val/davis_jf"]) - want["val/davis_jf"]) < 1e-2
    assert abs(float(got["val/davis_jf_baseline"]) - want["val/davis_jf_baseline"]) < 1e-2


@pytest.mark.parametrize(
    "precision, launcher",
    [
        pytest.param("bfloat16", FORKED, id="torch-bfloat16"),
        pytest.param("float16", TWO_FORKED, id="deepspeed-2-float16"),
        pytest.param("float16", FORKED, id="torch-float16", marks=pytest.mark.exhaustive),
        pytest.param("bfloat16", TWO_FORKED, id="deepspeed-2-bfloat16", marks=pytest.mark.exhaustive),
    ],
)
def test_low_precision_follows_float32(
    precision: str,
    launcher: list[str],
    tmp_path: Path,
    exact_config: Path,
    synthetic: Path,
    whole: dict[int, dict[int, float]],
) -> None:
    """One rank with the torch engine, and two with DeepSpeed's. parallel/test_engines.py has float16 on one rank and
    bfloat16 on two, with every engine."""
    overrides = [f"precision={precision}", "stages.0.steps=3"]
    if launcher is TWO_FORKED:
        overrides.append("engine.kind=deepspeed")
    done = train(launcher, exact_config, synthetic, tmp_path / precision, *overrides)
    got = losses(tmp_path / precision)
    assert list(got) == [1, 2, 3] and all(math.isfinite(value) for value in got.values())
    assert "not finite" not in done.stdout  # an overflow of the loss scale is no bad step
    if launcher is TWO_FORKED:
        assert abs(got[1] - whole[2][1]) <= 0.05 * got[1]
