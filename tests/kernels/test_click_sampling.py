"""Clicks: every back end takes the pixel of the reference, their distribution, the operators' contract."""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sam2fast_kernels import library, pack_masks
from sam2fast_kernels.click_sampling import center_click, reference, uniform_click
from sam2fast_kernels.click_sampling.op import click_center, click_uniform

HAS_TRITON = importlib.util.find_spec("triton") is not None
RUNS_TRITON = HAS_TRITON and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1")
CPP = pytest.param("cpp", marks=pytest.mark.skipif(not library.load_native(), reason="the operators are not built"))
TRITON = pytest.param("triton", marks=pytest.mark.skipif(not RUNS_TRITON, reason="needs Triton"))
KERNELS = [CPP, TRITON]
ON_CPU = [CPP, "reference"]
BACKENDS = [*KERNELS, "reference"]
LAST = 1 - 2.0**-53
"""The largest number that torch.rand draws."""


def random_case(h, w, factor, n=7, dtype=torch.float32, seed=0):
    """Logits [n, h, w], masks that they predict roughly, and draws.

    Logits are whole numbers, 1 more than a multiple of 7. Bilinear weights are multiples of 1 / (4 s^2) with the sum 1:
    no upsampled logit is 0 (7 does not divide 4 s^2), and no rounding takes one to the other side of 0. Object 0 is
    predicted perfectly, 1 absent, 2 fills the image, 3 fills it and is predicted perfectly, 4 has saturated logits.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = 7.0 * torch.randint(-4, 5, (n, h, w), generator=generator) + 1
    logits[3] = 8.0
    logits[4] = torch.where(logits[4] > 0, 1e4, -1024.0)
    logits = logits.to(dtype)
    full = F.interpolate(logits[:, None].double(), scale_factor=factor, mode="bilinear")[:, 0]
    assert full.abs().min() > 1e-3
    noise = 5 * torch.randn(full.shape, generator=generator)
    targets = full + noise.where(torch.arange(n)[:, None, None] > 0, 0.0) > 0
    targets[1], targets[2:4] = False, True
    return logits, targets, torch.rand(n, dtype=torch.float64, generator=generator)


def click(operator, backend, *inputs):
    """Coordinates and signs of one back end, as lists; Triton runs on a GPU where there is one."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    inputs = [value.to(device) if isinstance(value, torch.Tensor) else value for value in inputs]
    coords, positive = operator.overloads[backend](*inputs)
    assert coords.dtype == torch.int64 and positive.dtype == torch.bool
    return coords.tolist(), positive.tolist()


def assert_as_reference(backend, logits, targets, uniform, packed=False):
    for operator, extra in ((click_uniform, (uniform,)), (click_center, ())):
        inputs = logits, targets, packed, *extra
        assert click(operator, backend, *inputs) == click(operator, "reference", *inputs), operator.name


def logits_of(predicted):
    return predicted.float() - 0.5


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    "shape, dtype",
    [((1, 1), torch.float32), ((19, 35), torch.float32), ((5, 3), torch.bfloat16), ((5, 3), torch.float16)],
)
@pytest.mark.parametrize("backend", [CPP])
def test_cpp_takes_the_pixel_of_the_reference(backend, shape, dtype, factor, poison_empty):
    logits, targets, uniform = random_case(*shape, factor, dtype=dtype)
    assert_as_reference(backend, logits, targets, uniform)
    assert_as_reference(backend, logits, pack_masks(targets), uniform, packed=True)


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("backend", [TRITON])
def test_triton_takes_the_pixel_of_the_reference(backend, factor, poison_empty):
    logits, targets, uniform = random_case(2, 3, factor, n=6, dtype=torch.float16 if factor == 2 else torch.float32)
    assert_as_reference(backend, logits[:5], targets[:5], uniform[:5])
    assert_as_reference(backend, logits[4:], pack_masks(targets[4:]), uniform[4:], packed=True)


@pytest.mark.parametrize("backend", [TRITON])
def test_triton_on_more_rows_and_columns_than_one_block(backend, poison_empty):
    logits, targets, uniform = (value[4:] for value in random_case(3, 300, 1, n=6))
    assert_as_reference(backend, logits, targets, uniform)
    assert_as_reference(backend, logits[1:].mT, targets[1:].mT, uniform[1:])
    # The deepest pixel of each kind lies behind the first block of columns.
    missed, false = torch.zeros(2, 1, 3, 300, dtype=torch.bool)
    missed[..., 200:203] = false[..., 290:293] = True
    truth, predicted = torch.cat([missed, missed & false]), torch.cat([missed & false, false])
    assert click(click_center, backend, logits_of(predicted), truth, False) == ([[201, 1], [291, 1]], [True, False])


