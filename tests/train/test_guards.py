"""What ends a stage or a run before its last step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import FORKED, command, losses, run, train


def test_a_run_that_diverges_stops_with_the_step_the_terms_and_the_samples(
    tmp_path: Path, exact_config: Path, synthetic: Path
) -> None:
    arguments = ["stages.0.optim.lr=1e30", "stages.0.optim.clip=null", "stages.0.steps=40", "max_bad_steps=3"]
    done = run(command(FORKED, exact_config, synthetic, tmp_path / "run", *arguments), cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    for text in ("3 steps in a row", "not finite", "stages.0.optim.lr", "videos/"):
        assert text in done.stderr, done.stderr
    assert done.stdout.count("update skipped") == 3  # each was reported when it happened


@pytest.mark.parametrize("patience, expected", [(1, 2), (0, 5)])
def test_a_stage_ends_when_the_score_stands_still(
    tmp_path: Path, exact_config: Path, synthetic: Path, patience: int, expected: int
) -> None:
    """A learning rate of almost nothing cannot raise J&F: the second validation ends the stage, unless patience is
    off."""
    path = tmp_path / "config.yaml"
    sets = "validation: {every: 1, overlays: 0, sets: [{dataset: held_out, tag: jf, max_frames: 3, max_items: 1}]}\n"
    text = exact_config.read_text().replace(
        "datasets: {videos:", 'datasets: {held_out: {format: video_folder, root: "${data.root}/held_out"}, videos:'
    )
    path.write_text(text + sets)
    output = tmp_path / "run"
    done = train(
        FORKED,
        path,
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
