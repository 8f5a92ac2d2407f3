"""Recorded micro-steps: what is recorded and kept, and that every optimizer step is that of the eager engine.

Without a GPU a recording is a function that does the work again on the same static tensors. What a real one needs more,
that nothing else but those tensors changes from one replay to the next, is tested on a GPU in
tests/train/test_graphed_training.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sam2fast.config import Config, ConfigError, OptimConfig, UserError
from sam2fast.parallel import GraphedSteps, Ranks
from sam2fast.parallel.cuda_graphs import check_config
from sam2fast.parallel.ddp import TorchEngine

CPU = torch.device("cpu")


class Net(nn.Module):
    """Has a part that only one kind of batch reaches, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.GELU(), nn.Linear(16, 4))
        self.memory = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor, video: bool) -> Tensor:
        y = self.trunk(x)
        return self.memory(y) if video else y


class Rerun:
    """Stands in for CUDA graphs: a replay does the work again."""

    def __init__(self) -> None:
        self.recorded = 0
        self.full_at = 1000

    def __call__(self, work):
        self.recorded += 1
        return work

    def crowded(self) -> bool:
        return self.recorded >= self.full_at


def build(missing: str = "zero") -> TorchEngine:
    net = Net()
    groups = [{"params": list(net.parameters()), "lr": 1e-2, "base_lr": 1e-2, "weight_decay": 0.1}]
    return TorchEngine(OptimConfig(clip=1.0, missing_grad=missing), Ranks(0, 1, 0, CPU), net, groups, "float32")


def graphed(engine: TorchEngine, **options) -> tuple[GraphedSteps, Rerun]:
    def compute(kind, inputs):
        loss = engine.forward(inputs["x"], kind == "video").square().sum() / inputs["normalizer"]
        return {"half": loss.detach() / 2, "total": loss}

    rerun = Rerun()
    return GraphedSteps(engine, compute, rerun, **options), rerun


def inputs(step: int, rows: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"x": torch.randn(rows, 8, generator=generator), "normalizer": torch.tensor(float(step + 1))}


STEPS = [
    [("image", 6)],
    [("image", 6), ("image", 6)],
    [("video", 6), ("image", 6)],
    [("video", 6)],
    [("image", 6), ("video", 6)],
    [("video", 4)],
    [("video", 6), ("video", 4), ("video", 4)],
    [("image", 6)],
]
"""Micro-steps of each optimizer step: kind of batch, and rows."""


@pytest.mark.parametrize("missing", ["zero", "skip"])
def test_steps_are_those_of_the_eager_engine_bit_for_bit(missing):
    eager, engine = build(missing), build(missing)
    graphs, rerun = graphed(engine)
    for number, micros in enumerate(STEPS):
        for micro, (kind, rows) in enumerate(micros):
            boundary, given = micro == len(micros) - 1, inputs(10 * number + micro, rows)
            torch.manual_seed(10 * number + micro)  # of dropout
            loss = eager.forward(given["x"], kind == "video").square().sum() / given["normalizer"]
            eager.backward(loss, boundary)
            torch.manual_seed(10 * number + micro)
            terms = graphs.run(kind, given, boundary)
            assert torch.equal(terms["total"], loss.detach()) and torch.equal(terms["half"], loss.detach() / 2)
        for mine, other in zip(engine.params, eager.params, strict=True):
            assert (mine.grad is None) == (other.grad is None)
        want, found = eager.step(1.0), engine.step(1.0)
        assert torch.equal(found.grad_norm, want.grad_norm)
        for name, value in eager.module.state_dict().items():
            assert torch.equal(engine.module.state_dict()[name], value), (number, name)
    assert rerun.recorded == 3  # image, and video of both sizes
    assert graphs.replayed_share() == pytest.approx(7 / 13)  # each kind ran twice before
    assert graphs.replayed_share() == 0


def test_loss_terms_outlive_the_next_replay():
    graphs, _ = graphed(build())
    terms = [graphs.run("image", inputs(step), boundary=True)["total"] for step in range(4)]
    assert len({value.item() for value in terms}) == 4


def test_the_least_recently_used_recordings_are_dropped():
    graphs, rerun = graphed(build(), limit=2)
    for kind in ("a", "a", "b", "b", "a", "c", "c"):  # c takes the place of b
        graphs.run(kind, inputs(0), boundary=True)
    assert rerun.recorded == 3
    for kind in ("a", "c"):
        graphs.run(kind, inputs(0), boundary=True)
    assert rerun.recorded == 3
    graphs.run("b", inputs(0), boundary=True)  # as if never seen
    assert rerun.recorded == 3
    graphs.run("b", inputs(0), boundary=True)
    assert rerun.recorded == 4


def test_recordings_make_room_for_an_eager_step():
    graphs, rerun = graphed(build())
    rerun.full_at = 2
    for kind in ("a", "a", "b", "b"):
        graphs.run(kind, inputs(0), boundary=True)
    graphs.replayed_share()
    for kind in ("b", "a"):  # the last one is kept whatever it takes
        graphs.run(kind, inputs(0), boundary=True)
    assert graphs.replayed_share() == 0.5


def test_a_step_that_cannot_be_recorded_is_an_error_with_its_remedy():
    graphs, rerun = graphed(build())

    def fail(work):
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs._capture = fail
    graphs.run("image", inputs(0), boundary=True)
    with pytest.raises(UserError, match=r"not permitted when stream is capturing; set model\.cuda_graphs=false"):
        graphs.run("image", inputs(0), boundary=True)


@pytest.mark.parametrize(
    "device, changes, recompute, message",
    [
        ("cpu", {}, "none", "needs a GPU, and this run is on the device 'cpu': set device=cuda"),
        ("cuda", {"engine": {"kind": "deepspeed"}}, "none", "set engine.kind=torch"),
        ("cuda", {"engine": {"zero_stage": 1}}, "none", "set engine.kind=torch"),
        ("cuda", {"precision": "float16"}, "none", "set precision=bfloat16"),
        ("cuda", {"model": {"offload_activations": True}}, "none", "set model.offload_activations=false"),
        ("cuda", {"model": {"performance": {"fused_dropout": False}}}, "memory", "fused_dropout=true"),
        ("cuda", {"model": {"performance": {"skip_dropped_paths": False}}}, "trunk", "skip_dropped_paths=true"),
        ("cuda", {}, "decoder+trunk+memory", None),
        ("cuda", {"precision": "bfloat16"}, "auto", None),
    ],
)
def test_what_does_not_go_with_graphs_is_refused(device, changes, recompute, message):
    data = {"datasets": {"d": {"root": "nowhere"}}}
    config = Config(name="x", data=data, stages=[{"name": "s", "steps": 1, "data": [{"dataset": "d"}]}], **changes)
    if message is None:
        check_config(config, recompute, torch.device(device))
        return
    with pytest.raises(ConfigError) as caught:
        check_config(config, recompute, torch.device(device))
    assert message in str(caught.value) and "set model.cuda_graphs=false" in str(caught.value)
