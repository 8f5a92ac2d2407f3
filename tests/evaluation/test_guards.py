"""When training stops early."""

from __future__ import annotations

import json

from sam2fast.evaluation.guards import Guard


def test_stops_when_video_scores_stand_still():
    guard = Guard(patience=2, forgetting=2.0)
    assert guard.update({"a": 50.0, "b": 60.0}, {}) is None
    assert guard.update({"a": 56.0, "b": 54.0}, {}) is None  # the mean counts: 55 again, no better
    assert guard.update({"a": 57.0, "b": 55.0}, {}) is None  # better
    assert guard.update({"a": 55.0, "b": 55.0}, {}) is None
    assert "has not risen above 56.00 for 2 validations" in guard.update({"a": 56.0, "b": 56.0}, {})


def test_validations_without_video_cost_no_patience():
    guard = Guard(patience=1, forgetting=2.0)
    guard.update({"a": 50.0}, {})
    assert guard.update({}, {"map": 30.0}) is None
    assert guard.update({"a": 49.0}, {}) is not None


def test_a_new_stage_gets_the_whole_patience():
    guard = Guard(patience=2, forgetting=2.0)
    guard.update({"a": 50.0}, {})
    guard.update({"a": 40.0}, {})
    guard.restart_patience()
    assert guard.update({"a": 45.0}, {}) is None
    assert guard.update({"a": 49.0}, {}) is not None


def test_stops_when_an_image_score_falls_more_than_the_limit_below_its_best():
    guard = Guard(patience=0, forgetting=2.0)
    assert guard.update({}, {"map": 40.0, "miou": 70.0}) is None
    assert guard.update({}, {"map": 41.0, "miou": 69.0}) is None
    assert guard.update({}, {"map": 39.0, "miou": 70.0}) is None  # exactly 2
    assert "map fell 2.10 points, from 41.00 to 38.90" in guard.update({}, {"map": 38.9, "miou": 70.0})


def test_zero_is_off():
    guard = Guard(patience=0, forgetting=0.0)
    assert all(guard.update({"a": float(-n)}, {"map": float(-n)}) is None for n in range(10))


def test_state_survives_a_restart():
    guard = Guard(patience=2, forgetting=2.0)
    guard.update({"a": 50.0}, {"map": 40.0})
    guard.update({"a": 49.0}, {"map": 39.0})
    restored = Guard(patience=2, forgetting=2.0)
    restored.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    reason = restored.update({"a": 49.0}, {"map": 37.0})
    assert "50.00 for 2 validations" in reason and "map fell 3.00 points" in reason