@pytest.mark.parametrize("backend", KERNELS)
def test_strides_and_bytes_change_nothing(backend, poison_empty):
    logits, targets, uniform = random_case(3, 5, 2)
    bits = pack_masks(targets)
    strided = F.pad(logits, (1, 0)).mT.contiguous().mT[..., 1:]
    columns = targets.mT.contiguous().mT
    spread = bits.repeat_interleave(2, dim=2)[..., ::2]
    assert not (strided.is_contiguous() or columns.is_contiguous() or spread.is_contiguous())
    assert_as_reference(backend, strided, columns, uniform)
    assert_as_reference(backend, logits, targets.byte() * 254, uniform.repeat_interleave(2)[::2])
    assert_as_reference(backend, strided[:1].expand(3, -1, -1), spread[4:], uniform[4:], packed=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_count_wrong_pixels_row_by_row(backend, poison_empty):
    truth, predicted = torch.rand(2, 1, 4, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    wrong = (truth ^ predicted)[0].nonzero()
    size = len(wrong)
    uniform = torch.cat([(torch.arange(size) + 0.5) / size, torch.tensor([0, LAST], dtype=torch.float64)])
    expected = torch.cat([wrong, wrong[[0, -1]]])
    n = len(uniform)
    coords, positive = click(
        click_uniform, backend, logits_of(predicted).expand(n, -1, -1), truth.expand(n, -1, -1), False, uniform
    )
    assert coords == expected.flip(1).tolist()
    assert positive == truth[0][expected[:, 0], expected[:, 1]].tolist() and 0 < sum(positive) < n


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_errors(backend, poison_empty):
    """Uniform clicks fall on the background; the largest draw stays on the image."""
    truth = torch.ones(3, 4, 4, dtype=torch.bool)
    truth[:2, :, 3] = False
    uniform = torch.tensor([0.3, LAST, LAST], dtype=torch.float64)
    logits = logits_of(truth)
    assert click(click_uniform, backend, logits, truth, False, uniform) == ([[3, 1], [3, 3], [0, 0]], [False] * 3)
    assert click(click_center, backend, logits, truth, False) == ([[0, 0]] * 3, [False] * 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_objects(backend, poison_empty):
    logits, targets, uniform = (x[:0] for x in random_case(3, 3, 2))
    assert click(click_uniform, backend, logits, targets, False, uniform) == ([], [])
    assert click(click_center, backend, logits, targets, False) == ([], [])
    for function in (uniform_click, center_click):
        coords, labels = function(targets, None, backend="reference")
        assert coords.shape == (0, 1, 2) and labels.shape == (0, 1)


def follows_uniform(counts) -> bool:
    """Pearson's chi-square test of equal probabilities, at four standard deviations."""
    freedom = len(counts) - 1
    return ((counts - counts.mean()) ** 2 / counts.mean()).sum() < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("backend", ON_CPU)
def test_uniform_clicks_are_even_over_all_wrong_pixels(backend):
    logits, targets, _ = random_case(3, 4, 4, seed=3)
    logits, truth = logits[5:6], targets[5:6]
    predicted = reference.full_resolution(logits, truth, False)[1]
    wrong = (truth ^ predicted)[0].flatten().numpy()
    draws = 200 * int(wrong.sum())
    generator = torch.Generator().manual_seed(0)
    coords, labels = uniform_click(
        truth.expand(draws, -1, -1), logits.expand(draws, -1, -1), generator=generator, backend=backend
    )
    x, y = coords[:, 0].long().unbind(-1)
    assert torch.equal(labels[:, 0].bool(), truth[0, y, x]) and 0 < labels.sum() < draws
    counts = np.bincount((y * 16 + x).numpy(), minlength=len(wrong))
    assert wrong.sum() > 10 and counts[~wrong].sum() == 0
    assert follows_uniform(counts[wrong])
    assert not follows_uniform(counts[wrong] * (1 + 0.2 * (np.arange(wrong.sum()) % 2)))  # the test can fail


def test_squared_depth_is_the_distance_to_the_nearest_pixel_outside():
    region = torch.rand(3, 11, 17, generator=torch.Generator().manual_seed(0)) < 0.9
    outside = torch.nonzero(~F.pad(region, (1, 1, 1, 1)))
    expected = torch.zeros(region.shape)
    for n, y, x in torch.nonzero(region).tolist():
        points = outside[outside[:, 0] == n, 1:] - torch.tensor([y + 1, x + 1])
        expected[n, y, x] = points.square().sum(1).min()
    assert torch.equal(reference.squared_depth(region), expected)
    assert torch.equal(reference.squared_depth(region, max_elements=1), expected)  # row by row


@pytest.mark.parametrize("backend", ON_CPU)
def test_center_click_takes_the_deeper_of_the_two_error_regions(backend):
    missed, false = torch.zeros(2, 1, 40, 40, dtype=torch.bool)
    missed[:, 5:10, 5:10] = True
    false[:, 20:31, 20:31] = True
    truth, predicted = torch.cat([missed, false]), torch.cat([false, missed])
    coords, labels = center_click(truth, logits_of(predicted), backend=backend)
    assert coords.tolist() == [[[25, 25]], [[25, 25]]] and labels.tolist() == [[0], [1]]
    assert coords.dtype == torch.float32 and labels.dtype == torch.int32


@pytest.mark.parametrize("shape", [(1, 50), (50, 1), (2, 31), (33, 33), (40, 90)])
@pytest.mark.parametrize("backend", [CPP])
def test_centers_of_all_kinds_of_regions(backend, shape):
    """Dense and sparse noise, ellipses with holes, everything missed, everything false; many ties."""
    generator = torch.Generator().manual_seed(sum(shape))
    height, width = shape
    rows, columns = torch.arange(height)[:, None] / height, torch.arange(width) / width
    masks = [torch.rand(2, *shape, generator=generator) < share for share in (0.02, 0.3, 0.7, 0.98) for _ in range(10)]
    for _ in range(40):
        y, x, a, b = torch.rand(4, 2, 1, 1, generator=generator)
        holes = torch.rand(2, *shape, generator=generator) > 0.01
        masks.append((((rows - y) / (a + 0.1)) ** 2 + ((columns - x) / (b + 0.1)) ** 2 < 0.5) & holes)
    ones, zeros = torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    truth, predicted = torch.stack([*masks, torch.stack([ones, zeros]), torch.stack([zeros, ones])]).unbind(1)
    inputs = logits_of(predicted), truth, False
    assert click(click_center, backend, *inputs) == click(click_center, "reference", *inputs)


@pytest.mark.parametrize("backend", [CPP])
def test_threads_do_not_change_the_result(backend):
    logits, targets, uniform = random_case(70, 9, 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert_as_reference(backend, logits, targets, uniform)
    finally:
        torch.set_num_threads(before)


def test_logits_with_a_channel_and_no_logits():
    logits, targets, _ = random_case(5, 3, 4)
    for function in (uniform_click, center_click):
        torch.manual_seed(0)
        with_channel = function(targets, logits[:, None])
        torch.manual_seed(0)
        assert all(map(torch.equal, with_channel, function(targets, logits)))
        coords, labels = function(targets, None)
        x, y = coords[:, 0].long().unbind(-1)
        present = targets.flatten(1).any(1)
        assert torch.equal(labels[:, 0].bool(), present) and 0 < present.sum() < len(present)
        assert torch.equal(targets[torch.arange(len(targets)), y, x], present)


def test_generator():
    logits, targets, _ = random_case(9, 9, 4)
    coords = [uniform_click(targets, logits, generator=torch.Generator().manual_seed(s))[0] for s in (1, 1, 2)]
    assert torch.equal(coords[0], coords[1]) and not torch.equal(coords[0], coords[2])
    torch.manual_seed(1)
    assert torch.equal(uniform_click(targets, logits)[0], coords[0])
    # One float64 number for each object, and no other use of the generator.
    expected = torch.Generator().manual_seed(1)
    torch.rand(len(targets), 1, dtype=torch.float64, generator=expected)
    assert torch.equal(torch.get_rng_state(), expected.get_state())
    center_click(targets, logits)
    assert torch.equal(torch.get_rng_state(), expected.get_state())


@pytest.mark.parametrize("backend", ON_CPU)
def test_float64_autocast_and_gradients(backend):
    """Float64 runs on the reference; autocast changes nothing; clicks have no gradient."""
    logits, targets, _ = random_case(5, 3, 4)
    want = center_click(targets, logits, backend=backend)
    assert all(map(torch.equal, want, center_click(targets, logits.double())))
    with torch.autocast("cpu", torch.bfloat16):
        got = center_click(targets, logits.requires_grad_(), backend=backend)
    assert all(map(torch.equal, want, got)) and not got[0].requires_grad


@pytest.mark.parametrize("operator", [click_uniform, click_center], ids=lambda operator: operator.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_passes_opcheck_and_compiles(backend, operator):
    logits, targets, uniform = (value[4:] for value in random_case(2, 3, 2, n=6))
    inputs = (logits, targets, False) if operator is click_center else (logits, targets, False, uniform)
    if backend == "triton" and torch.cuda.is_available():
        inputs = tuple(value.cuda() if isinstance(value, torch.Tensor) else value for value in inputs)
    run = operator.overloads[backend]
    torch.library.opcheck(run, inputs)
    torch.library.opcheck(run, (inputs[0].requires_grad_(), *inputs[1:]))

    compiled = torch.compile(lambda *args: run(*args)[0] + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), run(*inputs)[0] + 1)


def test_uniform_click_compiles_for_varying_sizes():
    compiled = torch.compile(uniform_click, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (5, 6):
        logits, targets, _ = random_case(3, 3, 4, n=n)
        torch.manual_seed(0)
        want = uniform_click(targets, logits)
        torch.manual_seed(0)
        assert all(map(torch.equal, want, compiled(targets, logits)))


def test_functions_compile():
    logits, targets, _ = random_case(3, 3, 4)
    for function in (uniform_click, center_click):
        for given in (logits, None):
            torch.manual_seed(0)
            want = function(targets, given)
            torch.manual_seed(0)
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            assert all(map(torch.equal, want, compiled(targets, given)))


@pytest.mark.parametrize("run", [reference.click_uniform, reference.click_center])
def test_reference_never_waits_for_a_value(run):
    """Tensors without values."""
    inputs = random_case(3, 3, 2)
    with FakeTensorMode() as mode:
        logits, targets, uniform = map(mode.from_tensor, inputs)
        extra = (uniform,) if run is reference.click_uniform else ()
        coords, positive = run(logits, targets, False, *extra)
        assert coords.shape == (7, 2) and positive.shape == (7,)
        coords, labels = uniform_click(targets, logits)
        assert coords.shape == (7, 1, 2) and labels.shape == (7, 1)
        with pytest.raises(RuntimeError):
            labels.sum().item()


def test_flops():
    library.register_flop_formulas()
    logits, targets, _ = random_case(3, 5, 4)
    library.register_flop_formulas()
    with FlopCounterMode(display=False) as counter:
        uniform_click(targets, logits)
        center_click(pack_masks(targets), logits, packed=True)
    assert counter.get_total_flops() == 2 * 3 * 7 * 12 * 20


MASKS = torch.zeros(2, 8, 12, dtype=torch.bool)
LOGITS = torch.zeros(2, 2, 3)


@pytest.mark.parametrize("function", [uniform_click, center_click])
@pytest.mark.parametrize(
    ("targets", "logits", "options", "message"),
    [
        (MASKS, torch.zeros(2, 3, 2, 3), {}, r"logits must be \[N, h, w\] or \[N, 1, h, w\].*not \[2, 3, 2, 3\]"),
        (MASKS, torch.zeros(2, 1, 1, 2, 3), {}, r"logits must be \[N, h, w\] or"),
        (MASKS, LOGITS.int(), {}, "logits must be floating point"),
        (MASKS, LOGITS[0], {}, "logits must be floating point"),
        (MASKS, torch.zeros(2, 3, 3), {}, "do not fit logits .* resize the masks"),
        (MASKS, LOGITS[:1], {}, "do not fit logits"),
        (MASKS.int(), LOGITS, {}, "targets must be bool or uint8"),
        (MASKS[0], None, {}, r"targets must be bool or uint8 \[N, H, W\], not torch.bool \[8, 12\]"),
        (MASKS, LOGITS, {"packed": True}, "packed targets must be uint8"),
        (MASKS.byte(), LOGITS, {"packed": True}, r"ceil\(s \* w / 8\)"),
        (pack_masks(MASKS), None, {"packed": True}, r"instead of None pass .*torch.zeros\(\(\)\).expand"),
        (MASKS, LOGITS.to("meta"), {}, "logits are on meta, targets on cpu: move one"),
        (MASKS, LOGITS.double(), {"backend": "cpp"}, "takes bfloat16, float16, float32, not float64"),
    ],
)
def test_mistakes_are_named(function, targets, logits, options, message):
    with pytest.raises(ValueError, match=message):
        function(targets, logits, **options)


def test_remedy_for_packed_targets_without_logits():
    masks = random_case(3, 5, 2)[1][2:]
    empty = torch.zeros(()).expand(masks.shape)
    got = center_click(pack_masks(masks), empty, packed=True)
    assert all(map(torch.equal, got, center_click(masks, None)))


@pytest.mark.parametrize("backend", [CPP])
def test_cpp_refuses_what_does_not_fit(backend):
    logits, targets, uniform = random_case(3, 5, 2)
    for bad in (
        (logits[:, None], targets, False, uniform),
        (logits.double(), targets, False, uniform),
        (logits, targets.int(), False, uniform),
        (logits, targets[:-1], False, uniform),
        (logits, targets[:, :-1], False, uniform),
        (logits, targets, True, uniform),
        (logits[:, :0], targets[:, :0], False, uniform),
        (logits, targets, False, uniform.float()),
        (logits, targets, False, uniform[:-1]),
    ):
        with pytest.raises(RuntimeError, match="click_(sampling|uniform): "):
            click_uniform.overloads[backend](*bad)
