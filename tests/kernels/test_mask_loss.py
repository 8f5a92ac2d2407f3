"""The fused mask loss: every back end against float64, gradients, numerics, the operator's contract."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from sam2fast_kernels import library, pack_masks, unpack_masks
from sam2fast_kernels.mask_loss import MaskLoss, mask_loss
from sam2fast_kernels.mask_loss.op import mask_sums, mask_sums_backward

needs_cpp = pytest.mark.skipif(not library.load_native(), reason="the compiled operators are not built")
BACKENDS = [pytest.param("cpp", marks=needs_cpp), "reference"]
LOSSES = ("focal", "dice", "iou_loss")
FOCAL = [(2.0, 0.25), (0.0, None), (1.0, 0.0), (1.5, 0.9), (3.0, 1.0), (20.0, 0.25)]
"""gamma and alpha."""


def case(n=2, m=3, h=7, w=9, factor=4, dtype=torch.float32, scale=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(n, m, h, w, generator=generator) * scale).to(dtype)
    targets = torch.rand(n, h * factor, w * factor, generator=generator) < 0.4
    ious = torch.rand(n, m, generator=generator)
    weights = torch.randn(3, n, m, generator=generator)
    return logits, targets, ious, weights


def losses_and_gradients(logits, targets, ious, weights, **options):
    """All outputs, and the gradients of their weighted sum, with nothing taken from the graph of the caller."""
    logits, ious = logits.detach().requires_grad_(), ious.detach().requires_grad_()
    losses = mask_loss(logits, targets, ious, **options)
    total = sum(
        (getattr(losses, name) * weight.to(losses.focal)).sum() for name, weight in zip(LOSSES, weights, strict=True)
    )
    return losses, torch.autograd.grad(total, (logits, ious))


def assert_within_rule(kernel, eager, exact, atol=1e-6):
    """The kernel may be twice as far from the float64 value as eager PyTorch in the same precision."""
    error, allowed = (kernel.double() - exact).abs(), 2 * (eager.double() - exact).abs().max() + atol
    assert torch.isfinite(kernel).all()
    assert error.max() <= allowed, f"error {error.max():.3g}, allowed {allowed:.3g}"


def check(logits, targets, ious, weights, backend, **options):
    got, got_grads = losses_and_gradients(logits, targets, ious, weights, backend=backend, **options)
    eager, eager_grads = losses_and_gradients(logits, targets, ious, weights, backend="reference", **options)
    exact, exact_grads = losses_and_gradients(
        logits.double(), targets, ious.double(), weights, backend="reference", **options
    )
    for name in LOSSES:
        assert_within_rule(getattr(got, name), getattr(eager, name), getattr(exact, name))
    for name in ("intersection", "union", "present"):
        assert torch.equal(getattr(got, name), getattr(exact, name)), name
    for gradient, by_eager, by_exact in zip(got_grads, eager_grads, exact_grads, strict=True):
        assert_within_rule(gradient, by_eager, by_exact)
    assert got.focal.dtype == torch.float32 and got_grads[0].dtype == logits.dtype
    return got, got_grads


@pytest.mark.parametrize("gamma, alpha", FOCAL)
@pytest.mark.parametrize("factor", [1, 2, 3, 4, 8])
@needs_cpp
def test_cpp_agrees_with_float64(factor, gamma, alpha, poison_empty):
    check(*case(factor=factor), "cpp", gamma=gamma, alpha=alpha)
    check(*case(n=1, m=1, h=37, w=1, factor=factor), "cpp", gamma=gamma, alpha=alpha, iou_loss="mse")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@needs_cpp
def test_cpp_in_half_precision(dtype, poison_empty):
    check(*case(h=33, w=21, dtype=dtype), "cpp")


def test_reference_equals_the_definition_in_float64():
    """Focal and dice of every candidate, from probabilities, and gradients of the operator by finite differences."""
    logits, targets, ious, _ = case(h=3, w=2, factor=3, dtype=torch.float64, scale=2)
    losses = mask_loss(logits, targets, ious.double(), gamma=1.5, alpha=0.3)
    x = F.interpolate(logits, scale_factor=3, mode="bilinear", align_corners=False)
    y = targets[:, None].double()
    p = 1 / (1 + torch.exp(-x))
    p_true = p * y + (1 - p) * (1 - y)
    focal = (-(0.3 * y + 0.7 * (1 - y)) * (1 - p_true) ** 1.5 * p_true.log()).mean((2, 3))
    dice = 1 - (2 * (p * y).sum((2, 3)) + 1) / (p.sum((2, 3)) + y.sum((2, 3)) + 1)
    torch.testing.assert_close(losses.focal, focal)
    torch.testing.assert_close(losses.dice, dice)
    union = ((p > 0.5) | (y > 0)).sum((2, 3))
    torch.testing.assert_close(losses.iou, ((p > 0.5) & (y > 0)).sum((2, 3)) / union.double())
    torch.testing.assert_close(losses.iou_loss, (ious - losses.iou).abs())

    def sums(leaf):
        return mask_sums.overloads["reference"](leaf, targets, False, 1.5, 0.3)[0]

    assert torch.autograd.gradcheck(sums, logits.requires_grad_())


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_bytes_and_bits_change_nothing(backend, poison_empty):
    logits, targets, ious, weights = case(n=3, h=13, w=11, factor=2)
    want = losses_and_gradients(logits, targets, ious, weights, backend=backend)
    strided = F.pad(logits, (1, 0)).transpose(2, 3).contiguous().transpose(2, 3)[..., 1:]
    columns = targets.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous() and not columns.is_contiguous()
    bits = pack_masks(targets)
    spread_bits = bits.repeat_interleave(2, dim=-1)[..., ::2]
    bytes_ = targets.byte() * 255
    channels_last = logits.contiguous(memory_format=torch.channels_last)
    for other, truth, packed in (
        (strided, columns, False),
        (channels_last, bytes_, False),
        (logits, bits, True),
        (strided, spread_bits, True),
    ):
        got = losses_and_gradients(other, truth, ious, weights, backend=backend, packed=packed)
        for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
            # PyTorch sums in the order of the strides of the targets.
            torch.testing.assert_close(a, b, **({"rtol": 0, "atol": 0} if backend == "cpp" else {}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_inputs(backend):
    logits, targets, ious, weights = case(n=2, m=1)
    same = logits[:1].expand(2, 3, -1, -1)
    got, grads = losses_and_gradients(same, targets[:1].expand(2, -1, -1), ious.expand(2, 3), weights, backend=backend)
    want, _ = losses_and_gradients(logits[:1], targets[:1], ious[:1], weights[:, :1], backend=backend)
    assert torch.equal(got.focal, want.focal.expand(2, 3)) and grads[0].is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("value", [1e4, -1e4, -1024.0, 88.0, -45.0, 0.0])
def test_saturated_logits(backend, gamma, value):
    logits = torch.full((2, 1, 5, 5), value)
    logits[1, 0, 2, 2] = -value
    targets = torch.zeros(2, 20, 20, dtype=torch.bool)
    targets[1, :, 10:] = True
    check(logits, targets, torch.rand(2, 1), torch.randn(3, 2, 1), backend, gamma=gamma)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_full_masks(backend):
    targets = torch.stack([torch.zeros(12, 12), torch.ones(12, 12)]).bool()
    logits = torch.tensor([-30.0, 30.0]).view(1, 2, 1, 1).expand(2, 2, 3, 3)
    losses = mask_loss(logits, targets, torch.ones(2, 2), backend=backend)
    assert losses.present.tolist() == [False, True]
    assert losses.union.tolist() == [[0, 144], [144, 144]] and losses.intersection.tolist() == [[0, 0], [0, 144]]
    assert losses.iou.tolist() == [[0, 0], [0, 1]] and losses.iou_loss.tolist() == [[1, 1], [1, 0]]
    torch.testing.assert_close(losses.dice, torch.tensor([[0.0, 1 - 1 / 145], [1 - 1 / 145, 0.0]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n, m", [(0, 3), (2, 0)])
def test_nothing_to_do(backend, n, m):
    losses, (gradient, _) = losses_and_gradients(*case(n=n, m=m), backend=backend)
    assert losses.focal.shape == (n, m) and losses.present.shape == (n,) and gradient.shape == (n, m, 7, 9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_is_not_hidden(backend):
    logits, targets, ious, weights = case()
    logits[0, 1, 3, 3] = float("nan")
    losses, (gradient, _) = losses_and_gradients(logits, targets, ious, weights, backend=backend)
    bad = torch.zeros(2, 3, dtype=torch.bool)
    bad[0, 1] = True
    assert torch.equal(losses.focal.isnan(), bad) and torch.equal(losses.dice.isnan(), bad)
    assert torch.equal(gradient.isnan().any(-1).any(-1), bad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_upsampling_it_stays_in_its_pixel(backend):
    logits, targets, ious, weights = case(factor=1)
    logits[0, 1, 3, 3] = float("nan")
    _, (gradient, _) = losses_and_gradients(logits, targets, ious, weights, backend=backend)
    # Dice ties all pixels of a mask together, so only the sums of this mask are NaN; its neighbors get a slope of NaN.
    assert torch.equal(gradient.isnan().flatten(2).any(-1).nonzero(), torch.tensor([[0, 1]]))
    slopes = torch.ones(2, 3, 3)
    gradient = mask_sums_backward.overloads[backend](slopes, logits, targets, False, 2.0, 0.25)
    assert torch.equal(gradient.isnan(), logits.isnan())


def test_fallback_compiles_without_a_graph_break(monkeypatch):
    """Where nothing was compiled, the warning must not be traced."""
    monkeypatch.delitem(mask_sums.overloads, "cpp", raising=False)
    monkeypatch.delitem(mask_sums_backward.overloads, "cpp", raising=False)
    logits, targets, _, _ = case()
    compiled = torch.compile(lambda x: mask_loss(x, targets).focal.sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), mask_loss(logits, targets, backend="reference").focal.sum())


@needs_cpp
def test_candidates_without_a_slope_are_skipped():
    """Their gradient is 0 whatever their logits are, as 0 times infinity would not be."""
    logits, targets, _, _ = case()
    logits[:, 0] = float("inf")
    slopes = torch.ones(2, 3, 3)
    slopes[:, 0] = 0
    gradient = mask_sums_backward.overloads["cpp"](slopes, logits, targets, False, 2.0, 0.25)
    assert not gradient[:, 0].any() and gradient[:, 1:].isfinite().all()


@needs_cpp
def test_results_do_not_depend_on_the_number_of_threads():
    logits, targets, ious, weights = case(n=1, m=2, h=100, w=64)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            losses, grads = losses_and_gradients(logits, targets, ious, weights, backend="cpp")
            results.append((*losses, *grads))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_inputs_and_small_sums_are_saved(backend):
    logits, targets, ious, _ = case(n=2, h=16, w=16)
    logits.requires_grad_()
    saved = []

    def record(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        losses = mask_loss(logits, targets, ious, backend=backend)
    own = {logits.data_ptr(), targets.data_ptr()}
    assert losses.focal.requires_grad
    assert sum(t.numel() * t.element_size() for t in saved if t.data_ptr() not in own) <= 64 * ious.numel()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_operators_pass_opcheck(backend, packed):
    logits, targets, _, _ = case()
    targets = pack_masks(targets) if packed else targets
    torch.library.opcheck(mask_sums.overloads[backend], (logits.requires_grad_(), targets, packed, 2.0, 0.25))
    slopes = torch.randn(2, 3, 3)
    torch.library.opcheck(mask_sums_backward.overloads[backend], (slopes, logits.detach(), targets, packed, 2.0, -1.0))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_compiles_without_a_graph_break(backend):
    logits, targets, ious, _ = case()

    def total(logits, ious):
        losses = mask_loss(logits, targets, ious, backend=backend)
        return (losses.focal + losses.dice + losses.iou_loss).sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    results = []
    for run in (total, compiled):
        leaf = logits.detach().requires_grad_()
        value = run(leaf, ious)
        value.backward()
        results.append((value.detach(), leaf.grad))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


def test_compiles_for_varying_sizes():
    compiled = torch.compile(mask_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, h in ((2, 7), (3, 5)):
        logits, targets, ious, _ = case(n=n, h=h)
        for got, want in zip(compiled(logits, targets, ious), mask_loss(logits, targets, ious), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_are_refused(backend):
    logits, targets, _, _ = case()
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(
        mask_loss(logits, targets, backend=backend).focal.sum(), logits, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    inputs = case()
    want, want_grads = losses_and_gradients(*inputs, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got, got_grads = losses_and_gradients(*inputs, backend=backend)
    assert got.focal.dtype == torch.float32
    for a, b in zip((*got, *got_grads), (*want, *want_grads), strict=True):
        assert torch.equal(a, b)


def test_flops_are_counted():
    logits, targets, ious, weights = case(n=2, m=3, h=8, w=8, factor=4)
    library.register_flop_formulas()
    with FlopCounterMode(display=False) as counter:
        losses_and_gradients(logits, targets, ious, weights)
    assert counter.get_total_flops() == (48 + 54) * 2 * 3 * 32 * 32


@needs_cpp
@pytest.mark.slow
def test_more_pixels_than_32_bits_count():
    """2049 planes of 1024 x 1024 pixels, the same memory behind all of them."""
    logits = torch.linspace(-3, 3, 2049).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    targets = torch.rand(1, 1024, 1024) < 0.5
    losses = mask_loss(logits, targets.expand(2049, -1, -1), backend="cpp")
    last = mask_loss(logits[-1:], targets, backend="cpp")
    assert logits.numel() // 4 * targets.numel() > 2**31
    assert torch.equal(losses.focal[-1:], last.focal) and torch.equal(losses.union[-1:], last.union)


def test_module_binds_the_options():
    logits, targets, ious, _ = case()
    module = MaskLoss(gamma=1.0, alpha=None, iou_loss="mse")
    for got, want in zip(
        module(logits, targets, ious), mask_loss(logits, targets, ious, **module.options), strict=True
    ):
        assert torch.equal(got, want)
    assert "gamma=1.0, alpha=None, iou_loss='mse'" in repr(module)
    assert mask_loss(logits, targets).iou_loss is None


def test_packing_is_undone_by_unpacking():
    for width in (1, 7, 8, 9, 64):
        masks = torch.rand(2, 3, width) < 0.5
        packed = pack_masks(masks)
        assert packed.shape == (2, 3, -(-width // 8)) and packed.dtype == torch.uint8
        assert torch.equal(unpack_masks(packed, width), masks)
    assert pack_masks(torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0, 5]], dtype=torch.uint8)).tolist() == [[1, 1]]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": torch.zeros(2, 7, 9)}, r"logits must be \[N, M, h, w\], not \[2, 7, 9\]"),
        ({"logits": torch.zeros(2, 3, 7, 9).int()}, "logits must be floating point.*int32"),
        ({"targets": torch.zeros(2, 28, 36)}, "targets must be bool or uint8.*float32"),
        ({"targets": torch.zeros(2, 1, 28, 36).bool()}, r"targets must be bool or uint8 \[N, H, W\]"),
        ({"targets": torch.zeros(2, 28, 30).bool()}, r"targets \[2, 28, 30\] do not fit logits \[2, 3, 7, 9\].*resize"),
        ({"targets": torch.zeros(3, 28, 36).bool()}, "do not fit"),
        ({"targets": torch.zeros(2, 6, 8).bool()}, "do not fit"),
        ({"packed": True}, "packed targets must be uint8.*bool"),
        ({"logits": torch.zeros(2, 3, 7, 0)}, "logits have no pixels"),
        ({"targets": torch.zeros(2, 28, 36).byte(), "packed": True}, r"ceil\(s \* w / 8\)"),
        ({"targets": torch.zeros(2, 28, 36).bool().to("meta")}, "logits are on cpu, targets on meta"),
        ({"pred_ious": torch.zeros(2)}, r"pred_ious must be \[N, M\] = \[2, 3\].*not \[2\]"),
        ({"gamma": -1.0}, "gamma must be a finite number of at least 0, not -1.0"),
        ({"gamma": float("nan")}, "gamma must be"),
        ({"alpha": 1.5}, "alpha must lie in 0..1.*not 1.5"),
        ({"iou_loss": "l2"}, "iou_loss must be 'l1' or 'mse', not 'l2'"),
        ({"backend": "cuda"}, "unknown back end 'cuda'.*auto, reference, cpp, triton"),
    ],
)
def test_bad_input_is_one_clear_error(change, message):
    logits, targets, ious, _ = case()
    with pytest.raises(ValueError, match=message):
        mask_loss(**{"logits": logits, "targets": targets, "pred_ious": ious, **change})


@needs_cpp
def test_float64_is_refused_by_a_kernel_and_runs_on_the_reference():
    logits, targets, ious, _ = case(dtype=torch.float64)
    with pytest.raises(ValueError, match="'cpp'.*takes bfloat16, float16, float32, not float64"):
        mask_loss(logits, targets, ious, backend="cpp")
    assert mask_loss(logits, targets, ious).focal.dtype == torch.float64


def test_every_combination_of_options_is_differentiable():
    logits, targets, ious, weights = case(h=4, w=4)
    for iou_loss, alpha, gamma in itertools.product(("l1", "mse"), (None, 0.25), (0.0, 2.0)):
        _, grads = losses_and_gradients(logits, targets, ious, weights, iou_loss=iou_loss, alpha=alpha, gamma=gamma)
        assert all(gradient.isfinite().all() and gradient.any() for gradient in grads)
