"""The fused upsampling: every back end against float64, gradients, roundings, the operator's contract."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sam2fast_kernels import library
from sam2fast_kernels.upsample import upsample
from sam2fast_kernels.upsample.op import upsample_backward, upsample_forward

needs_cpp = pytest.mark.skipif(not library.load_native(), reason="the compiled operators are not built")
BACKENDS = [pytest.param("cpp", marks=needs_cpp), "reference"]
ACTIVATIONS = ["none", "sigmoid", "binary"]
SHAPES = [(2, 3, 7, 9), (1, 1, 37, 1), (2, 1, 1, 5), (1, 2, 70, 33)]
"""The last has three bands of rows, and rows longer than a vector."""
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
MEMORY = {"activation": "sigmoid", "scale": 20.0, "bias": -10.0}
"""What the memory encoder takes."""


def random_logits(shape, dtype=torch.float32, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 4).to(dtype)


def result_and_gradient(logits, factor, **options):
    """The result, and the gradient of a weighted sum of it."""
    logits = logits.detach().requires_grad_()
    result = upsample(logits, factor, **options)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    return result.detach(), torch.autograd.grad(result, logits, weights.to(result.dtype))[0]


def assert_within_rule(kernel, eager, exact, atol):
    """The kernel may be twice as far from the float64 value as eager PyTorch in the same precision."""
    error = (kernel.double() - exact).abs().max()
    allowed = 2 * (eager.double() - exact).abs().max() + atol
    assert torch.isfinite(kernel).all()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def check(logits, factor, backend, dtype=torch.float32, activation="none", scale=1.0, bias=0.0):
    options = {"activation": activation, "scale": scale, "bias": bias}
    got, eager = (
        result_and_gradient(logits, factor, dtype=dtype, backend=b, **options) for b in (backend, "reference")
    )
    exact = result_and_gradient(logits.double(), factor, backend="reference", **options)
    assert got[0].dtype == dtype and got[0].is_contiguous() and got[0].shape == exact[0].shape
    assert got[1].dtype == logits.dtype
    # One rounding of the largest logit, through the steepest slope.
    atol = 2**-24 * logits.abs().max().item() * scale * (0.25 if activation == "sigmoid" else 1.0)
    for kernel, by_eager, by_exact in zip(got, eager, exact, strict=True):
        assert_within_rule(kernel, by_eager, by_exact, atol + 1e-6)
    return got


@pytest.mark.parametrize("activation", ["none", "sigmoid"])
@pytest.mark.parametrize("factor", [1, 2, 3, 4, 8])
@needs_cpp
def test_cpp_agrees_with_float64(factor, activation, poison_empty):
    for shape in SHAPES:
        check(random_logits(shape), factor, "cpp", activation=activation, scale=20.0, bias=-10.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_logits", DTYPES)
@needs_cpp
def test_cpp_in_every_precision(of_logits, dtype, poison_empty):
    check(random_logits((2, 2, 35, 9), of_logits), 4, "cpp", dtype, **MEMORY)
    check(random_logits((2, 2, 35, 9), of_logits), 2, "cpp", dtype, scale=0.5)


def test_reference_equals_the_definition():
    logits = random_logits((2, 3, 5, 7)).double().requires_grad_()
    full = F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)
    torch.testing.assert_close(upsample(logits, 4), full)
    torch.testing.assert_close(upsample(logits, 4, **MEMORY), full.sigmoid() * 20 - 10)
    assert torch.equal(upsample(logits, 4, activation="binary", scale=3.0, bias=1.0), 1 + 3 * (full > 0).double())
    few = logits.detach()[:1, :2, :3, :4].requires_grad_()  # inside, on edges and in corners
    for activation in ("none", "sigmoid"):
        assert torch.autograd.gradcheck(lambda x, a=activation: upsample(x, 3, activation=a, scale=2.0, bias=1.0), few)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [1, 3, 4])
def test_binary_is_the_sign_of_the_upsampled_logit(factor, backend, poison_empty):
    logits = random_logits((2, 3, 35, 9))
    logits[:, :, ::4] = 0.0
    logits[0, 0] = 0.0
    options = {"activation": "binary", "scale": 20.0, "bias": -10.0}
    inside = upsample(logits, factor, backend=backend) > 0
    for dtype in DTYPES:
        result, gradient = result_and_gradient(logits, factor, dtype=dtype, backend=backend, **options)
        assert torch.equal(result, torch.where(inside, 10.0, -10.0).to(dtype))
        assert not gradient.any()
    assert inside.any() and not inside[0, 0].any()


@pytest.mark.parametrize("activation", ["none", "sigmoid"])
@needs_cpp
def test_any_strides(activation, poison_empty):
    """Of the logits, and of the gradient that comes in."""
    logits = random_logits((3, 2, 33, 18))
    for dtype in DTYPES:
        base = logits.to(dtype)
        strided = [
            base.transpose(2, 3).contiguous().transpose(2, 3),
            base.to(memory_format=torch.channels_last),
            base.repeat_interleave(2, dim=3)[..., ::2],
            base[:, :1].expand(3, 2, 33, 18),
            base[:1, :1, :1, :1].expand(3, 2, 33, 18),
        ]
        for view in strided:
            result, gradient = result_and_gradient(view, 4, activation=activation, dtype=dtype, backend="cpp")
            assert not view.is_contiguous()
            want, want_gradient = result_and_gradient(
                view.contiguous(), 4, activation=activation, dtype=dtype, backend="cpp"
            )
            assert torch.equal(result, want) and torch.equal(gradient, want_gradient)
            back = upsample_backward.overloads["cpp"]
            code = ACTIVATIONS.index(activation)
            assert torch.equal(
                back(view, logits[..., ::3, ::3], 3, code, 2.0),
                back(view.contiguous(), logits[..., ::3, ::3], 3, code, 2.0),
            )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_saturated_logits(dtype, backend, poison_empty):
    """Absent objects have -1024 everywhere: exactly the background, and exactly no gradient."""
    logits = torch.tensor([-1024.0, 1e4, -1e4]).view(3, 1, 1, 1).expand(3, 1, 9, 5)
    result, gradient = result_and_gradient(logits, 4, dtype=dtype, backend=backend, **MEMORY)
    assert [plane.unique().tolist() for plane in result] == [[-10.0], [10.0], [-10.0]]
    assert not gradient.any()
    mixed = random_logits((2, 2, 35, 9))
    mixed.view(-1)[::3], mixed.view(-1)[::7], mixed.view(-1)[::11] = -1024.0, 1e4, -1e4
    for factor in (1, 3, 4):
        check(mixed, factor, backend, dtype, **MEMORY)
        check(mixed, factor, backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_read_and_rounded_as_torch_does(backend, poison_empty):
    """All values of both formats; float32 of every exponent on, between and next to the middle of two such values."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(1, 1, 256, 256)
    high = torch.arange(0, 2**32, 2**12).view(-1, 1)
    bits = (high + torch.tensor([0, 1, 2**11, 2**12 - 1])).view(1, 1, 2048, 2048)
    numbers = torch.where(bits >= 2**31, bits - 2**32, bits).int().view(torch.float32)
    # The difference of two neighbors must not overflow.
    numbers = torch.where(numbers.abs() < 1e38, numbers, 0.0)
    for dtype in HALVES:
        values = patterns.view(dtype)
        values = torch.where(values.isfinite(), values, 0.0)
        values = torch.where(values.abs() < 1e38, values, 0.0)
        assert torch.equal(upsample(values, 1, backend=backend), values.float())
        assert torch.equal(upsample(numbers, 1, dtype=dtype, backend=backend), numbers.to(dtype))
        largest = torch.full((1, 1, 3, 3), torch.finfo(torch.float32).max)
        assert (upsample(largest, 1, dtype=dtype, backend=backend) == torch.inf).all()


