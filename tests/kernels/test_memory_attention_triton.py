"""The Triton form of memory attention against float64: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import pytest
import torch

from sam2fast_kernels.dropout.hash import random_bits, threshold
from sam2fast_kernels.memory_attention import memory_attention
from sam2fast_kernels.memory_attention.op import attention, attention_backward
from sam2fast_kernels.memory_attention.reference import rotate

pytest.importorskip("triton")
from sam2fast_kernels.memory_attention import triton as kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = torch.tensor(-0x123456789ABCDEF, device=DEVICE)
"""Both halves have high bits."""
NAMES = ("out", "row_sum", "grad_q", "grad_k", "grad_v")


def case(n=2, queries=21, keys=45, d=64, dv=64, positions=12, dtype=torch.float32):
    """q, k, v, tables (None without positions), and weights of out and row_sum in a loss."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    q, k, v = (normal(n, length, width).to(dtype) for length, width in ((queries, d), (keys, d), (keys, dv)))
    angles = 3 * normal(positions, d // 2)
    rotary = (angles.cos(), angles.sin()) if positions else None
    return q, k, v, rotary, (normal(n, queries, dv), normal(n, queries))


def attend(q, k, v, rotary, weights, backend="triton", **options):
    """All outputs and gradients, by name."""
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    out, row_sum = memory_attention(*leaves, rotary=rotary, seed=SEED, backend=backend, **options)
    return _with_gradients(out, row_sum, leaves, weights)


def attend_eagerly(q, k, v, rotary, weights, num_unrotated=0, dropout=0.0):
    """Plain PyTorch in the precision of q."""
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    q, k, v = leaves
    if rotary is not None:
        q, k = rotate(q, *rotary), rotate(k, *rotary, num_unrotated)
    probabilities = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
    bits = random_bits(SEED, len(q) * q.shape[1], k.shape[1]).view(probabilities.shape)
    probabilities = probabilities * (bits >= threshold(dropout)) / (1 - dropout)
    return _with_gradients(probabilities @ v, probabilities.sum(-1), leaves, weights)


def _with_gradients(out, row_sum, leaves, weights):
    of_out, of_row_sum = weights
    loss = (out * of_out.to(out.dtype)).sum() + (row_sum * of_row_sum.to(row_sum.dtype)).sum()
    return dict(zip(NAMES, (out.detach(), row_sum.detach(), *torch.autograd.grad(loss, leaves)), strict=True))


def assert_within_rule(name, kernel, eager, exact, atol=3e-6):
    """The kernel may be twice as far from the float64 value as eager PyTorch in the same precision."""
    atol *= 1 + exact.abs().max()
    if DEVICE == "cpu" and kernel.dtype == torch.bfloat16:
        atol += 2**-8 * exact.abs().max()  # the interpreter truncates where a GPU rounds
    error, allowed = (kernel.double() - exact).abs().max(), 2 * (eager.double() - exact).abs().max() + atol
    assert torch.isfinite(kernel).all(), name
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def check(q, k, v, rotary, weights, atol=3e-6, **options):
    got = attend(q, k, v, rotary, weights, **options)
    eager = attend_eagerly(q, k, v, rotary, weights, **options)
    exact = attend(q.double(), k.double(), v.double(), rotary, weights, "reference", **options)
    for name in NAMES:
        assert_within_rule(name, got[name], eager[name], exact[name], atol)
        assert got[name].is_contiguous() and got[name].shape == exact[name].shape
    assert got["row_sum"].dtype == torch.float32
    assert all(got[name].dtype == q.dtype for name in NAMES if name != "row_sum")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "sizes, num_unrotated",
    [
        ({}, 9),
        ({"queries": 70, "keys": 33, "positions": 70}, 0),
        ({"d": 256, "n": 1, "positions": 40}, 4),
        ({"d": 256, "dv": 256, "n": 1, "queries": 33, "keys": 33, "positions": 33}, 0),
        ({"d": 128, "dv": 16}, 45),
        ({"positions": 0}, 0),
    ],
    ids=["pointers", "blocks", "memory", "self", "unrotated", "no-tables"],
)
def test_agrees_with_float64(sizes, num_unrotated, dropout, poison_empty):
    check(*case(**sizes), num_unrotated=num_unrotated, dropout=dropout)


