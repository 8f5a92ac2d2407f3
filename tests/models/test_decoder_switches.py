"""The optimizations of the mask decoder change nothing: outputs and all gradients are those without them."""

from __future__ import annotations

import pytest
import torch

from sam2fast.models.architecture import architecture
from sam2fast.models.sam2 import SAM2
from sam2fast.performance import PerformanceConfig

SIDE = 64
SWITCHES = ("absorbed_projections", "fused_upscaling", "shared_image_features", "fused_norms", "folded_projections")


def build(performance: PerformanceConfig) -> SAM2:
    torch.manual_seed(0)
    model = SAM2(architecture("micro", image_size=SIDE, drop_path=0.0, memory_dropout=0.0), performance=performance)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # weights and biases whose gradients are neither zero nor tiny
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.double()


def only(name: str) -> PerformanceConfig:
    return PerformanceConfig.all_off().model_copy(update={name: True})


def one_row(model: SAM2, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x if len(x) == 1 else x[index]


def heads(model: SAM2, clips: int, prompt: str, multimask: bool) -> dict[str, torch.Tensor]:
    """Outputs of five objects, and the gradients of inputs and parameters."""
    generator = torch.Generator().manual_seed(2)
    shapes = ((256, SIDE // 16), (32, SIDE // 4), (64, SIDE // 8))
    leaves = [torch.randn(clips, c, s, s, dtype=torch.float64, generator=generator) for c, s in shapes]
    leaves.append(torch.randn(5, 1, SIDE // 4, SIDE // 4, dtype=torch.float64, generator=generator))
    leaves = [leaf.requires_grad_() for leaf in leaves]
    index = torch.tensor([0, 0, 0, 0, 0] if clips == 1 else [0, 1, 1, 0, 1])
    top, fine0, fine1 = (leaf if clips == 1 else leaf[index] for leaf in leaves[:3])
    if clips == 1 and not model.performance.shared_image_features:
        top, fine0, fine1 = (x.expand(5, -1, -1, -1) for x in (top, fine0, fine1))
    points = None
    if prompt != "mask":
        points = (SIDE * torch.rand(5, 2, 2, generator=generator), torch.tensor([[1, 0]]).expand(5, 2))
    out = model.predict_masks(top, (fine0, fine1), points, leaves[3] if prompt != "points" else None, multimask)
    memory = model.encode_memory(top, out.best, out.object_score)
    outputs = {"low_res": out.low_res, "ious": out.ious, "best": out.best, "pointer": out.pointer, "memory": memory}
    total = sum((value.double() * torch.randn(value.shape, generator=generator)).sum() for value in outputs.values())
    total.backward()
    grads = {f"input{i}": leaf.grad for i, leaf in enumerate(leaves) if leaf.grad is not None}
    return outputs | grads | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("prompt", ["points", "mask", "both"])
@pytest.mark.parametrize("clips", [1, 2])
def test_switches_change_nothing(clips, prompt, multimask):
    want = heads(build(PerformanceConfig.all_off()), clips, prompt, multimask)
    for performance in (PerformanceConfig(), *map(only, SWITCHES)):
        got = heads(build(performance), clips, prompt, multimask)
        assert got.keys() == want.keys()
        for name, value in want.items():
            # A bias of the keys changes all scores of a softmax alike: its gradient is rounding.
            scale = 1 if name.endswith("k_proj.bias") else float(value.detach().abs().max())
            error = float((got[name] - value).detach().abs().max())
            assert error <= 2e-6 * scale, f"{name}: {error:.1e} of {scale:.1e}"