@pytest.mark.parametrize("dtype", HALVES)
@needs_cpp
def test_factor_one_leaves_every_value_alone(dtype, poison_empty):
    """Also where one that is not finite has neighbors that are."""
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1, 256, 256)
    result = upsample(values, 1, backend="cpp")
    torch.testing.assert_close(result, values.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_where_it_is(backend):
    logits = torch.zeros(2, 1, 9, 9)
    logits[0, 0, 4, 4] = torch.nan
    for dtype in DTYPES:
        result, gradient = result_and_gradient(logits, 4, dtype=dtype, backend=backend, **MEMORY)
        assert result[0, 0, 14:22, 14:22].isnan().all() and result.isnan().sum() == 64
        assert gradient[0, 0, 3:6, 3:6].isnan().all() and gradient.isnan().sum() == 9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5)])
def test_no_objects(shape, backend):
    result, gradient = result_and_gradient(torch.zeros(shape), 4, backend=backend, **MEMORY)
    assert result.shape == (*shape[:2], 16, 20) and gradient.shape == shape


@needs_cpp
def test_threads_do_not_change_the_result():
    before = torch.get_num_threads()
    outputs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs.append(result_and_gradient(random_logits((3, 1, 70, 20)), 4, backend="cpp", **MEMORY))
    finally:
        torch.set_num_threads(before)
    for result, gradient in outputs[1:]:
        assert torch.equal(result, outputs[0][0]) and torch.equal(gradient, outputs[0][1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_logits_are_kept_for_the_backward_pass(backend):
    logits = random_logits((2, 1, 8, 8)).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()) or tensor, lambda x: x):
        upsample(logits, 4, backend=backend, **MEMORY)
    assert kept == [logits.data_ptr()]


