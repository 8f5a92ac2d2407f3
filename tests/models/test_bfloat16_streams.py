"""The option that rounds residual streams to bfloat16: an error of the size of bfloat16's own, and less memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sam2fast.config import ConfigError
from sam2fast.config_file import load_config
from sam2fast.data.sample import Batch
from sam2fast.models.architecture import architecture
from sam2fast.models.plan import RolloutPlan
from sam2fast.models.sam2 import SAM2

SIZE = 64
# Without corrections: a click answers to the mask before it, and another click is another step.
PLANS = {
    "mask": RolloutPlan(3, "mask", (0,)),
    "points": RolloutPlan(3, "point", (0,), (), (False,)),
    "image": RolloutPlan(1, "point", (0,), (), (False,)),
}


def step(plan: RolloutPlan, dtype: torch.dtype | None, streams: bool) -> tuple[Tensor, Tensor, int]:
    """Logits of the last frame, gradient of the first layer and bytes kept for the backward pass."""
    torch.manual_seed(0)
    arch = architecture("micro", image_size=SIZE, drop_path=0.0, memory_dropout=0.0)
    model = SAM2(arch, bfloat16_streams=streams).train()
    torch.nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 3.0)
    images = torch.randn(1, plan.num_frames, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    masks = torch.zeros(plan.num_frames, 2, SIZE, SIZE, dtype=torch.bool)
    masks[:, 0, 5:30, 5:30] = masks[:, 1, 30:60, 20:50] = True
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        if not isinstance(x, torch.nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    torch.manual_seed(1)
    with torch.autocast("cpu", dtype, enabled=dtype is not None), saved_tensors_hooks(note, lambda x: x):
        output = model(Batch(images, masks, torch.zeros(2, dtype=torch.long), ["squares"]), plan)
        logits = output.frames[-1].steps[-1].low_res
    logits.clamp(min=-30).float().sigmoid().mean().backward()
    return logits.detach(), model.image_encoder.trunk.patch_embed.proj.weight.grad, sum(kept.values())


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("kind", PLANS)
def test_streams_add_an_error_like_that_of_bfloat16(kind):
    exact, bfloat16, rounded = (
        step(PLANS[kind], *options) for options in ((None, False), (torch.bfloat16, False), (torch.bfloat16, True))
    )
    for part in (0, 1):
        assert error(rounded[part], exact[part]) <= 3 * error(bfloat16[part], exact[part]) + 0.01
    assert not torch.equal(rounded[0], bfloat16[0])
    assert rounded[2] < bfloat16[2]


def test_without_autocast_nothing_is_rounded():
    plain, asked = (step(PLANS["points"], None, streams) for streams in (False, True))
    assert torch.equal(plain[0], asked[0]) and torch.equal(plain[1], asked[1])


def test_the_option_needs_bfloat16(tmp_path):
    with pytest.raises(ConfigError, match=r"bfloat16_streams needs precision=bfloat16, not float32"):
        load_config("configs/quickstart.yaml", ["model.bfloat16_streams=true", f"output_dir={tmp_path}"])
