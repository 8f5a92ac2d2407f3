"""The simulated user on a micro model: two clips with two objects and one object."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sam2fast.data.sample import Batch
from sam2fast.models.architecture import architecture
from sam2fast.models.plan import RolloutPlan
from sam2fast.models.rollout import rollout
from sam2fast.models.sam2 import SAM2
from sam2fast.performance import RecomputePolicy

SIZE = 64


@pytest.fixture(scope="module")
def model() -> SAM2:
    torch.manual_seed(0)
    model = SAM2(architecture("micro", image_size=SIZE, drop_path=0.0, memory_dropout=0.0))
    with torch.no_grad():
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(3)  # objects are present
    return model.train()


@pytest.fixture(autouse=True)
def _fresh(model):
    torch.manual_seed(1)
    model.zero_grad(set_to_none=True)


def make_batch(num_frames: int) -> Batch:
    frames = torch.randint(0, 256, (2, num_frames, 3, SIZE, SIZE), dtype=torch.uint8)
    masks = torch.zeros(num_frames, 3, SIZE, SIZE, dtype=torch.bool)
    for t in range(num_frames):
        masks[t, 0, 8 + 2 * t : 30, 10:40] = True
        masks[t, 1, 40:60, 20:50] = True
        masks[t, 2, 20:44, 4 * t : 32 + 4 * t] = True
    return Batch(frames, masks, torch.tensor([0, 0, 1]), ["a", "b"])


def points_plan(num_frames: int, init=(0,), correct=(0,), **options) -> RolloutPlan:
    options = {"box": (False,) * len(init), "click_from_gt": ((False, False),) * len(correct)} | options
    return RolloutPlan(num_frames, "point", init, correct, **options)


def clip(batch: Batch, index: int) -> Batch:
    """One clip of a batch."""
    objects = batch.object_to_clip == index
    frames = batch.frames[index : index + 1]
    return Batch(frames, batch.masks[:, objects], torch.zeros(int(objects.sum()), dtype=torch.long), ["one"])


def test_masks_are_taken_as_output_and_tracked(model):
    batch = make_batch(4)
    output = rollout(model, batch, RolloutPlan(4, "mask", (0, 2)))
    assert [frame.frame for frame in output.frames] == [0, 1, 2, 3]
    assert [frame.constant for frame in output.frames] == [True, False, True, False]
    assert [frame.memory.conditioning for frame in output.frames] == [True, False, True, False]
    for frame in output.frames:
        (step,) = frame.steps
        candidates = 1 if frame.constant else 3
        assert step.low_res.shape == (3, candidates, SIZE // 4, SIZE // 4) and step.ious.shape == (3, candidates)
        assert step.object_score.shape == (3, 1) and frame.points == [None]
        assert step.low_res.requires_grad != frame.constant
    assert torch.equal(output.frames[2].steps[0].full_res > 0, batch.masks[2][:, None])


@pytest.mark.parametrize(("mode", "box"), [("mask", False), ("point", False), ("point", True)])
def test_an_object_that_the_first_frame_lacks_is_prompted_as_absent(model, mode, box):
    """Its mask is empty; its click is a negative one, outside of nothing; the corners of its box are out of order."""
    batch = make_batch(2)
    batch.masks[0, 1] = False
    plan = RolloutPlan(2, "mask", (0,)) if mode == "mask" else points_plan(2, correct=(), box=(box,))
    output = rollout(model, batch, plan)
    steps = [step for frame in output.frames for step in frame.steps]
    assert all(torch.isfinite(value).all() for step in steps for value in (step.low_res, step.ious, step.object_score))
    sum(step.low_res.mean() + step.object_score.mean() for step in steps).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    if mode == "mask":
        score = output.frames[0].steps[0].object_score.flatten() > 0
        assert score.tolist() == [True, False, True]
        return
    coordinates, labels = output.frames[0].points[0]
    if box:
        assert (coordinates[:, 0] < coordinates[:, 1]).all(1).tolist() == [True, False, True]
        assert (coordinates[1, 0] > coordinates[1, 1]).all()
    else:
        assert labels.flatten().tolist() == [1, 0, 1]


def test_points_and_corrections(model):
    batch = make_batch(3)
    plan = points_plan(3, init=(0,), correct=(0, 2), click_from_gt=((False, True), (False, False)))
    output = rollout(model, batch, plan)
    assert [len(frame.steps) for frame in output.frames] == [3, 1, 3]
    assert [frame.memory.conditioning for frame in output.frames] == [True, False, True]
    counts = [[0 if p is None else p[1].shape[1] for p in frame.points] for frame in output.frames]
    assert counts == [[1, 2, 3], [0], [0, 1, 2]]
    # Up to one point is ambiguous: three candidates.
    assert [[step.ious.shape[1] for step in frame.steps] for frame in output.frames] == [[3, 1, 1], [3], [3, 3, 1]]
    for frame in output.frames:
        for (before, points), previous in zip(pairwise(frame.points), frame.steps, strict=False):
            if before is not None:
                assert torch.equal(points[0][:, :-1], before[0]) and torch.equal(points[1][:, :-1], before[1])
            full = torch.nn.functional.interpolate(previous.best.detach(), (SIZE, SIZE), mode="bilinear")[:, 0] > 0
            x, y = points[0][:, -1].long().unbind(-1)
            truth, predicted = (mask[torch.arange(3), y, x] for mask in (batch.masks[frame.frame], full))
            label = points[1][:, -1].bool()
            assert torch.equal(label, truth)
            if frame.frame == 0 and points[1].shape[1] == 3:  # the click of the plan that ignores the errors
                assert label.all()
            else:
                assert torch.equal(label, ~predicted)


def test_box_prompts(model):
    plan = points_plan(2, init=(0, 1), correct=(0, 1), box=(True, False), box_noise=0.0)
    boxed, clicked = rollout(model, make_batch(2), plan).frames
    assert boxed.points[0][0][0].tolist() == [[10, 8], [39, 29]] and boxed.points[0][1][0].tolist() == [2, 3]
    assert boxed.steps[0].ious.shape[1] == 1 and boxed.points[2][1].shape[1] == 4
    assert clicked.steps[0].ious.shape[1] == 3


def test_corrections_train_what_they_correct_and_memory_trains_the_clip(model):
    output = rollout(model, make_batch(3), points_plan(3, correct=(0,)))
    first, second, third = output.frames
    (gradient,) = torch.autograd.grad(first.steps[2].low_res.sum(), first.steps[0].low_res, retain_graph=True)
    assert gradient.abs().sum() > 0
    for earlier in (first, second):
        gradient = torch.autograd.grad(third.steps[0].low_res.sum(), earlier.steps[-1].low_res, retain_graph=True)[0]
        assert gradient.abs().sum() > 0


def reached(model: SAM2) -> set[str]:
    return {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}


def loss(output) -> torch.Tensor:
    return sum(step.low_res.square().mean() + step.ious.sum() for frame in output.frames for step in frame.steps)


ALWAYS = {"image_encoder", "sam_prompt_encoder", "sam_mask_decoder"}
MEMORY = {"memory_attention", "memory_encoder", "maskmem_tpos_enc", "obj_ptr_proj", "obj_ptr_tpos_proj", "no_obj_ptr"}


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (RolloutPlan(3, "mask", (0,)), ALWAYS | MEMORY | {"mask_downsample", "no_obj_embed_spatial"}),
        (points_plan(3), ALWAYS | MEMORY | {"no_mem_embed", "no_obj_embed_spatial"}),
        (points_plan(1), ALWAYS | {"no_mem_embed"}),
        (RolloutPlan(1, "coarse_mask", (0,), (0,), click_from_gt=((False,),)), ALWAYS | {"no_mem_embed"}),
    ],
)
def test_gradients_reach_what_the_plan_uses(model, plan, expected):
    loss(rollout(model, make_batch(plan.num_frames), plan)).backward()
    assert reached(model) == expected


def kept_bytes(model, batch: Batch, plan: RolloutPlan, policy: str, monkeypatch) -> tuple[int, torch.Tensor]:
    """What the forward pass keeps, and its loss."""
    monkeypatch.setattr(model, "recompute", RecomputePolicy.parse(policy))
    torch.manual_seed(0)
    kept = 0

    def count(tensor):
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        total = loss(rollout(model, batch, plan))
    return kept, total


def test_recomputed_decoder_gives_the_same_gradients_and_keeps_less(model, monkeypatch):
    """Bit for bit, with corrections that are trained through each other."""
    plan = points_plan(1, correct=(0,), click_from_gt=((False,) * 3,))
    batch, results = make_batch(1), {}
    for policy in ("none", "decoder"):
        kept, total = kept_bytes(model, batch, plan, policy, monkeypatch)
        model.zero_grad()
        total.backward()
        results[policy] = kept, [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert results["decoder"][0] < 0.7 * results["none"][0]
    assert len(results["decoder"][1]) == len(results["none"][1])
    for recomputed, stored in zip(results["decoder"][1], results["none"][1], strict=True):
        assert torch.equal(recomputed, stored)


@pytest.mark.parametrize(("objects", "like"), [(7, "none"), (8, "decoder")])
def test_decoder_of_many_masks_is_recomputed(model, monkeypatch, objects, like):
    few, repeated = make_batch(1), torch.arange(objects) * 3 // objects
    batch = Batch(few.frames, few.masks[:, repeated], few.object_to_clip[repeated], ["a", "b"])
    plan = points_plan(1, correct=(0,), click_from_gt=((False,),))
    found, want = (kept_bytes(model, batch, plan, policy, monkeypatch)[0] for policy in ("many_masks", like))
    assert found == want


def test_ranks_with_few_and_many_masks_recompute_alike(model, monkeypatch):
    """ZeRO-3 gathers parameters when a module runs; ranks that ran different ones would wait for each other forever."""
    plan = replace(points_plan(1, correct=(0,), click_from_gt=((False,),)), max_objects=8)
    found, want = (
        kept_bytes(model, make_batch(1), plan, policy, monkeypatch)[0] for policy in ("many_masks", "decoder")
    )
    assert found == want


def test_coarse_mask_goes_to_the_prompt_encoder(model):
    plan = RolloutPlan(1, "coarse_mask", (0,), (0,), click_from_gt=((False,),), box_noise=0.0)
    (frame,) = rollout(model, make_batch(1), plan).frames
    assert not frame.constant and frame.points[0] is None and frame.points[1][1].shape == (3, 1)
    frame.steps[0].low_res.sum().backward()
    assert model.sam_prompt_encoder.mask_downscaling[0].weight.grad.abs().sum() > 0


def test_memories_that_nobody_reads_are_not_encoded(model):
    encoded = []
    handle = model.memory_encoder.register_forward_hook(lambda *_: encoded.append(1))
    batch = make_batch(3)
    for plan, expected in (
        (RolloutPlan(3, "mask", (0, 2)), 2),  # frame 1 is run last
        (points_plan(3, correct=(0, 1)), 2),
        (replace(RolloutPlan(3, "mask", (0, 2, 1))), 0),
    ):
        encoded.clear()
        lean = rollout(model, batch, plan)
        assert len(encoded) == expected
        encoded.clear()
        torch.manual_seed(1)
        full = rollout(model, batch, plan, keep_all_memories=True)
        assert len(encoded) == 3 and all(frame.memory.spatial is not None for frame in full.frames)
        if plan.mode == "mask":
            for a, b in zip(lean.frames, full.frames, strict=True):
                assert torch.equal(a.steps[0].low_res, b.steps[0].low_res)
    encoded.clear()
    rollout(model, make_batch(1), points_plan(1))
    assert not encoded
    handle.remove()


@torch.no_grad()
def test_clips_of_a_batch_do_not_see_each_other(model):
    batch = make_batch(3)
    plan = points_plan(3, init=(0, 2), correct=(0, 2))
    together = rollout(model, batch, plan)
    for index, objects in ((0, slice(0, 2)), (1, slice(2, 3))):
        points = {
            frame.frame: [None if p is None else (p[0][objects], p[1][objects]) for p in frame.points]
            for frame in together.frames
        }
        alone = rollout(model, clip(batch, index), replace(plan, injected=points))
        for ours, theirs in zip(alone.frames, together.frames, strict=True):
            for a, b in zip(ours.steps, theirs.steps, strict=True):
                torch.testing.assert_close(a.low_res, b.low_res[objects], atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_generator_of_torch_decides_the_clicks(model):
    batch, plan = make_batch(2), points_plan(2, correct=(0, 1))
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append([p[0] for frame in model(batch, plan).frames for p in frame.points if p is not None])
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))


class HostReads(TorchDispatchMode):
    """Names of the operators after which the host would wait for a GPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or any(name in str(func) for name in self.WAITING):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "plan",
    [
        points_plan(2, correct=(0, 1), click_from_gt=((False, True), (False,)), first_click="center"),
        points_plan(2, box=(True,)),
        RolloutPlan(2, "mask", (0,)),
        RolloutPlan(1, "coarse_mask", (0,), (0,), click_from_gt=((False,),)),
    ],
)
def test_the_host_never_waits_for_a_value(model, plan):
    with HostReads() as reads:
        rollout(model, make_batch(plan.num_frames), plan)
    assert reads.seen == []
    with HostReads() as reads:
        torch.ones(2)[torch.tensor([True, False])].sum().item()
    assert len(reads.seen) >= 2  # the test can fail
