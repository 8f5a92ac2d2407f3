from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from sam2fast.telemetry.meters import Meters


def scalars(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


def test_means_are_over_the_updates_that_brought_a_term():
    meters = Meters()
    meters.update(scalars(loss=1.0, dice=10.0))
    meters.update(scalars(loss=2.0))
    meters.update(scalars(dice=20.0, loss=6.0))
    assert meters.compute() == {"loss": 3.0, "dice": 15.0}


def test_reset_starts_anew():
    meters = Meters()
    meters.update(scalars(loss=1.0))
    meters.reset()
    assert meters.compute() == {}
    meters.update({})
    meters.update(scalars(loss=5.0))
    assert meters.compute() == {"loss": 5.0}
    assert meters.compute() == {"loss": 5.0}


def test_values_that_are_not_finite_are_left_out():
    meters = Meters()
    for value in (1.0, math.nan, 3.0, math.inf):
        meters.update(scalars(loss=value, broken=math.nan))
    means = meters.compute()
    assert means["loss"] == 2.0
    assert math.isnan(means["broken"])


def test_means_over_ranks_weigh_every_update_alike():
    ranks = [Meters(), Meters()]
    for value in (1.0, 2.0, 3.0):
        ranks[0].update(scalars(loss=value))
    ranks[1].update(scalars(loss=8.0))
    parts = []
    ranks[1].compute(reduce=lambda totals: parts.append(totals.clone()) or totals)
    assert ranks[0].compute(reduce=lambda totals: totals + parts[0]) == {"loss": 3.5}


def test_updates_do_not_hold_the_graph():
    class Activation:
        pass

    class KeepActivation(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, activation):
            ctx.activation = activation
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2, None

    meters, activation = Meters(), Activation()
    alive = weakref.ref(activation)
    meters.update({"loss": KeepActivation.apply(torch.ones((), requires_grad=True), activation)})
    del activation
    assert alive() is None
    assert meters.compute() == {"loss": 2.0}


def test_terms_of_any_precision_are_summed_in_float64():
    meters = Meters()
    for _ in range(1000):
        meters.update({"loss": torch.tensor(0.1).bfloat16(), "norm": torch.tensor(0.1, dtype=torch.float64)})
    means = meters.compute()
    assert means["loss"] == pytest.approx(0.1, rel=1e-2)
    assert means["norm"] == pytest.approx(0.1, rel=1e-12)


def test_only_compute_reads_the_device():
    meters = Meters()
    with FakeTensorMode():  # reading the value of its tensors raises
        for _ in range(3):
            meters.update({"loss": torch.ones(()), "dice": torch.ones(())})
        with pytest.raises(DataDependentOutputException):
            meters.compute()


def test_compute_reads_the_device_once(monkeypatch):
    meters = Meters()
    meters.update(scalars(loss=1.0, dice=10.0))
    meters.update(scalars(loss=1.0))
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self) or tolist(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("item() waits for the device"))
    meters.compute()
    assert len(reads) == 1
