"""Layer norm, alone and with GELU, in every back end against float64."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F

from sam2fast_kernels.layer_norm import layer_norm, layer_norm_backward, normalize
from sam2fast_kernels.layer_norm.op import backward, forward

HAS_TRITON = importlib.util.find_spec("triton") is not None
RUNS_TRITON = HAS_TRITON and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(not RUNS_TRITON, reason="needs Triton"))]
EPS = 1e-6


def case(*shape, dtype=torch.float32, offset=3.0):
    """x, weight, bias, and the gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator).to(DEVICE) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], generator=generator).to(DEVICE) for _ in range(2))
    return (2 * x + offset).to(dtype), weight, bias, grad


def exact(x, weight, bias, grad, gelu):
    """Result and gradients in float64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    y = F.layer_norm(leaves[0], leaves[1].shape, *leaves[1:], EPS)
    y = F.gelu(y) if gelu else y
    return y.detach(), *torch.autograd.grad(y, leaves, grad.double())


def assert_near(found, want, tolerance):
    error = (found.double() - want).abs().max()
    assert error <= tolerance * want.abs().max().clamp(min=1), error


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (2, 5, 112), (130, 96), (7, 700)])
def test_agrees_with_float64(shape, backend, gelu, poison_empty):
    """Rows that fill no program, several programs, channels that are no power of two."""
    x, weight, bias, grad = case(*shape)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    y = layer_norm(*leaves, EPS, gelu=gelu, backend=backend)
    found = y.detach(), *torch.autograd.grad(y, leaves, grad)
    for mine, want in zip(found, exact(x, weight, bias, grad, gelu), strict=True):
        assert mine.shape == want.shape and mine.dtype == torch.float32
        assert_near(mine, want, 2e-5 if shape[-1] > 1 else 1e-2)  # the deviation of one channel is only epsilon


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, backend, gelu, poison_empty):
    x, weight, bias, grad = case(40, 112, dtype=dtype)
    y, mean, rstd = normalize(x, weight, bias, EPS, gelu=gelu, backend=backend)
    grads = layer_norm_backward(
        grad.to(dtype), x, weight, bias, EPS, gelu=gelu, statistics=(mean, rstd), backend=backend
    )
    assert y.dtype == grads[0].dtype == dtype
    assert all(value.dtype == torch.float32 for value in (mean, rstd, *grads[1:]))
    for found, want in zip((y, *grads), exact(x, weight, bias, grad.to(dtype), gelu), strict=True):
        assert_near(found, want, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_more_precise_than_rows(backend):
    x, weight, bias, grad = case(9, 64, dtype=torch.bfloat16)
    y = layer_norm(x, weight, bias, EPS, dtype=torch.float32, backend=backend)
    assert_near(y, exact(x, weight, bias, grad, False)[0], 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_dtype_of_the_result(backend):
    x, weight, bias, _ = case(9, 64)
    y = layer_norm(x, weight, bias, EPS, dtype=torch.float16, backend=backend)
    assert y.dtype == torch.float16
    assert torch.equal(y, layer_norm(x, weight, bias, EPS, backend=backend).half())


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_are_those_of_the_rows(backend):
    x, weight, bias, _ = case(9, 112)
    _, mean, rstd = normalize(x, weight, bias, EPS, backend=backend)
    torch.testing.assert_close(mean, x.mean(-1))
    torch.testing.assert_close(rstd, (x.var(-1, correction=0) + EPS).rsqrt())


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_deviations_beside_large_means(backend):
    x, weight, bias, _ = case(9, 112, offset=300.0)
    want = F.layer_norm(x.double(), weight.shape, weight.double(), bias.double(), EPS)
    assert_near(layer_norm(x, weight, bias, EPS, backend=backend), want, 1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_stays_in_its_row(backend):
    x, weight, bias, grad = case(9, 64)
    x[4, 3] = float("nan")
    y = layer_norm(x, weight, bias, EPS, backend=backend)
    grad_x, grad_weight, _ = layer_norm_backward(grad, x, weight, bias, EPS, backend=backend)
    assert y.isnan().any(1).nonzero().tolist() == grad_x.isnan().any(1).nonzero().tolist() == [[4]]
    assert grad_weight.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    x, weight, bias, grad = case(0, 64)
    assert layer_norm(x, weight, bias, EPS, backend=backend).shape == (0, 64)
    grad_x, *grads = layer_norm_backward(grad, x, weight, bias, EPS, backend=backend)
    assert grad_x.shape == (0, 64) and not any(value.any() for value in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_pass_opcheck(backend):
    x, weight, bias, grad = case(3, 8)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    torch.library.opcheck(forward.overloads[backend], (*leaves, EPS, True, torch.float32))
    y, mean, rstd = normalize(*(leaf.detach() for leaf in leaves), EPS, backend=backend)
    tensors = [leaf.detach() for leaf in leaves]
    torch.library.opcheck(backward.overloads[backend], (grad, tensors[0], mean, rstd, *tensors[1:], EPS, True))


@pytest.mark.parametrize("shapes", [((3, 4), (5,), (4,)), ((3, 4), (4,), (1,)), ((), (), ())])
def test_shapes_that_cannot_be(shapes):
    with pytest.raises(ValueError, match=r"\[\.\.\., C\], \[C\] and \[C\], not"):
        layer_norm(*(torch.zeros(shape) for shape in shapes), EPS)
