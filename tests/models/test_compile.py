"""A compiled model computes the same, and is compiled no more once it has seen the kinds of batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from sam2fast.data.sample import Batch
from sam2fast.models.architecture import architecture
from sam2fast.models.plan import RolloutPlan
from sam2fast.models.sam2 import SAM2
from sam2fast_kernels import library

SIZE, FRAMES = 64, 5
CLICKS = ((False,) * 2,)
KINDS = {
    "mask": RolloutPlan(FRAMES, "mask", (0,)),
    "points": RolloutPlan(FRAMES, "point", (0, 2), (0, 2), (False, False), CLICKS * 2),
    "image": RolloutPlan(1, "point", (0,), (0,), (False,), CLICKS),
}
obstacle = library.compile_obstacle(torch.device("cpu"))
pytestmark = pytest.mark.skipif(obstacle is not None, reason=f"torch.compile {obstacle}")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    limit = torch._dynamo.config.recompile_limit
    yield
    torch._dynamo.config.recompile_limit = limit
    torch.compiler.reset()


def build(backend: str | None, recompute: str = "decoder", rate: float = 0.0) -> SAM2:
    torch.manual_seed(0)
    model = SAM2(architecture("micro", image_size=SIZE, drop_path=rate, memory_dropout=rate), recompute=recompute)
    torch.nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 3.0)
    if backend:
        model.compile_regions(backend)
    return model.train()


def batch(frames: int, objects: int) -> Batch:
    generator = torch.Generator().manual_seed(frames)
    images = torch.randn(1, frames, 3, SIZE, SIZE, generator=generator)
    masks = torch.zeros(frames, objects, SIZE, SIZE, dtype=torch.bool)
    for index in range(objects):
        masks[:, index, 10 * index : 10 * index + 20, 10:40] = True
    return Batch(images, masks, torch.zeros(objects, dtype=torch.long), ["squares"])


def step(model: SAM2, kind: str, objects: int = 2) -> dict[str, Tensor]:
    """Gradients of one step, and all logits."""
    torch.manual_seed(1)
    output = model(batch(KINDS[kind].num_frames, objects), KINDS[kind])
    logits = torch.cat([one.low_res[:, :1].flatten() for frame in output.frames for one in frame.steps])
    model.zero_grad()
    logits.clamp(min=-30).sigmoid().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach()} | grads


def test_a_compiled_step_is_the_same():
    """Traced, split into forward and backward pass and traced again to recompute; no code is generated."""
    recompute = "decoder+trunk+memory"
    plain, compiled = build(None, recompute), build("aot_eager", recompute)
    want, found = step(plain, "points"), step(compiled, "points")
    assert counters["stats"]["unique_graphs"] > 5 and not counters["graph_break"]
    assert found.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-4 * max(1.0, value.abs().max().item()))


def test_generated_code_computes_the_same():
    encoder = build(None).memory_encoder
    features, mask = torch.randn(2, 256, 4, 4), torch.rand(2, 1, SIZE, SIZE)
    want = encoder(features, mask)
    encoder.compile()  # with inductor, as compile_regions does
    torch.testing.assert_close(encoder(features, mask), want, rtol=1e-4, atol=1e-5)


def test_nothing_is_compiled_after_the_first_pass_over_the_kinds_of_batches():
    model = build("aot_eager", rate=0.1)
    for kind, objects in (("mask", 2), ("points", 3), ("image", 2), ("mask", 4)):
        step(model, kind, objects)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled > 5 and not counters["graph_break"]
    for kind, objects in (("points", 2), ("mask", 3), ("image", 5), ("points", 5), ("mask", 2)):
        step(model, kind, objects)
    assert counters["stats"]["unique_graphs"] == compiled


def test_without_a_compiler_training_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    assert library.compile_obstacle(torch.device("cpu")) == "needs a C++ compiler: install g++"