@pytest.mark.parametrize("queries, keys", [(1, 1), (64, 32), (65, 1), (1, 65)])
def test_sizes_of_programs(queries, keys, poison_empty):
    """Blocks that are full, and blocks with one row."""
    check(*case(n=1, queries=queries, keys=keys, dv=16), dropout=0.3)


@pytest.mark.parametrize("d, dv", [(2, 1), (24, 40), (96, 65)])
def test_widths_that_are_no_powers_of_two(d, dv, poison_empty):
    check(*case(d=d, dv=dv), num_unrotated=3, dropout=0.3)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, dropout, poison_empty):
    check(*case(dtype=dtype), num_unrotated=5, dropout=dropout)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dv", [64, 256])
def test_blocks_of_gpus(capability, dv, poison_empty, monkeypatch):
    """The blocks that 16-bit tensors have on a GPU, several in each direction."""
    monkeypatch.setattr(kernels, "_blocks", lambda table, *_: table[capability, dv > 64])
    check(*case(n=1, queries=130, keys=131, dv=dv, positions=50), num_unrotated=7, dropout=0.3)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("keys", [33, 131])
def test_keys_in_parts(keys, parts, poison_empty, monkeypatch):
    """As many objects need on a GPU: parts that end inside of a block, and parts without keys."""
    monkeypatch.setattr(kernels, "_parts", lambda *_: parts)
    check(*case(queries=40, keys=keys, positions=20), num_unrotated=7, dropout=0.3)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, -1])
def test_drops_what_the_reference_drops(seed):
    """With the identity as values, the output is the dropped weights themselves."""
    q, k, _, rotary, _ = case(n=3, queries=35, keys=64)
    v = torch.eye(64, device=DEVICE).expand(3, 64, 64)
    seed = torch.tensor(seed, device=DEVICE)
    out, row_sum = memory_attention(q, k, v, rotary=rotary, dropout=0.3, seed=seed, backend="triton")
    keep = random_bits(seed, 3 * 35, 64).view(3, 35, 64) >= threshold(0.3)
    assert torch.equal(out != 0, keep)
    torch.testing.assert_close(row_sum, out.sum(-1))


def test_strides_change_nothing(poison_empty):
    """Tensors expanded over the batch, slices of wider ones, and batches inside of rows."""
    q, k, v, rotary, weights = case()
    options = {"num_unrotated": 5, "dropout": 0.3}
    expanded = [tensor[:1].expand(2, -1, -1) for tensor in (q, k, v)]
    sliced = [torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]] for tensor in (q, k, v)]
    inside = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (q, k, v)]
    columns = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (q, k, v)]
    for tensors in (expanded, sliced, inside, columns):
        assert not any(tensor.is_contiguous() for tensor in tensors)
        dense = [tensor.contiguous() for tensor in tensors]
        got, want = (attend(*some, rotary, weights, **options) for some in (tensors, dense))
        assert all(torch.equal(got[name], want[name]) for name in NAMES)


def test_large_scores(poison_empty):
    """Probabilities close to 1, others that vanish, and a logarithm far from 0. Scores over 100 are rounded by 1e-5,
    which is the relative error of a probability."""
    q, k, v, rotary, weights = case()
    check(30 * q, k, v, rotary, weights, atol=1e-5, dropout=0.3)


@pytest.mark.filterwarnings("ignore:overflow|invalid:RuntimeWarning")  # in rows of tiles that are never stored
@pytest.mark.parametrize("size", [-400.0, 400.0])
def test_equal_scores_far_from_zero(size, poison_empty):
    """Their logarithm takes up most of the digits of a float32, so gradients keep about four of them."""
    q, k, v, _, weights = case()
    q, k = torch.full_like(q, size / 8), torch.ones_like(k)
    got = attend(q, k, v, None, weights)
    exact = attend(q.double(), k.double(), v.double(), None, weights, "reference")
    for name in NAMES:
        error = (got[name].double() - exact[name]).abs().max()
        assert error <= 1e-4 * exact[name].abs().max().clamp(min=1), name


