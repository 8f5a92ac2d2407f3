"""Seeded shares of a dataset."""

from __future__ import annotations

import pytest

from sam2fast.config import DatasetConfig
from sam2fast.data.formats.selection import select

NAMES = [f"{number:04d}" for number in range(1000)]


def share(fraction, seed=0, names=NAMES, **options):
    return select(names, DatasetConfig(root="data", fraction=fraction, **options), "data", seed).tolist()


def test_a_share_is_a_function_of_the_seed():
    # literal numbers: a run must find the same images on another machine and with another numpy
    assert share(0.01) == [162, 206, 222, 264, 350, 459, 518, 711, 814, 890]
    assert share(0.01, seed=1) != share(0.01)
    assert share(1.0) == list(range(1000)) and len(share(0.0001)) == 1


@pytest.mark.parametrize("seed", range(3))
def test_a_larger_share_holds_the_smaller_one(seed):
    assert set(share(0.01, seed)) < set(share(0.02, seed)) < set(share(0.5, seed))


def test_a_share_is_one_of_what_include_and_exclude_leave():
    found = share(0.5, include=("00*",), exclude=("000*",))
    assert len(found) == 45 and set(found) < set(range(10, 100))
