"""Evaluation of propagated masks, with trackers whose scores are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sam2fast.data.sample import DataError
from sam2fast.evaluation.metrics import boundary_accuracy, region_similarity
from sam2fast.evaluation.vos import READ_AHEAD, VosResult, evaluate_vos


def tracker(records, predict, size=None):
    """A propagator that plays `predict(record, object_id, frame)` -> bool mask, on videos in the order of `records`."""
    order = iter(records)

    def propagate(model, frames, prompts, num_frames):
        record = next(order)
        count = 0
        for index, image in enumerate(frames):
            assert image.shape == (*record.size, 3) and (image == index).all()
            count += 1
            masks = {k: predict(record, k, index) for k, (first, _) in prompts.items() if first <= index}
            yield index, {k: torch.from_numpy(np.where(mask, 4.0, -4.0)) for k, mask in masks.items()}
        assert count == num_frames

    return propagate


def perfect(record, object_id, frame):
    return record.truth(object_id, frame)


def test_a_perfect_tracker_scores_100(records, no_model):
    result = evaluate_vos(no_model, records, propagator=tracker(records, perfect))
    scores = result.scores()
    assert scores["jf"] == scores["j"] == scores["f"] == 100
    assert 0 < scores["copy_jf"] < 100


def test_scored_frames_and_prompts_of_late_objects(records, no_model):
    result = evaluate_vos(no_model, records, propagator=tracker(records, perfect))
    # annotated 0 2 4 6 8 10: 0 and 10 do not count, and the late object appears on 4
    assert [(s.video, s.object_id, s.num_frames) for s in result.objects] == [
        ("first", 1, 4),
        ("second", 1, 4),
        ("second", 7, 3),
    ]
    assert result.num_objects == 3 and result.num_frames == 11


def test_the_copy_baseline_and_absent_objects(records, no_model):
    def empty(record, object_id, frame):
        return np.zeros(record.size, bool)

    result = evaluate_vos(no_model, records, propagator=tracker(records, empty))
    slide, leaves, late = result.objects
    first = records[0].truth(1, 0)
    frames = (2, 4, 6, 8)
    assert slide.copy_j == pytest.approx(
        100 * np.mean([region_similarity(first, records[0].truth(1, t)) for t in frames])
    )
    assert slide.copy_f == pytest.approx(
        100 * np.mean([boundary_accuracy(first, records[0].truth(1, t)) for t in frames])
    )
    assert slide.j == slide.f == 0
    assert leaves.j == leaves.f == leaves.copy_j == 50  # present on 2 and 4, gone on 6 and 8
    assert late.copy_j == late.copy_f == 100 and late.j == 0


def test_means_are_over_objects(records, no_model):
    def only_the_first_video(record, object_id, frame):
        return record.truth(object_id, frame) if record.name == "first" else np.zeros(record.size, bool)

    result = evaluate_vos(no_model, records, propagator=tracker(records, only_the_first_video))
    assert [s.j for s in result.objects] == [100, 50, 0]
    assert result.scores()["j"] == pytest.approx(50)
    assert result.scores()["jf"] == pytest.approx((result.scores()["j"] + result.scores()["f"]) / 2)


def test_predictions_of_another_size_are_resized(records, no_model):
    def propagate(model, frames, prompts, num_frames):
        for index, _ in enumerate(frames):
            yield index, {k: torch.where(torch.arange(30)[None] < 15, 1.0, -1.0).expand(20, 30) for k in prompts}

    seen = []
    evaluate_vos(no_model, records, max_items=1, propagator=propagate, save=seen.append)
    prediction = seen[5].predictions[1]
    assert prediction.shape == (40, 60) and prediction[:, :30].all() and not prediction[:, 30:].any()


def test_max_items_and_max_frames(records, no_model):
    result = evaluate_vos(no_model, records, max_items=1, max_frames=7, propagator=tracker(records, perfect))
    assert [(s.video, s.num_frames) for s in result.objects] == [("first", 2)]  # annotated 0 2 4 6
    assert max(max(request) for request in records[0].requests) == 6


def test_frames_are_read_in_order_a_few_at_a_time(records, no_model):
    evaluate_vos(no_model, records, max_items=1, propagator=tracker(records, perfect))
    requests = records[0].requests
    assert [frame for request in requests for frame in request] == list(range(12))
    assert max(map(len, requests)) <= READ_AHEAD


def test_shares_of_two_ranks_merge_to_the_whole(records, no_model):
    whole = evaluate_vos(no_model, records, propagator=tracker(records, perfect))
    shares = [
        evaluate_vos(no_model, records, rank=rank, world_size=2, propagator=tracker(records[rank::2], perfect))
        for rank in (1, 0)
    ]
    assert [len(share.objects) for share in shares] == [2, 1]
    merged = VosResult.merge(shares)
    assert merged == whole and merged.scores() == whole.scores()


def test_save_sees_every_frame(records, no_model):
    seen = []
    evaluate_vos(no_model, records, propagator=tracker(records, perfect), save=seen.append)
    assert [(result.video, result.index) for result in seen] == [
        (name, t) for name in ("first", "second") for t in range(12)
    ]
    assert all(result.num_frames == 12 and (result.image == result.index).all() for result in seen)
    second = {result.index: result for result in seen if result.video == "second"}
    assert second[1].targets is None
    assert set(second[2].targets) == set(second[2].copies) == {1} and set(second[6].targets) == {7}
    assert (second[10].copies[7] == records[1].truth(7, 4)).all()


def test_nothing_to_score_is_an_error_that_says_why(records, no_model):
    result = evaluate_vos(no_model, records, max_frames=3, propagator=tracker(records, perfect))
    with pytest.raises(DataError, match="dataset boxes: .* at least three annotated frames"):
        result.scores()


def test_a_model_in_training_mode_is_refused(records):
    with pytest.raises(AssertionError, match="eval"):
        evaluate_vos(torch.nn.Identity(), records, propagator=tracker(records, perfect))
