"""Gradients that are averaged while the backward pass goes on. The other ranks are played: a sum over them is a
product with their number, in place."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sam2fast.config import LossConfig
from sam2fast.data.sample import Batch
from sam2fast.losses import SegmentationLoss
from sam2fast.models.architecture import architecture
from sam2fast.models.plan import RolloutPlan
from sam2fast.models.sam2 import SAM2
from sam2fast.parallel.buckets import GradientBuckets

WORLD = 2


class Network:
    """Stands in for the process group and keeps a list of what happens."""

    class Work:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

        def wait(self) -> None:
            self.tensor *= WORLD

    def __init__(self) -> None:
        self.events: list[str | int] = []

    def all_reduce(self, tensor: Tensor, async_op: bool = False) -> Work:
        assert async_op
        self.events.append(len(tensor))
        return self.Work(tensor)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    fake = Network()
    monkeypatch.setattr(dist, "all_reduce", fake.all_reduce)
    return fake


class Net(nn.Module):
    """Layers of 32, 64, 96 and 128 parameters, so that a bucket of one is known by its size; the third is optional."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, 32, bias=False) for width in (1, 2, 3, 4))

    def forward(self, optional: bool) -> Tensor:
        total = torch.zeros(32)
        for index, layer in enumerate(self.layers):
            if optional or index != 2:
                total = layer(total.cumsum(0)[: layer.in_features] + 1)
        return total.square().sum()


def step(net: Net, buckets: GradientBuckets, network: Network, *micros: bool) -> None:
    network.events.clear()
    for number, optional in enumerate(micros):
        buckets.begin(last=number == len(micros) - 1)
        net(optional).backward()
    network.events.append("end of backward")
    buckets.finish()


def expected(net: Net, *micros: bool) -> list[Tensor | None]:
    grads = [torch.autograd.grad(net(kind), list(net.parameters()), allow_unused=True) for kind in micros]
    found = [[grad for grad in row if grad is not None] for row in zip(*grads, strict=True)]
    return [sum(row) if row else None for row in found]


def test_buckets_leave_in_one_order_while_the_backward_pass_goes_on(network: Network) -> None:
    net = Net()
    buckets = GradientBuckets(net.parameters(), WORLD, bucket_bytes=1)
    step(net, buckets, network, True, True)  # the first micro-step sends nothing
    assert network.events == [128, 96, 64, 32, "end of backward"]
    for param, grad in zip(net.parameters(), expected(net, True, True), strict=True):
        torch.testing.assert_close(param.grad, grad)


@pytest.mark.parametrize("fill", [True, False])
def test_what_a_step_does_not_reach_holds_back_the_rest_once(network: Network, fill: bool) -> None:
    net = Net()
    buckets = GradientBuckets(net.parameters(), WORLD, fill_missing=fill, bucket_bytes=1)
    for events, micros in (
        ([128, "end of backward", 64, 32], [False]),
        ([128, 64, 32, "end of backward"], [False]),
        ([128, 64, 32, 96, "end of backward"], [True]),
        ([128, 64, 32, "end of backward", 96], [True, False]),
        ([128, 64, 32, "end of backward"], [False]),
    ):
        step(net, buckets, network, *micros)
        assert network.events == events
        for param, grad in zip(net.parameters(), expected(net, *micros), strict=True):
            if grad is None and not fill:
                assert param.grad is None
            else:
                torch.testing.assert_close(param.grad, torch.zeros_like(param) if grad is None else grad)
        buckets.reset()


def test_a_run_that_continues_adds_up_in_the_same_order(network: Network) -> None:
    net = Net()
    buckets = GradientBuckets(net.parameters(), WORLD, bucket_bytes=1)
    step(net, buckets, network, False)
    buckets.reset()
    missing = sorted(buckets.optional)
    buckets.close()
    continued = GradientBuckets(net.parameters(), WORLD, bucket_bytes=1)
    continued.expect_missing(missing)
    step(net, continued, network, True)
    assert network.events == [128, 64, 32, 96, "end of backward"]
    for param, grad in zip(net.parameters(), expected(net, True), strict=True):
        torch.testing.assert_close(param.grad, grad)


def test_gradients_from_elsewhere_are_averaged_too(network: Network) -> None:
    net = Net()
    buckets = GradientBuckets(net.parameters(), WORLD, fill_missing=False)
    grads = expected(net, False)
    for param, grad in zip(net.parameters(), grads, strict=True):
        param.grad = None if grad is None else grad.clone()
    buckets.finish()
    for param, grad in zip(net.parameters(), grads, strict=True):
        assert (param.grad is None) == (grad is None) and (grad is None or torch.equal(param.grad, grad))


def test_bfloat16_sends_half_the_bytes(network: Network) -> None:
    net = Net()
    buckets = GradientBuckets(net.parameters(), WORLD, dtype=torch.bfloat16)
    step(net, buckets, network, True)
    for param, grad in zip(net.parameters(), expected(net, True), strict=True):
        assert param.grad.dtype == torch.float32 and torch.equal(param.grad, grad.bfloat16().float())


def test_a_gradient_that_grows_after_it_was_sent_is_an_error(network: Network) -> None:
    net = Net()
    buckets = GradientBuckets(net.parameters(), WORLD, bucket_bytes=1)
    buckets.begin(last=True)
    net(True).backward()
    with pytest.raises(RuntimeError, match="after it was sent"):
        net(True).backward()


def test_nothing_stays_behind_when_closed(network: Network) -> None:
    net = Net()
    buckets = GradientBuckets(net.parameters(), WORLD)
    step(net, buckets, network, True)
    buckets.close()
    assert all(param.grad is None for param in net.parameters())
    net(True).backward()
    for param, grad in zip(net.parameters(), expected(net, True), strict=True):
        assert torch.equal(param.grad, grad)


def test_gradients_of_sam2_leave_before_and_during_the_backward_pass_of_its_trunk(network: Network) -> None:
    """What is used after the trunk does not wait for the trunk's gradients."""
    torch.manual_seed(0)
    model = SAM2(architecture("micro", image_size=64, drop_path=0.0, memory_dropout=0.0)).train()
    params = dict(model.named_parameters())
    trunk = [name for name in params if "trunk" in name]
    buckets = GradientBuckets(params.values(), WORLD, bucket_bytes=1)  # one for each parameter
    before_trunk: list[int] = []
    for name in trunk:
        params[name].register_post_accumulate_grad_hook(lambda _: before_trunk.append(len(network.events)))
    masks = torch.zeros(2, 1, 64, 64, dtype=torch.bool)
    masks[..., 16:48, 16:48] = True
    clip = Batch(torch.randn(1, 2, 3, 64, 64), masks, torch.zeros(1, dtype=torch.long), ["square"])
    loss = SegmentationLoss(LossConfig())
    for _ in range(2):  # the first step finds what it does not reach
        network.events.clear()
        before_trunk.clear()
        buckets.begin(last=True)
        output = model(clip, RolloutPlan(2, "mask", (0,)))
        loss([frame.steps for frame in output.frames], masks, torch.ones(()))["total"].backward()
        sent = len(network.events)
        buckets.finish()
        buckets.reset()
    reached = len(params) - len(buckets.optional)
    assert sent == reached
    after_trunk = list(params)[list(params).index(trunk[-1]) + 1 :]  # and before it a few tokens, which leave last
    assert before_trunk[0] >= len(after_trunk) - len(buckets.optional) > 0.9 * (reached - len(trunk))
