"""Which dataset a step uses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sam2fast.config import MixItem, StageConfig
from sam2fast.data.mixture import Mixture, official_order, repeat_counts, repeat_indices
from sam2fast.data.order import SampleOrder

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
def test_every_source_goes_through_its_epochs(mode):
    """Weights by size of the source, as in the paper: no sample of a source is lost or repeated within its epochs."""
    weights, batch, sizes = [0.152, 0.7, 0.148], 4, (15, 70, 14)
    mix = mixture(weights, mode)
    orders = [SampleOrder(size, [0, 0, index]) for index, size in enumerate(sizes)]
    seen: list[list[int]] = [[], [], []]
    for step in range(3000):
        item = mix.item(step)
        first = len(seen[item])
        seen[item] += [orders[item][number].record for number in range(first, first + batch)]
    for size, records, weight in zip(sizes, seen, weights, strict=True):
        assert abs(len(records) / (3000 * batch) - weight) < 0.03
        epochs = [records[start : start + size] for start in range(0, len(records) - size, size)]
        assert len(epochs) > 100 and all(sorted(epoch) == list(range(size)) for epoch in epochs)


def test_repeats_are_one_implementation():
    factors = [2.0, 1.5, 0.25, 1.0]
    for epoch in range(20):
        expected = np.repeat(np.arange(4), repeat_counts(factors, epoch, 7).numpy())
        assert repeat_indices(factors, epoch, 7) == expected.tolist()


def test_official_orders():
    parts = torch.load(ORACLE, weights_only=True)["parts"]
    mixed = parts["mixed_loader"]
    assert official_order(mixed["lens"], mixed["prob"], mixed["seed"]) == mixed["order"]
    assert {epoch: repeat_indices([2.0, 1.5, 0.25, 1.0], epoch) for epoch in range(3)} == parts["repeat_factor"]
