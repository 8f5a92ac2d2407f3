"""The Triton form of the mask loss against float64: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sam2fast_kernels import pack_masks
from sam2fast_kernels.mask_loss import mask_loss
from sam2fast_kernels.mask_loss.op import mask_sums, mask_sums_backward

pytest.importorskip("triton")
from sam2fast_kernels.mask_loss import triton as kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOSSES = ("focal", "dice", "iou_loss")
GPU_CASES = [(dtype, packed) for dtype in (torch.float32, torch.bfloat16) for packed in (False, True)]


def case(n=1, m=2, h=3, w=5, factor=2, dtype=torch.float32, seed=0, device=DEVICE):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(n, m, h, w, generator=generator) * 4).to(dtype)
    targets = torch.rand(n, h * factor, w * factor, generator=generator) < 0.4
    ious = torch.rand(n, m, generator=generator)
    # With this factor gradients of logits are about 1, as the tolerance expects.
    weights = torch.randn(3, n, m, generator=generator) * (h * w * factor**2)
    return tuple(tensor.to(device) for tensor in (logits, targets, ious, weights))


def losses_and_gradients(logits, targets, ious, weights, backend="triton", **options):
    """All outputs, and the gradients of their weighted sum."""
    logits, ious = logits.detach().requires_grad_(), ious.detach().requires_grad_()
    losses = mask_loss(logits, targets, ious, backend=backend, **options)
    total = sum(
        (getattr(losses, name) * weight.to(losses.focal)).sum() for name, weight in zip(LOSSES, weights, strict=True)
    )
    return losses, torch.autograd.grad(total, (logits, ious))


def assert_within_rule(kernel, eager, exact, atol=1e-6):
    """The kernel may be twice as far from the float64 value as eager PyTorch in the same precision."""
    if DEVICE == "cpu" and kernel.dtype == torch.bfloat16:
        atol += 2**-8 * exact.abs().max()  # the interpreter truncates where a GPU rounds
    if DEVICE == "cuda":
        atol *= 1 + exact.abs().max()  # its exponentials and reciprocals are off by up to two units in the last place
    error, allowed = (kernel.double() - exact).abs(), 2 * (eager.double() - exact).abs().max() + atol
    assert torch.isfinite(kernel).all()
    assert error.max() <= allowed, f"error {error.max():.3g}, allowed {allowed:.3g}"


def check(logits, targets, ious, weights, **options):
    got, got_grads = losses_and_gradients(logits, targets, ious, weights, **options)
    eager, eager_grads = losses_and_gradients(logits, targets, ious, weights, "reference", **options)
    exact, exact_grads = losses_and_gradients(logits.double(), targets, ious.double(), weights, "reference", **options)
    for name in LOSSES:
        assert_within_rule(getattr(got, name), getattr(eager, name), getattr(exact, name))
    for name in ("intersection", "union", "present"):
        assert torch.equal(getattr(got, name), getattr(exact, name)), name
    for gradient, by_eager, by_exact in zip(got_grads, eager_grads, exact_grads, strict=True):
        assert_within_rule(gradient, by_eager, by_exact)
    assert got_grads[0].dtype == logits.dtype and got_grads[0].is_contiguous()


@pytest.mark.parametrize("gamma, alpha", [(2.0, 0.25), (0.0, None), (1.0, 0.0), (1.5, 0.9), (3.0, 1.0)])
@pytest.mark.parametrize("factor", [1, 2])
def test_options_agree_with_float64(factor, gamma, alpha, poison_empty):
    check(*case(n=2, h=5 if factor == 1 else 3, factor=factor), gamma=gamma, alpha=alpha)


@pytest.mark.parametrize(
    "factor, gamma, packed",
    [(3, 2.0, False), (4, 2.0, False), (4, 0.5, True), (8, 1.0, False), (8, 2.0, True), (9, 0.0, True)],
)
def test_factors_agree_with_float64(factor, gamma, packed, poison_empty):
    logits, targets, ious, weights = case(m=1, h=2 if factor < 8 else 1, w=3, factor=factor)
    check(logits, pack_masks(targets) if packed else targets, ious, weights, gamma=gamma, iou_loss="mse", packed=packed)


@pytest.mark.parametrize("h, w", [(1, 1), (37, 1), (1, 40), (2, 1021)])
def test_sizes_of_programs(h, w, poison_empty):
    """Several strips of rows, programs with idle lanes, several tiles of columns (256 forward, 510 backward)."""
    check(*case(m=1, h=h, w=w))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, poison_empty):
    check(*case(h=2, factor=4, dtype=dtype))


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_strides_bytes_and_bits_change_nothing(factor, poison_empty):
    """Whether the targets of a lane are read at once or pixel by pixel."""
    logits, targets, ious, weights = case(h=2 if factor == 2 else 1, w=3, factor=factor)
    want = losses_and_gradients(logits, targets, ious, weights)
    strided = F.pad(logits, (1, 0)).transpose(2, 3).contiguous().transpose(2, 3)[..., 1:]
    columns = targets.transpose(1, 2).contiguous().transpose(1, 2)
    shifted = F.pad(targets, (1, 0)).contiguous()[..., 1:]
    spread_bits = pack_masks(targets).repeat_interleave(2, dim=-1)[..., ::2]
    assert not any(tensor.is_contiguous() for tensor in (strided, columns, shifted, spread_bits))
    for other, truth, packed in (
        (strided, columns, False),
        (logits, shifted, False),
        (logits, targets.byte() * 255, False),
        (logits, pack_masks(targets), True),
        (strided, spread_bits, True),
    ):
        got = losses_and_gradients(other, truth, ious, weights, packed=packed)
        for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_saturated_logits(gamma):
    values = torch.tensor([1e4, -1e4, -1024.0, 88.0, -45.0, 0.0], device=DEVICE)
    logits = values.view(1, 6, 1, 1).repeat(2, 1, 1, 2)
    logits[1, :, 0, 1] *= -1
    targets = torch.zeros(2, 2, 4, dtype=torch.bool, device=DEVICE)
    targets[1, 1:] = True
    ious, weights = torch.rand(2, 6, device=DEVICE), 8 * torch.randn(3, 2, 6, device=DEVICE)
    for m in range(6):
        check(logits[:, m : m + 1], targets, ious[:, m : m + 1], weights[..., m : m + 1], gamma=gamma)


def test_empty_and_full_masks():
    targets = torch.stack([torch.zeros(4, 4), torch.ones(4, 4)]).bool().to(DEVICE)
    logits = torch.tensor([-30.0, 30.0], device=DEVICE).view(1, 2, 1, 1).expand(2, 2, 2, 2)
    losses = mask_loss(logits, targets, backend="triton")
    assert losses.present.tolist() == [False, True]
    assert losses.union.tolist() == [[0, 16], [16, 16]] and losses.intersection.tolist() == [[0, 0], [0, 16]]
    want = torch.tensor([[0.0, 1 - 1 / 17], [1 - 1 / 17, 0.0]])
    torch.testing.assert_close(losses.dice.cpu(), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("n, m", [(0, 3), (2, 0)])
def test_nothing_to_do(n, m):
    losses, (gradient, _) = losses_and_gradients(*case(n=n, m=m))
    assert losses.focal.shape == (n, m) and losses.present.shape == (n,) and gradient.shape == (n, m, 3, 5)


def test_not_a_number_is_not_hidden():
    logits, targets, ious, weights = case()
    logits[0, 1, 1, 3] = float("nan")
    losses, (gradient, _) = losses_and_gradients(logits, targets, ious, weights)
    assert losses.focal.isnan().tolist() == losses.dice.isnan().tolist() == [[False, True]]
    assert gradient.isnan().any(-1).any(-1).tolist() == [[False, True]]


def test_candidates_without_a_slope_are_skipped(poison_empty):
    """Their gradient is 0 whatever their logits are, as 0 times infinity would not be."""
    logits, targets, _, _ = case()
    logits[:, 0] = float("inf")
    slopes = torch.tensor([0.0, 1.0], device=DEVICE).view(1, 2, 1).expand(1, 2, 3)
    gradient = mask_sums_backward.overloads["triton"](slopes, logits, targets, False, 2.0, 0.25)
    assert not gradient[:, 0].any() and gradient[:, 1].isfinite().all() and gradient[:, 1].all()


def test_gradients_do_not_depend_on_the_rows_of_a_program(monkeypatch):
    logits, targets, _, _ = case(m=1, h=7, w=3)
    slopes = torch.ones(1, 1, 3, device=DEVICE)
    gradients = []
    for rows in (1, 2, 4, 32):
        monkeypatch.setattr(kernels, "gradient_rows", lambda programs, height, rows=rows: rows)
        gradients.append(mask_sums_backward.overloads["triton"](slopes, logits, targets, False, 2.0, 0.25))
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])


@pytest.mark.parametrize("n, m", [(3, 1), (1, 3)])
def test_addresses_beyond_two_to_the_31(n, m):
    """Masks 2^30 elements from each other; the memory between them is never touched."""
    far = 2**30 + 8
    logits, targets, ious, weights = case(n=n, m=m, h=2, w=4, dtype=torch.bfloat16)
    memory = torch.empty(2 * far + 8, dtype=torch.bfloat16, device=DEVICE)
    bits = torch.empty(2 * far + 32, dtype=torch.bool, device=DEVICE)
    distant = memory.as_strided(logits.shape, (far, far, 4, 1)).copy_(logits)
    truth = bits.as_strided(targets.shape, (far, 8, 1)).copy_(targets)
    got, want = (
        losses_and_gradients(distant, truth, ious, weights),
        losses_and_gradients(logits, targets, ious, weights),
    )
    for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        assert torch.equal(a, b)


def test_operators_pass_opcheck():
    logits, targets, _, _ = case(h=1, w=2)
    torch.library.opcheck(mask_sums.overloads["triton"], (logits.requires_grad_(), targets, False, 2.0, 0.25))
    arguments = (torch.randn(1, 2, 3, device=DEVICE), logits.detach(), targets, False, 2.0, 0.25)
    torch.library.opcheck(mask_sums_backward.overloads["triton"], arguments)


def test_compiles_without_a_graph_break():
    logits, targets, ious, _ = case(h=2, w=2)

    def loss(logits):
        losses = mask_loss(logits, targets, ious, backend="triton")
        return (20 * losses.focal + losses.dice).min(1).values.sum() + losses.iou_loss.sum()

    gradients = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = logits.detach().requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16):
            run(leaf).backward()
        gradients.append(leaf.grad)
    assert gradients[0].any() and torch.equal(*gradients)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, packed", GPU_CASES)
def test_image_batch_on_the_gpu(dtype, packed):
    """64 objects with 3 candidates: right, equal in every run, and with little memory."""
    logits, targets, ious, weights = case(n=64, m=3, h=256, w=256, factor=4, dtype=dtype)
    truth = pack_masks(targets) if packed else targets
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    got, got_grads = losses_and_gradients(logits, truth, ious, weights, packed=packed)
    plane = logits[0, 0].numel() * logits.element_size()
    assert torch.cuda.max_memory_allocated() - before <= logits.numel() * logits.element_size() + 4 * plane
    again, again_grads = losses_and_gradients(logits, truth, ious, weights, packed=packed)
    for a, b in zip((*got, *got_grads), (*again, *again_grads), strict=True):
        assert torch.equal(a, b)
    for n in range(0, 64, 16):
        one = slice(n, n + 1)
        arguments = logits[one], targets[one], ious[one], weights[:, one]
        eager, eager_grads = losses_and_gradients(*arguments, "reference")
        exact, exact_grads = losses_and_gradients(arguments[0].double(), *arguments[1:], "reference")
        for name in LOSSES:
            assert_within_rule(getattr(got, name)[one], getattr(eager, name), getattr(exact, name))
        assert_within_rule(got_grads[0][one], eager_grads[0], exact_grads[0])
        assert (got.union[one] - exact.union).abs().max() <= 2
