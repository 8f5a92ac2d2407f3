"""What differs between ranks, and whom the last sightings of ranks speak against."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist

from sam2fast.config import MixItem, StageConfig, UserError
from sam2fast.models.plan import draw_plan
from sam2fast.parallel.agreement import DivergenceError, agree_on_start, differences, name_ranks
from sam2fast.parallel.engine import set_tf32
from sam2fast.parallel.sightings import DONE, LOST, Sighting, find_cause
from sam2fast.step_plan import StepPlanner

SEEN = Sighting(0, 5, "elsewhere", 7, "video", 12, "forward and backward", "", 40)


def test_differences_name_the_ranks_of_each_value() -> None:
    same = {"seed": 0, "version": "1"}
    assert differences([same, same]) == ""
    text = differences([same, same, {"seed": 1}, same, same])
    assert (
        text
        == "seed is 0 on ranks 0, 1, 3, 4 and 1 on rank 2; version is '1' on ranks 0, 1, 3, 4 and not set on rank 2"
    )
    assert name_ranks([0, 1, 2, 3, 7]) == "ranks 0-3, 7"


def test_ranks_with_other_numbers_of_ranks_do_not_start() -> None:
    store = dist.HashStore()

    def start(rank: int) -> None:
        facts = {"device": "cpu", "world_size": 2 + rank}
        with pytest.raises(
            SystemExit if rank else DivergenceError, match=None if rank else "2 on rank 0 and 3 on rank"
        ):
            agree_on_start(store, rank, facts, 1.0)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(start, range(2)))


def test_a_rank_that_does_not_come_is_named() -> None:
    store = dist.HashStore()
    store.set_timeout(timedelta(milliseconds=100))
    with pytest.raises(UserError, match="rank 1 of 2 did not start within engine.timeout_minutes=30"):
        agree_on_start(store, 0, {"world_size": 2}, 30.0)


@pytest.mark.parametrize(
    "change, name, said",
    [
        ({"phase": "loading data", "sequence": 37}, "rank 1", "is late; ranks 0, 2, 3 wait in a sum over ranks"),
        ({"silent": True}, "rank 1", "does not answer any more"),
        ({"ended": "out of memory"}, "rank 1", "ended with its own error: out of memory"),
        ({"ended": DONE}, "the other ranks", "rank 1 ended before"),
        ({}, "all ranks", "it takes long, or the network or a device hangs"),
    ],
)
def test_the_cause_is_found(change: dict, name: str, said: str) -> None:
    found = [replace(SEEN, rank=rank, collective="a sum over ranks") for rank in range(4)]
    found[1] = replace(found[1], collective="", **change) if change else found[1]
    assert find_cause(found)[0] == name and said in find_cause(found)[1]


def test_a_rank_at_slow_work_is_the_cause_where_all_are_in_one_place() -> None:
    found = [replace(SEEN, rank=rank, phase="saving a checkpoint") for rank in range(3)]
    found[1] = replace(found[1], work="publishing a checkpoint")
    name, said = find_cause(found)
    assert name == "rank 1" and "in saving a checkpoint (publishing a checkpoint), after step 12" in said
    assert "is late; ranks 0, 2 wait in saving a checkpoint" in said
    assert find_cause([replace(each, work="publishing a checkpoint") for each in found])[0] == "all ranks"
    assert find_cause([replace(each, collective="a sum over ranks") for each in found])[0] == "all ranks"


def test_ranks_that_ended_because_of_others_are_no_cause() -> None:
    found = [SEEN, replace(SEEN, rank=1, ended=LOST), replace(SEEN, rank=2, silent=True)]
    assert find_cause(found)[0] == "rank 2"
    assert find_cause([SEEN, replace(SEEN, rank=1)], hang=False)[0] == "the network"


def test_plans_are_those_of_the_step_whenever_they_are_drawn() -> None:
    data = [MixItem(dataset="a", frames=6, batch_size=2, max_objects=5), MixItem(dataset="b")]
    stage = StageConfig(name="both", steps=5, data=data)
    plans = [StepPlanner(stage, 3, 1).plan(step) for step in range(6)]
    again = StepPlanner(stage, 3, 1)
    assert [again.plan(step) for step in (4, 0, 2)] == [plans[4], plans[0], plans[2]]
    assert plans[5] is None and [plan.dataset for plan in plans[:4]] == ["a", "b", "a", "b"]
    expected = draw_plan(stage.prompts, 6, np.random.Generator(np.random.PCG64([3, 1, 2])))
    assert plans[2].rollout == replace(expected, max_objects=10)


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_set_for_old_and_new_readers(allowed: bool) -> None:
    try:
        set_tf32(allowed, torch.device("cuda"))
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == allowed
        assert (torch.backends.cuda.matmul.fp32_precision == "tf32") == allowed
        assert (torch.backends.cudnn.conv.fp32_precision == "tf32") == allowed
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True
