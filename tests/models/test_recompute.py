"""Recomputed and offloaded activations change no number; recomputed ones are not kept."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sam2fast.data.sample import Batch
from sam2fast.models.architecture import architecture
from sam2fast.models.plan import RolloutPlan
from sam2fast.models.sam2 import SAM2

SIZE, FRAMES = 64, 3
PLAN = RolloutPlan(FRAMES, "point", (0,), (0, 1), (False,), ((False, False),) * 2)


@functools.cache
def step(policy: str, offload: bool = False, bfloat16: bool = False) -> tuple[dict[str, Tensor], int]:
    """Gradients of a step with dropout, and the bytes of distinct tensors that the forward pass kept."""
    torch.manual_seed(0)
    arch = architecture("micro", image_size=SIZE, drop_path=0.1, memory_dropout=0.1)
    model = SAM2(arch, recompute=policy, offload_activations=offload).train()
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(FRAMES, 2, SIZE, SIZE, dtype=torch.bool)
    masks[:, 0, 10:40, 10:40] = masks[:, 1, 30:60, 5:20] = True
    frames = torch.randn(1, FRAMES, 3, SIZE, SIZE, generator=generator)
    batch = Batch(frames, masks, torch.zeros(2, dtype=torch.long), ["squares"])
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(1)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bfloat16)
    with saved_tensors_hooks(note, lambda tensor: tensor), autocast:
        output = model(batch, PLAN)
        total = sum(one.low_res.clamp(min=-30).sigmoid().mean() for frame in output.frames for one in frame.steps)
    total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, sum(kept.values())


@pytest.mark.parametrize(
    "policy", ["decoder", "trunk", "memory", "decoder+trunk+memory", "decoder+trunk+memory+selective"]
)
def test_recomputing_changes_no_gradient(policy):
    (want, everything), (found, kept) = step("none"), step(policy)
    assert found.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6 * max(1.0, value.abs().max().item()))
    assert kept < everything


@pytest.mark.parametrize("policy", ["decoder+trunk+memory", "decoder+trunk+selective", "memory+selective"])
def test_recomputing_under_autocast_changes_no_gradient(policy):
    """Weights that are used in several places, inside what is recomputed and outside, are cast in both."""
    (want, everything), (found, kept) = step("none", bfloat16=True), step(policy, bfloat16=True)
    assert found.keys() == want.keys()
    total = torch.stack([value.norm() for value in want.values()]).norm().item()
    assert max((found[name] - value).norm().item() for name, value in want.items()) <= 1e-2 * total
    assert kept < everything


def test_offloading_changes_no_gradient():
    want, found = step("none")[0], step("none", offload=True)[0]
    assert all(torch.equal(found[name], value) for name, value in want.items())
