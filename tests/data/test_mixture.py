"""Which dataset a step uses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sam2fast.config import MixItem, StageConfig
from sam2fast.data.mixture import Mixture, official_order, repeat_indices

ORACLE = Path(__file__).resolve().parents[1] / "parity" / "oracle.pt"


def mixture(weights, mode="alternate", seed=0, stage=0):
    items = tuple(MixItem(dataset=f"d{index}", weight=weight) for index, weight in enumerate(weights))
    return Mixture(StageConfig(name="stage", steps=10, mixture=mode, data=items), seed, stage)


def order(*args, steps=12, **kwargs):
    mix = mixture(*args, **kwargs)
    return [mix.item(step) for step in range(steps)]


def test_alternation_keeps_to_the_weights_at_every_step():
    assert order([1, 1]) == [0, 1] * 6
    assert order([3, 1]) == [0, 0, 1, 0] * 3
    assert order([5]) == [0] * 12
    weights = np.array([0.152, 0.7, 0.148])
    steps = np.array(order(weights.tolist(), steps=5000))
    shares = np.cumsum(np.eye(3)[steps], axis=0)
    assert abs(shares - np.arange(1, 5001)[:, None] * weights).max() < 1


def test_probability_is_a_function_of_seed_stage_and_step():
    first = order([1, 3], "probability", seed=5, steps=6000)
    assert abs(np.mean(first) - 0.75) < 0.03
    later = mixture([1, 3], "probability", seed=5)
    assert [later.item(step) for step in (5999, 4096, 0)] == [first[step] for step in (5999, 4096, 0)]
    for other in ({"seed": 6}, {"seed": 5, "stage": 1}):
        assert order([1, 3], "probability", steps=6000, **other) != first


@pytest.mark.parametrize("mode", ["alternate", "probability"])
def test_position_counts_earlier_steps(mode):
    steps = order([2, 1, 3], mode, steps=300)
    mix = mixture([2, 1, 3], mode)
    for step in (0, 1, 50, 299):
        assert [mix.position(item, step) for item in range(3)] == [steps[:step].count(item) for item in range(3)]


def test_official_orders():
    parts = torch.load(ORACLE, weights_only=True)["parts"]
    mixed = parts["mixed_loader"]
    assert official_order(mixed["lens"], mixed["prob"], mixed["seed"]) == mixed["order"]
    assert {epoch: repeat_indices([2.0, 1.5, 0.25, 1.0], epoch) for epoch in range(3)} == parts["repeat_factor"]
