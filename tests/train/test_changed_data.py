"""A stage whose `data:` is changed while the run stands still: every entry goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sam2fast import recipe
from sam2fast.checkpoint_header import load_state, save_state
from sam2fast.cli import train
from sam2fast.config import StageConfig, UserError
from sam2fast.run_state import ResumeError, RunState

IMAGES, VIDEOS = "{dataset: images, max_objects: 2}", "{dataset: videos, frames: 3, max_objects: 2}"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` describes its process group in the environment; the next test must not see it."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)


def stage(*entries: tuple[str, int]) -> StageConfig:
    data = [{"dataset": dataset, "frames": frames} for dataset, frames in entries]
    return StageConfig(name="s", steps=1, data=data, prompts={"init_frames": 1})


def test_entries_keep_what_they_had() -> None:
    state = RunState()
    first = state.match_entries(stage(("a", 1), ("b", 8), ("b", 16)), world_size=4)
    for taken, entry in enumerate(first, start=10):
        entry.taken = taken
    assert [(entry.stream, entry.group) for entry in first] == [(0, 4), (1, 4), (2, 4)]
    changed = state.match_entries(stage(("new", 1), ("b", 16), ("a", 1)), world_size=2)
    assert [(entry.stream, entry.group, entry.taken) for entry in changed] == [(3, 2, 0), (2, 4, 12), (0, 4, 10)]
    again = state.match_entries(stage(("b", 8), ("a", 1)), world_size=2)
    assert [entry.taken for entry in again] == [11, 10]


@pytest.mark.parametrize("before, now", [(2, 1), (1, 2)])
def test_entries_that_look_alike_are_not_guessed(before: int, now: int) -> None:
    state = RunState()
    state.match_entries(stage(*[("a", 8)] * before), world_size=1)
    with pytest.raises(ResumeError, match=rf"had {before} entries of dataset 'a' with 8 frames .* now has {now}"):
        state.match_entries(stage(*[("a", 8)] * now), world_size=1)


def test_state_is_kept_and_an_older_one_refused(tmp_path: Path) -> None:
    state = RunState(stage=1, step=3)
    state.match_entries(stage(("a", 1), ("b", 8)), world_size=2)
    save_state(tmp_path, state)
    assert load_state(tmp_path) == state
    for old in ({"stage": 1, "step": 3, "positions": [4], "groups": [1]}, {"stage": 1}, [], None):
        (tmp_path / "state.json").write_text(json.dumps({"state": old}))
        with pytest.raises(ResumeError, match="was written by another version of sam2fast"):
            load_state(tmp_path)


def test_resumed_run_goes_on_with_each_dataset(
    exact_config: Path,
    synthetic: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    used: list[str] = []

    class Recorder(recipe.StageTrainer):
        stop_at = 0

        def _step(self, batches):
            """Nothing is learnt: which samples come is what matters."""
            if self.state.step == self.stop_at:
                raise UserError("stopped by the test")
            used.extend(sample_id for batch in batches for sample_id in batch.sample_ids)

    monkeypatch.setattr(recipe, "StageTrainer", Recorder)

    def images(output: str, stop_at: int, *data: str, without: str = "") -> list[str]:
        """Ids of the images that a run uses before it ends at a step."""
        used.clear()
        Recorder.stop_at = stop_at
        settings = [f"data.root={synthetic}", f"output_dir={tmp_path / output}", "checkpoint.every=1",
                    "log_every=100", "stages.0.steps=20", f"stages.0.data=[{', '.join(data)}]",
                    f"data.datasets.images.exclude=[{without}]", "data.datasets.images.format=sa1b",
                    "data.datasets.images.root=${data.root}/images"]  # fmt: skip
        assert train(str(exact_config), settings) == 2
        return [sample_id for sample_id in used if sample_id.startswith("images/")]

    whole = images("whole", 6, IMAGES)
    assert len(set(whole)) == 6
    parts = images("changed", 2, IMAGES)
    parts += images("changed", 6, VIDEOS, IMAGES)  # two of each
    parts += images("changed", 8, IMAGES)
    assert parts == whole
    assert "has changed since" not in capsys.readouterr().out
    images("changed", 9, IMAGES, without="sa_1")
    assert "dataset 'images' has changed since this run last used it: 8 videos or images" in capsys.readouterr().out
    images("changed", 10, IMAGES, without="sa_2")  # as many
    assert "7 videos or images then" in capsys.readouterr().out