def test_float64():
    logits = random_logits((1, 2, 5, 4))
    assert upsample(logits.double(), 2).dtype == torch.float64
    assert upsample(logits.double(), 2, dtype=torch.float32).dtype == torch.float32
    result, gradient = result_and_gradient(logits, 2, dtype=torch.float64, **MEMORY)
    want, want_gradient = result_and_gradient(logits.double(), 2, backend="reference", **MEMORY)
    assert torch.equal(result, want) and torch.equal(gradient, want_gradient.float())
    with pytest.raises(ValueError, match="'cpp' of sam2fast::upsample takes bfloat16, float16, float32, not float64"):
        upsample(logits, 2, dtype=torch.float64, backend="cpp")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": torch.zeros(1, 4, 4)}, r"logits must be .*, not torch.float32 \[1, 4, 4\]"),
        ({"logits": torch.zeros(1, 1, 4, 4, dtype=torch.int64)}, "logits must be .*, not torch.int64"),
        ({"logits": torch.zeros(1, 1, 0, 4)}, "with h, w >= 1"),
        ({"factor": 0}, "factor must be a whole number of at least 1, not 0"),
        ({"factor": 2.0}, "factor must be a whole number of at least 1, not 2.0"),
        ({"factor": True}, "factor must be .*, not True"),
        ({"activation": "tanh"}, "activation must be one of none, sigmoid, binary, not 'tanh'"),
        ({"scale": float("nan")}, "scale and bias must be finite, not nan and 0.0"),
        ({"bias": float("inf")}, "scale and bias must be finite, not 1.0 and inf"),
        ({"dtype": torch.int8}, "dtype must be float32, bfloat16, float16 or float64, not torch.int8"),
        ({"backend": "cuda"}, "unknown back end 'cuda'"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        upsample(**({"logits": torch.zeros(1, 1, 4, 4), "factor": 2} | change))


@needs_cpp
def test_the_compiled_operator_does_not_read_beyond_its_arguments():
    logits, grad = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 8, 8)
    forward, backward = upsample_forward.overloads["cpp"], upsample_backward.overloads["cpp"]
    assert backward(grad, logits, 2, 1, 1.0).shape == logits.shape
    for call in (
        lambda: forward(logits[0], 2, 1, 1.0, 0.0, torch.float32),
        lambda: forward(logits.double(), 2, 1, 1.0, 0.0, torch.float32),
        lambda: forward(logits, 0, 1, 1.0, 0.0, torch.float32),
        lambda: forward(logits, 2, 3, 1.0, 0.0, torch.float32),
        lambda: forward(logits, 2, 1, 1.0, 0.0, torch.float64),
        lambda: backward(grad[:1], logits, 2, 1, 1.0),
        lambda: backward(grad[..., 1:], logits, 2, 1, 1.0),
        lambda: backward(grad.double(), logits, 2, 1, 1.0),
        lambda: backward(grad, logits, 4, 1, 1.0),
    ):
        with pytest.raises(RuntimeError, match="upsample"):
            call()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", range(3))
def test_operators_pass_opcheck(activation, backend):
    for logits in (random_logits((2, 1, 5, 4)), random_logits((2, 1, 4, 5), torch.bfloat16).transpose(2, 3)):
        arguments = (logits.requires_grad_(), 2, activation, 20.0, -10.0, torch.bfloat16)
        torch.library.opcheck(upsample_forward.overloads[backend], arguments)
        grad = random_logits((2, 1, 10, 8), torch.bfloat16)
        torch.library.opcheck(upsample_backward.overloads[backend], (grad, logits.detach(), 2, activation, 20.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_and_runs_under_autocast(backend):
    def loss(logits):
        return upsample(logits, 4, dtype=torch.bfloat16, backend=backend, **MEMORY).float().square().mean()

    gradients = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        logits = random_logits((2, 1, 9, 8)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            value = run(logits)
        value.backward()
        assert value.dtype == torch.float32
        gradients.append(logits.grad)
    assert torch.equal(*gradients) and gradients[0].any()


def test_fake_tensors_and_arithmetic():
    with FakeTensorMode():
        fake = upsample(torch.empty(2, 1, 9, 8), 4, dtype=torch.bfloat16, **MEMORY)
        assert fake.shape == (2, 1, 36, 32) and fake.dtype == torch.bfloat16 and fake.is_contiguous()
    logits = random_logits((2, 1, 9, 8)).requires_grad_()
    library.register_flop_formulas()
    with FlopCounterMode(display=False) as counter:
        upsample(logits, 4, **MEMORY).sum().backward()
    assert counter.get_total_flops() == (28 + 32) * 2 * 36 * 32
