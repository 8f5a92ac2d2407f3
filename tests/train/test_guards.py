"""What ends a stage or a run before its last step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import FORKED, command, kill_at, losses, run, train


def test_a_run_that_diverges_stops_with_the_step_the_terms_and_the_samples(
    tmp_path: Path, exact_config: Path, synthetic: Path
) -> None:
    arguments = ["stages.0.optim.lr=1e30", "stages.0.optim.clip=null", "stages.0.steps=40", "max_bad_steps=3"]
    done = run(command(FORKED, exact_config, synthetic, tmp_path / "run", *arguments), cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    for text in ("3 steps in a row", "not finite", "stages.0.optim.lr", "videos/"):
        assert text in done.stderr, done.stderr
    assert done.stdout.count("update skipped") == 3  # each was reported when it happened


@pytest.fixture
def validated(tmp_path: Path, exact_config: Path) -> Path:
    """The exact configuration, validated after every step."""
    path = tmp_path / "config.yaml"
    sets = "validation: {every: 1, overlays: 0, sets: [{dataset: held_out, tag: jf, max_frames: 3, max_items: 1}]}\n"
    text = exact_config.read_text().replace(
        "datasets: {videos:", 'datasets: {held_out: {format: video_folder, root: "${data.root}/held_out"}, videos:'
    )
    path.write_text(text + sets)
    return path


@pytest.mark.parametrize("patience, expected", [(1, 2), (0, 5)])
def test_a_stage_ends_when_the_score_stands_still(
    tmp_path: Path, validated: Path, synthetic: Path, patience: int, expected: int
) -> None:
    """A learning rate of almost nothing cannot raise J&F: the second validation ends the stage, unless patience is
    off."""
    output = tmp_path / "run"
    done = train(
        FORKED,
        validated,
        synthetic,
        output,
        "stages.0.optim.lr=1e-12",
        "stages.0.steps=5",
        f"validation.patience={patience}",
    )
    assert list(losses(output)) == list(range(1, expected + 1))
    assert ("ends early" in done.stdout) == (patience == 1)
    state = json.loads((output / "stages" / "1_video" / "state.json").read_text())["state"]
    assert state["stage"] == 1 and state["global_step"] == expected
    assert (output / "export" / "model.pt").is_file()


def test_the_best_checkpoint_is_kept(tmp_path: Path, validated: Path, synthetic: Path) -> None:
    """By what the log says of each validation: before and after a resume that finds the best so far in its state."""
    output = tmp_path / "run"
    settings = ["checkpoint.best=jf", "checkpoint.every=1", "checkpoint.keep=1", "validation.patience=0"]
    arguments = command(FORKED, validated, synthetic, output, *settings, "stages.0.steps=8")
    kill_at(arguments, output, 4)
    assert run(arguments, cwd=tmp_path).returncode == 0
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["val/jf"] for line in lines if "val/jf" in line}
    assert list(scores) == list(range(1, 9))
    best = max(scores, key=scores.get)  # the first of equal ones
    kept = sorted(int(folder.name[-8:]) for folder in (output / "checkpoints").iterdir())
    assert kept == sorted({best, 7}) if best != 7 else kept == [6, 7], scores
    newest = output / "checkpoints" / f"step_{max(kept):08d}" / "state.json"
    state = json.loads(newest.read_text())["state"]
    assert state["best"] == {"tag": "jf", "value": scores[best], "step": best}


def test_a_best_score_that_no_set_gives(tmp_path: Path, config: Path, synthetic: Path) -> None:
    done = run(command(FORKED, config, synthetic, tmp_path / "run", "checkpoint.best=davis"), cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "checkpoint.best is 'davis'" in done.stderr and "did you mean 'davis_jf'" in done.stderr
