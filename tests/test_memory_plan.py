"""The dry run of a step: nothing in it reads a value back, it sees what policies save, and `auto` takes what fits."""

from __future__ import annotations

import pytest
import torch

from sam2fast import out_of_memory
from sam2fast.config import Config, DataConfig, DatasetConfig, MixItem, ModelConfig, PromptConfig, StageConfig
from sam2fast.memory_plan import GIB, MARGIN, choose_recompute, estimate_peak, heaviest_plan
from sam2fast.models.architecture import architecture
from sam2fast.performance import RECOMPUTE_LADDER, PerformanceConfig, RecomputePolicy, automatic_budget

ARCH = architecture("micro", image_size=256)
CPU = torch.device("cpu")


def make_stage(frames: int, **options) -> StageConfig:
    prompts = PromptConfig(init_frames=1, correction_clicks=2)
    return StageConfig(name="train", steps=1, prompts=prompts, data=[MixItem(dataset="x", frames=frames, **options)])


def make_config(stage: StageConfig, **model) -> Config:
    return Config(
        name="x",
        model=ModelConfig(size="micro", **model),
        data=DataConfig(datasets={"x": DatasetConfig(root="x")}),
        stages=[stage],
    )


def peak(policy: str, stage: StageConfig, performance: PerformanceConfig | None = None) -> int:
    """Reading a value of a fake tensor raises, so this also shows that a step waits for no result."""
    return estimate_peak(ARCH, performance or PerformanceConfig(), policy, stage, stage.data[0], "float32", CPU)


@pytest.fixture(scope="module")
def video_peaks() -> dict[str, int]:
    return {policy: peak(policy, make_stage(2)) for policy in ("none", "decoder", "decoder+trunk+memory")}


def test_recomputing_more_needs_less(video_peaks):
    assert video_peaks["none"] > video_peaks["decoder"] > video_peaks["decoder+trunk+memory"]


def test_optimizations_need_less(video_peaks):
    assert video_peaks["none"] < 0.8 * peak("none", make_stage(2), PerformanceConfig.all_off())


def test_more_objects_need_more():
    assert peak("none", make_stage(1, max_objects=8)) > 1.1 * peak("none", make_stage(1, max_objects=2))


def test_auto_takes_the_first_policy_that_fits():
    stage = make_stage(1, max_objects=8)
    peaks = {policy: peak(policy, stage) for policy in ("none", "many_masks")}
    config = make_config(stage)

    def choose(size: float) -> tuple[str, str]:
        return choose_recompute(config, stage, ARCH, CPU, size * MARGIN / GIB)

    assert choose(1.01 * peaks["none"])[0] == "none"
    assert choose(1.01 * peaks["many_masks"])[0] == "many_masks"
    policy, line = choose(0.01 * peaks["many_masks"])
    assert policy == RECOMPUTE_LADDER[-1]
    assert "does not fit" in line


def test_heaviest_plan_is_cut_to_the_clip():
    assert heaviest_plan(make_stage(1), 1).correct_frames == (0,)
    plan = heaviest_plan(make_stage(8), 8)
    assert plan.correct_frames == (0, 1) and plan.clicks == 2


@pytest.mark.parametrize("text", ["trunk", "decoder+trunk", "memory+selective+decoder", "many_masks+trunk"])
def test_policies_are_read(text):
    assert {name for name, chosen in vars(RecomputePolicy.parse(text)).items() if chosen} == set(text.split("+"))


@pytest.mark.parametrize(
    "text", ["", "all", "decoder+", "trunk+trunk", "selective", "auto:", "auto:-1", "auto:nan", "auto:x"]
)
def test_policies_that_cannot_be(text):
    with pytest.raises(ValueError, match="recompute"):
        ModelConfig(recompute=text)


def test_budgets_are_read():
    assert automatic_budget("auto") == 0 and automatic_budget("auto:12.5") == 12.5
    assert automatic_budget("none") is None


@pytest.mark.parametrize(
    ("recompute", "objects", "following"),
    [
        ("none", 7, "decoder+trunk+selective"),
        ("none", 8, "many_masks"),
        ("many_masks", 8, "decoder+trunk+selective"),
        ("decoder", 8, "decoder+trunk+selective"),
        ("trunk", 8, "decoder+trunk+memory"),
    ],
)
def test_out_of_memory_advises_a_policy_that_changes_something(recompute, objects, following, monkeypatch):
    monkeypatch.setattr(out_of_memory, "estimate_peak", lambda *_: GIB)
    batch_size = 2 if objects % 2 == 0 else 1
    stage = make_stage(1, batch_size=batch_size, max_objects=objects // batch_size)
    config = make_config(stage, recompute=recompute)
    assert f": model.recompute={following} (" in out_of_memory.advise(config, 0, 0, ARCH, recompute, CPU)
