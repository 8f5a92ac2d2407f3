"""Dropout without stored masks: every back end drops the same elements, and gradients match what was kept."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sam2fast_kernels import library
from sam2fast_kernels.dropout import draw_seeds, dropout_add, relu_dropout
from sam2fast_kernels.dropout.hash import random_bits
from sam2fast_kernels.dropout.op import dropout_add_forward, relu_dropout_forward

INTERPRETS = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = [
    pytest.param("cpp", marks=pytest.mark.skipif(not library.load_native(), reason="compiled operators not built")),
    pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETS, reason="needs the Triton interpreter")),
]
SEED = torch.tensor(2**62 + 987654321)


def values_and_gradients(run, inputs, upstream):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = run(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 37), (1, 1), (2, 1500), (0, 4)])
def test_back_ends_equal_the_reference(backend, dropout, dtype, shape, poison_empty):
    if backend == "triton" and dtype != torch.float32:
        pytest.skip("the interpreter cuts off instead of rounding")
    torch.manual_seed(0)
    x, residual, upstream = torch.randn(shape).to(dtype), torch.randn(shape), torch.randn(shape)
    runs = {
        "relu": (lambda x, b: relu_dropout(x, dropout, seed=SEED, backend=b), [x]),
        "add": (lambda r, x, b: dropout_add(r, x, dropout, seed=SEED, backend=b), [residual, x]),
    }
    for run, inputs in runs.values():
        got = values_and_gradients(lambda *args, run=run: run(*args, backend), inputs, upstream)
        want = values_and_gradients(lambda *args, run=run: run(*args, "reference"), inputs, upstream)
        for ours, theirs in zip(got, want, strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


def test_share_mean_and_gradient_of_the_reference():
    torch.manual_seed(0)
    x = torch.randn(400, 500, dtype=torch.float64)
    out, grad = values_and_gradients(lambda x: relu_dropout(x, 0.2, seed=SEED), [x], torch.ones_like(x))
    dropped = (out == 0) & (x > 0)
    assert abs(dropped.sum() / (x > 0).sum() - 0.2) < 0.01
    assert torch.equal(grad, torch.where(out > 0, 1.25, 0.0))
    torch.testing.assert_close(out[out > 0], 1.25 * x[out > 0])


def test_bits_look_random():
    bits = random_bits(torch.tensor(7), 512, 512)
    assert bits.min() >= 0 and bits.max() < 2**32
    uniform = bits.double() / 2**32
    assert abs(uniform.mean() - 0.5) < 3e-3
    for a, b in ((uniform[1:], uniform[:-1]), (uniform[:, 1:], uniform[:, :-1])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.01
    ones = torch.stack([(bits >> k & 1).double().mean() for k in range(32)])
    assert (ones - 0.5).abs().max() < 0.01
    assert not torch.equal(bits, random_bits(torch.tensor(8), 512, 512))


def test_seeds_come_from_the_global_generator():
    x = torch.ones(64, 64)
    torch.manual_seed(3)
    first, second = relu_dropout(x, 0.5), relu_dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(first, relu_dropout(x, 0.5)) and not torch.equal(first, second)


def test_seeds_of_one_draw_differ_and_are_aligned():
    torch.manual_seed(3)
    seeds = draw_seeds(5, torch.device("cpu"))
    assert len({seed.item() for seed in seeds}) == 5 and {seed.shape for seed in seeds} == {()}
    assert all((seed.data_ptr() - seeds[0].data_ptr()) % 16 == 0 for seed in seeds)
    torch.manual_seed(3)
    assert all(map(torch.equal, draw_seeds(5, torch.device("cpu")), seeds))


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5])
def test_impossible_probability(dropout):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        relu_dropout(torch.ones(2, 2), dropout)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"shape of x, \[2, 3\]"):
        dropout_add(torch.ones(2, 2), torch.ones(2, 3), 0.1)
    with pytest.raises(ValueError, match="floating point"):
        relu_dropout(torch.ones(2, dtype=torch.int64), 0.1)


@pytest.mark.parametrize("operator", [relu_dropout_forward, dropout_add_forward])
def test_contract_of_the_operators(operator):
    inputs = [torch.randn(4, 6, requires_grad=True) for _ in range(1 if operator is relu_dropout_forward else 2)]
    for name, overload in operator.overloads.items():
        if name != "triton" or INTERPRETS:
            torch.library.opcheck(overload, (*inputs, 0.25, SEED))


def test_compiles_as_one_graph_and_on_fake_tensors():
    x = torch.randn(8, 16)
    compiled = torch.compile(lambda x: dropout_add(x, relu_dropout(x, 0.5, seed=SEED), 0.5, seed=SEED), fullgraph=True)
    assert torch.equal(compiled(x), dropout_add(x, relu_dropout(x, 0.5, seed=SEED), 0.5, seed=SEED))
    with FakeTensorMode():
        assert relu_dropout(torch.empty(3, 5, dtype=torch.bfloat16), 0.1).dtype == torch.bfloat16