def test_logarithm_of_the_sum():
    q, k, v, rotary, _ = case()
    options = (*rotary, 5, 0.3, SEED)
    lse = attention.overloads["triton"](q, k, v, *options)[2]
    exact = attention.overloads["reference"](q.double(), k.double(), v.double(), *options)[2]
    torch.testing.assert_close(lse.double(), exact, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("n, queries", [(0, 3), (2, 0)])
def test_nothing_to_do(n, queries):
    got = attend(*case(n=n, queries=queries), dropout=0.3)
    assert got["out"].shape == (n, queries, 64) and got["grad_k"].shape == (n, 45, 64)
    assert not got["grad_k"].any() and not got["grad_v"].any()


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
def test_not_a_number_stays_in_its_row():
    q, k, v, rotary, weights = case()
    q[1, 3, 2] = float("nan")
    got = attend(q, k, v, rotary, weights)
    for name in ("out", "grad_q"):
        assert got[name].isnan().any(-1).nonzero().tolist() == [[1, 3]]
    assert got["row_sum"].isnan().nonzero().tolist() == [[1, 3]]


def test_too_wide():
    with pytest.raises(ValueError, match="up to 256 wide"):
        attend(*case(n=1, queries=1, keys=1, d=258))


def test_addresses_beyond_two_to_the_31():
    """Batch elements 2^30 elements from each other; the memory between them is never touched."""
    q, k, v, rotary, weights = case(n=3, queries=4, keys=5, dtype=torch.bfloat16)
    far = 2**30 + 512
    memory = torch.empty(2 * far + 1024, dtype=torch.bfloat16, device=DEVICE)
    distant = [
        memory.as_strided(tensor.shape, (far, 64, 1), offset).copy_(tensor)
        for offset, tensor in zip((0, 256, 576), (q, k, v), strict=True)
    ]
    got, want = (attend(*tensors, rotary, weights, dropout=0.3) for tensors in (distant, (q, k, v)))
    assert all(torch.equal(got[name], want[name]) for name in NAMES)


def test_operators_pass_opcheck():
    q, k, v, rotary, _ = case(n=1, queries=2, keys=3)
    options = (*rotary, 1, 0.3, SEED)
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    torch.library.opcheck(attention.overloads["triton"], (*leaves, *options))
    tensors = [tensor.detach() for tensor in (*attention.overloads["triton"](q, k, v, *options), q, k, v)]
    upstream = torch.randn_like(tensors[0]), torch.randn_like(tensors[1])
    torch.library.opcheck(attention_backward.overloads["triton"], (*upstream, *tensors, *options))


def test_compiles_without_a_graph_break():
    q, k, v, rotary, _ = case(n=1, queries=3, keys=4)

    def loss(q):
        out, row_sum = memory_attention(q, k, v, rotary=rotary, dropout=0.3, seed=SEED, backend="triton")
        return out.square().sum() + row_sum.sum()

    gradients = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = q.detach().requires_grad_()
        run(leaf).backward()
        gradients.append(leaf.grad)
    assert gradients[0].any() and torch.equal(*gradients)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dv", [64, 256])
def test_frames_on_the_gpu(dv, dtype):
    """Full-size grids: right, equal in every run, and with no scores in memory."""
    keys = 4096 if dv == 256 else 2 * 4096 + 64
    q, k, v, rotary, weights = case(n=2, queries=4096, keys=keys, d=256, dv=dv, positions=4096, dtype=dtype)
    options = {"num_unrotated": keys % 4096, "dropout": 0.1}
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    got = attend(q, k, v, rotary, weights, **options)
    dense = 4 * sum(tensor.nbytes for tensor in (q, k, v)) + 4 * weights[0].nbytes
    assert torch.cuda.max_memory_allocated() - before <= dense
    again = attend(q, k, v, rotary, weights, **options)
    assert all(torch.equal(got[name], again[name]) for name in NAMES)
    eager = attend_eagerly(q, k, v, rotary, weights, **options)
    exact = attend(q.double(), k.double(), v.double(), rotary, weights, "reference", **options)
    for name in NAMES:
        assert_within_rule(name, got[name], eager[name], exact[name])
