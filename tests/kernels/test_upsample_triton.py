"""The Triton form of the upsampling against float64: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sam2fast_kernels.upsample import upsample
from sam2fast_kernels.upsample.op import ACTIVATIONS, upsample_backward, upsample_forward

pytest.importorskip("triton")
from sam2fast_kernels.upsample import triton as kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEMORY = {"activation": "sigmoid", "scale": 20.0, "bias": -10.0}
"""What the memory encoder takes."""


def random_logits(shape, dtype=torch.float32, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 4).to(DEVICE, dtype)


def result_and_gradient(logits, factor, backend="triton", **options):
    """The result, and the gradient of a weighted sum of it."""
    logits = logits.detach().requires_grad_()
    result = upsample(logits, factor, backend=backend, **options)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    return result.detach(), torch.autograd.grad(result, logits, weights.to(result))[0]


def assert_within_rule(kernel, eager, exact, atol):
    """The kernel may be twice as far from the float64 value as eager PyTorch in the same precision."""
    if DEVICE == "cpu" and kernel.dtype == torch.bfloat16:
        atol += 2**-8 * exact.abs().max()  # the interpreter truncates where a GPU rounds
    if DEVICE == "cuda":
        atol *= 1 + exact.abs().max()  # its exponentials and reciprocals are off by up to two units in the last place
    error = (kernel.double() - exact).abs().max()
    allowed = 2 * (eager.double() - exact).abs().max() + atol
    assert torch.isfinite(kernel).all()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def check(logits, factor, dtype=torch.float32, **options):
    got = result_and_gradient(logits, factor, dtype=dtype, **options)
    eager = result_and_gradient(logits, factor, "reference", dtype=dtype, **options)
    exact = result_and_gradient(logits.double(), factor, "reference", **options)
    assert got[0].dtype == dtype and got[0].is_contiguous() and got[0].shape == exact[0].shape
    assert got[1].dtype == logits.dtype and got[1].is_contiguous()
    # A rounding of the largest logit, as a difference of two of them has it, through the steepest slope.
    steepest = options.get("scale", 1.0) * (0.25 if options.get("activation") == "sigmoid" else 1.0)
    atol = 2**-23 * logits.abs().max().item() * steepest + 1e-6
    for kernel, by_eager, by_exact in zip(got, eager, exact, strict=True):
        assert_within_rule(kernel, by_eager, by_exact, atol)


@pytest.mark.parametrize("activation", ["none", "sigmoid"])
@pytest.mark.parametrize("factor", [1, 2, 3, 4, 8, 9])
def test_factors_agree_with_float64(factor, activation, poison_empty):
    check(random_logits((2, 2, 3, 5)), factor, activation=activation, scale=20.0, bias=-10.0)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 1, 37, 1), (1, 2, 1, 40), (1, 1, 2, 1021)])
def test_sizes_of_programs(shape, poison_empty):
    """Several strips of rows, programs with idle lanes, several tiles of columns (256 forward, 510 backward)."""
    check(random_logits(shape), 2, **MEMORY)


def test_a_factor_that_leaves_few_lanes(monkeypatch, poison_empty):
    monkeypatch.setattr(kernels, "TILE", 32)
    check(random_logits((1, 1, 2, 9)), 5, **MEMORY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, poison_empty):
    check(random_logits((1, 2, 3, 5)), 4, dtype, **MEMORY)
    check(random_logits((1, 2, 3, 5), dtype), 4, **MEMORY)
    check(random_logits((1, 2, 3, 5), dtype), 4, dtype)


def test_above_zero(poison_empty):
    logits = random_logits((2, 1, 5, 4))
    result, gradient = result_and_gradient(logits, 4, activation="binary", scale=3.0, bias=-1.0)
    full = F.interpolate(logits, scale_factor=4, mode="bilinear")
    assert torch.equal(result, torch.where(full > 0, 2.0, -1.0)) and not gradient.any()


@pytest.mark.parametrize("value", [1e4, -1e4, -1024.0, 0.0])
def test_saturated_logits(value):
    logits = torch.full((1, 1, 3, 3), value, device=DEVICE)
    logits[0, 0, 1, 1] = -value
    check(logits, 2, **MEMORY)


def test_strides_change_nothing():
    logits = random_logits((2, 2, 3, 4))
    result, gradient = result_and_gradient(logits, 4, **MEMORY)
    for other in (F.pad(logits, (1, 0))[..., 1:], logits.transpose(0, 3).contiguous().transpose(0, 3)):
        assert not other.is_contiguous()
        assert all(
            torch.equal(*pair) for pair in zip(result_and_gradient(other, 4, **MEMORY), (result, gradient), strict=True)
        )
    grad = random_logits(result.shape)
    run = upsample_backward.overloads["triton"]
    want = run(grad, logits, 4, 1, 20.0)
    assert torch.equal(run(grad.transpose(2, 3).contiguous().transpose(2, 3), logits, 4, 1, 20.0), want)
    expanded = torch.ones((), device=DEVICE).expand(grad.shape)
    assert torch.equal(run(expanded, logits, 4, 1, 20.0), run(expanded.contiguous(), logits, 4, 1, 20.0))


def test_gradients_do_not_depend_on_the_rows_of_a_program(monkeypatch):
    logits, grad = random_logits((1, 1, 7, 3)), random_logits((1, 1, 14, 6))
    gradients = []
    for rows in (1, 2, 4, 32):
        monkeypatch.setattr(kernels, "gradient_rows", lambda programs, height, rows=rows: rows)
        gradients.append(upsample_backward.overloads["triton"](grad, logits, 2, 1, 1.0))
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])


def test_not_a_number_stays_where_it_is():
    logits = torch.zeros(1, 1, 5, 5, device=DEVICE)
    logits[0, 0, 2, 2] = torch.nan
    result, gradient = result_and_gradient(logits, 4, **MEMORY)
    assert result[0, 0, 6:14, 6:14].isnan().all() and result.isnan().sum() == 64
    assert gradient[0, 0, 1:4, 1:4].isnan().all() and gradient.isnan().sum() == 9


@pytest.mark.parametrize("shape", [(0, 3, 2, 3), (2, 0, 2, 3)])
def test_no_objects(shape):
    result, gradient = result_and_gradient(torch.zeros(shape, device=DEVICE), 4, **MEMORY)
    assert result.shape == (*shape[:2], 8, 12) and gradient.shape == shape


@pytest.mark.parametrize("n, m", [(3, 1), (1, 3)])
def test_addresses_beyond_two_to_the_31(n, m):
    """Masks 2^30 elements from each other; the memory between them is never touched."""
    far = 2**30 + 8
    logits = random_logits((n, m, 2, 4), torch.bfloat16)
    memory = torch.empty(2 * far + 8, dtype=torch.bfloat16, device=DEVICE)
    distant = memory.as_strided(logits.shape, (far, far, 4, 1)).copy_(logits)
    for pair in zip(result_and_gradient(distant, 2, **MEMORY), result_and_gradient(logits, 2, **MEMORY), strict=True):
        assert torch.equal(*pair)


@pytest.mark.parametrize("activation", range(3))
def test_operators_pass_opcheck(activation):
    logits = random_logits((1, 1, 2, 3)).requires_grad_()
    torch.library.opcheck(upsample_forward.overloads["triton"], (logits, 2, activation, 2.0, 1.0, torch.bfloat16))
    arguments = (random_logits((1, 1, 4, 6), torch.bfloat16), logits.detach(), 2, activation, 2.0)
    torch.library.opcheck(upsample_backward.overloads["triton"], arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_image_batch_on_the_gpu(activation, dtype):
    """64 masks: right, equal in every run, and more than 2^31 elements in one result."""
    options = {"activation": activation, "scale": 20.0, "bias": -10.0}
    logits = random_logits((64, 1, 256, 256), dtype)
    check(logits[:4], 4, dtype, **options)
    result, gradient = result_and_gradient(logits, 4, dtype=dtype, **options)
    again, again_gradient = result_and_gradient(logits, 4, dtype=dtype, **options)
    assert torch.equal(result, again) and torch.equal(gradient, again_gradient)
    many = logits.repeat(33, 1, 1, 1)
    large = upsample(many, 4, dtype=torch.bfloat16, backend="triton", **options)
    assert large.numel() > 2**31
    assert torch.equal(large[-64:], upsample(logits, 4, dtype=torch.bfloat16, backend="triton", **options))
