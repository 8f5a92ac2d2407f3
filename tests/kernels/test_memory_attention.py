"""Memory attention: the CPU back end against float64, gradients, expanded inputs, the operator's contract."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from sam2fast_kernels import library
from sam2fast_kernels.memory_attention import cpu, memory_attention
from sam2fast_kernels.memory_attention.op import attention

needs_cpp = pytest.mark.skipif(not library.load_native(), reason="the compiled operators are not built")
SEED = torch.tensor(123456789012345678)
# N, L, M, D, Dv, hw, unrotated keys
SHAPES = [
    (2, 37, 116, 16, 8, 37, 5),
    (1, 64, 64, 256, 256, 64, 0),
    (3, 19, 40, 32, 64, 19, 2),
    (1, 1, 1, 2, 1, 0, 0),
    (1, 20, 1, 2, 1, 0, 0),
]


def make_inputs(shape, dtype=torch.float64):
    n, length, keys, width, value_width, places, unrotated = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    tensors = normal(n, length, width), normal(n, keys, width), normal(n, keys, value_width)
    angles = 6 * torch.rand(places, width // 2, generator=generator)
    rotary = (angles.cos(), angles.sin()) if places else None
    upstream = normal(n, length, value_width), torch.randn(n, length, generator=generator)
    return tensors, {"rotary": rotary, "num_unrotated": unrotated, "seed": SEED}, upstream


def values_and_gradients(tensors, upstream, **options):
    tensors = [x.detach().requires_grad_() for x in tensors]
    outputs = memory_attention(*tensors, **options)
    upstream = [grad.to(out.dtype) for grad, out in zip(upstream, outputs, strict=True)]
    return [x.detach() for x in outputs] + list(torch.autograd.grad(outputs, tensors, upstream))


def plain(q, k, v, rotary, num_unrotated):
    """Without dropout, by PyTorch's attention and complex numbers."""
    if rotary is not None:
        turn = torch.complex(*rotary).to(torch.complex128)
        placed = k.shape[1] - num_unrotated

        def rotate(x):
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(pairs * turn.repeat(x.shape[1] // len(turn), 1)).flatten(-2)

        q, k = rotate(q), torch.cat([rotate(k[:, :placed]), k[:, placed:]], dim=1)
    return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_rotated_attention(shape):
    tensors, options, _ = make_inputs(shape)
    out, row_sum = memory_attention(*tensors, **options)
    torch.testing.assert_close(out, plain(*tensors, options["rotary"], options["num_unrotated"]), atol=1e-7, rtol=0)
    torch.testing.assert_close(row_sum, torch.ones_like(row_sum))


@needs_cpp
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_cpu_kernel_is_as_near_to_float64_as_plain_pytorch(shape, dtype, dropout, poison_empty, monkeypatch):
    monkeypatch.setattr(cpu, "BLOCK_QUERIES", (8, 16))  # several blocks, the last one cut off
    tensors, options, upstream = make_inputs(shape, dtype)
    options["dropout"] = dropout
    exact = values_and_gradients([x.double() for x in tensors], upstream, **options)
    got, eager = (values_and_gradients(tensors, upstream, backend=b, **options) for b in ("cpp", "reference"))
    for kernel, plain_result, want in zip(got, eager, exact, strict=True):
        assert kernel.dtype == plain_result.dtype
        allowed = 2 * (plain_result.double() - want).abs().max() + 2e-6 * max(1.0, want.abs().max().item())
        assert (kernel.double() - want).abs().max() <= allowed


@needs_cpp
def test_expanded_inputs_are_not_copied_and_drop_differently():
    tensors, options, upstream = make_inputs((1, 19, 40, 32, 64, 19, 2), torch.float32)
    upstream = [grad.expand(3, *grad.shape[1:]) for grad in upstream]
    expanded = [x.expand(3, *x.shape[1:]) for x in tensors]
    got = values_and_gradients(expanded, upstream, dropout=0.3, backend="cpp", **options)
    want = values_and_gradients([x.contiguous() for x in expanded], upstream, dropout=0.3, backend="cpp", **options)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not torch.equal(got[0][0], got[0][1])


def test_row_sums_put_the_value_projection_after_the_attention():
    (q, k, memory), options, _ = make_inputs(SHAPES[0])
    weight, bias = torch.randn(12, memory.shape[2], dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    want, _ = memory_attention(q, k, F.linear(memory, weight, bias), dropout=0.4, **options)
    out, row_sum = memory_attention(q, k, memory, dropout=0.4, **options)
    torch.testing.assert_close(out @ weight.t() + row_sum.unsqueeze(-1) * bias, want)
    assert (row_sum - 1).abs().max() > 0.05


@pytest.mark.parametrize("frozen", [(), ("k",), ("weight", "bias")], ids=lambda f: "+".join(f) or "none")
def test_key_projection_is_a_linear_map_before_it(frozen):
    (q, k, v), options, upstream = make_inputs(SHAPES[0])
    parts = {"k": k, "weight": torch.randn(16, 16, dtype=torch.float64), "bias": torch.randn(16, dtype=torch.float64)}
    for name, tensor in (parts | {"q": q, "v": v}).items():
        tensor.requires_grad_(name not in frozen)
    wrt = [tensor for tensor in (q, v, *parts.values()) if tensor.requires_grad]
    kept = []

    def run(k, **more):
        outputs = memory_attention(q, k, v, dropout=0.4, **options, **more)
        return [*outputs, *torch.autograd.grad(outputs, wrt, [grad.double() for grad in upstream])]

    want = run(F.linear(*parts.values()))
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        got = run(k, key_projection=(parts["weight"], parts["bias"]))
    torch.testing.assert_close(got, want)
    assert {t.data_ptr() for t in kept if t.shape == k.shape} == {k.data_ptr()}


def test_bad_key_projections():
    (q, k, v), options, _ = make_inputs(SHAPES[0])
    with pytest.raises(ValueError, match=r"float64 weight \[16, 3\] and bias \[16\], not .*\[16, 16\]"):
        memory_attention(q, k[..., :3], v, key_projection=(k.new_ones(16, 16), k.new_ones(16)), **options)
    with pytest.raises(ValueError, match="must be torch.float64 weight"):
        memory_attention(q, k, v, key_projection=(torch.ones(16, 16), torch.ones(16)), **options)


def test_gradients_are_those_of_differences():
    tensors, options, _ = make_inputs((2, 5, 12, 8, 4, 5, 2))
    tensors = [x.requires_grad_() for x in tensors]
    torch.autograd.gradcheck(lambda q, k, v: memory_attention(q, k, v, dropout=0.2, **options), tensors)


def test_contract_of_the_operator():
    (q, k, v), options, _ = make_inputs(SHAPES[2], torch.float32)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    for name, overload in attention.overloads.items():
        if name != "triton":
            torch.library.opcheck(overload, (q, k, v, *options["rotary"], 2, 0.1, SEED))


def test_compiles_as_one_graph_and_counts_its_arithmetic():
    (q, k, v), options, _ = make_inputs(SHAPES[2], torch.float32)
    compiled = torch.compile(lambda q, k, v: memory_attention(q, k, v, dropout=0.1, **options), fullgraph=True)
    for ours, theirs in zip(compiled(q, k, v), memory_attention(q, k, v, dropout=0.1, **options), strict=True):
        torch.testing.assert_close(ours, theirs)
    library.register_flop_formulas()
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        out, _ = memory_attention(*(torch.empty(2, n, w) for n, w in ((8, 16), (24, 16), (24, 4))))
    assert out.shape == (2, 8, 4)
    assert counter.get_total_flops() == 2 * 2 * 8 * 24 * (16 + 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(1, 4, 3)}, "agree in N, D and M"),
        ({"q": torch.ones(1, 4, 8, dtype=torch.float64)}, "floating point"),
        ({"v": torch.ones(1, 5, 8)}, "agree in N, D and M"),
        ({"num_unrotated": 7}, "between 0 and the 6 keys"),
        ({"rotary": (torch.ones(4, 8), torch.ones(4, 8))}, "rotary must be two float32 tables"),
        ({"dropout": 1.0}, "below 1"),
        ({"backend": "fast"}, "unknown back end 'fast'"),
    ],
)
def test_input_that_cannot_be(change, message):
    arguments = {"q": torch.ones(1, 4, 8), "k": torch.ones(1, 6, 8), "v": torch.ones(1, 6, 8)} | change
    with pytest.raises(ValueError, match=message):
        memory_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
