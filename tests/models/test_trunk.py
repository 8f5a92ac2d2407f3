"""The trunk's optimizations change no output and no gradient; stochastic depth keeps its distribution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from sam2fast.models.architecture import architecture
from sam2fast.models.layers import LayerNorm
from sam2fast.models.projections import GeluLinear, NormedLinear
from sam2fast.models.trunk import HieraTrunk
from sam2fast.models.windows import WindowGroup, WindowLayout, max_pool
from sam2fast.performance import PerformanceConfig, RecomputePolicy

SWITCHES = ("unpadded_windows", "skip_dropped_paths", "lean_projections")
ARCHITECTURES = {
    "tiny": {},
    "base_plus": {"num_heads": 2, "stages": (1, 2, 2, 2), "position_size": (14, 14), "global_attention_blocks": (4,)},
    "large": {"window_sizes": (8, 4, 16, 8)},
}
"""As the models of that name, with few and narrow blocks."""


def only(*switches: str) -> PerformanceConfig:
    return PerformanceConfig.all_off().model_copy(update=dict.fromkeys(switches, True))


def make(name: str = "tiny", *switches: str, drop_path: float = 0.0, seed: int = 0) -> HieraTrunk:
    """A trunk whose parameters are all far from zero, in float64."""
    trunk = HieraTrunk(architecture("micro", drop_path=drop_path, **ARCHITECTURES[name]), only(*switches)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return trunk


def images(*size: int, batch: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *size, dtype=torch.float64, generator=generator)


def results(trunk: HieraTrunk, x: torch.Tensor) -> list[torch.Tensor]:
    """Outputs, then the gradient of every parameter, of a random linear function of the outputs."""
    outputs = trunk(x)
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(out.shape, dtype=out.dtype, generator=generator) for out in outputs]
    loss = sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True))
    return [*outputs, *torch.autograd.grad(loss, list(trunk.parameters()))]


def assert_same(got: list[torch.Tensor], want: list[torch.Tensor], tolerance: float = 1e-11) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.detach().norm() + 1e-3))


@pytest.mark.parametrize("size", [(64, 64), (96, 128), (224, 96), (160, 480)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("name", list(ARCHITECTURES))
@pytest.mark.parametrize("switches", [*((name,) for name in SWITCHES), SWITCHES], ids="+".join)
def test_outputs_and_gradients_equal_timms(name, switches, size, poison_empty):
    x = images(*size)
    assert_same(results(make(name, *switches), x), results(make(name), x))


@pytest.mark.parametrize("switches", [(), SWITCHES], ids=["off", "on"])
def test_state_dict_is_timms(switches):
    torch.manual_seed(0)
    want = HieraTrunk(architecture("micro"), PerformanceConfig.all_off()).state_dict()
    torch.manual_seed(0)
    got = HieraTrunk(architecture("micro"), only(*switches)).state_dict()
    assert list(got) == list(want)
    assert all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize("window", [0, 4, 7, 14])
@pytest.mark.parametrize("size", [(7, 14), (8, 8), (18, 30)])
def test_layout_is_a_permutation_of_the_grid(window, size):
    grid = torch.arange(2 * size[0] * size[1]).view(2, *size, 1)
    layout = WindowLayout(*size, window)
    tokens = layout.to_tokens(grid)
    assert torch.equal(tokens.sort(dim=1).values, grid.flatten(1, 2))
    assert torch.equal(layout.to_grid(tokens), grid)
    if window == 4:
        assert layout.split(tokens)[0][0, :, 0].tolist() == grid[0, :4, :4].flatten().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_virtual_keys_count_as_all_the_padding(dtype):
    for group in WindowLayout(18, 18, 14).groups[1:]:
        bias = group.score_bias(torch.empty(0, dtype=dtype))[0, 0, 0].double()
        assert (bias[: group.tokens] == 0).all()
        assert bias[group.tokens :].exp().sum() == pytest.approx(group.padding, rel=2e-4)


class TestStochasticDepth:
    RATE = 0.5

    def keep_counts(self, trunk: HieraTrunk, x: torch.Tensor, draws: int) -> torch.Tensor:
        """How often each sample passes through the MLP branch of the last block."""
        counts = torch.zeros(len(x))
        for _ in range(draws):
            kept = trunk._draw_kept(x)[-1][1]
            counts[kept] += 1
        return counts

    def test_keeps_each_sample_with_the_rate_of_the_block(self):
        trunk = make("tiny", "skip_dropped_paths", drop_path=self.RATE).train()
        torch.manual_seed(0)
        shares = self.keep_counts(trunk, images(32, 32, batch=8), 1000) / 1000
        assert shares.tolist() == pytest.approx([1 - self.RATE] * 8, abs=0.07)  # four standard deviations

    def test_the_first_block_drops_nothing(self):
        trunk = make("tiny", "skip_dropped_paths", drop_path=self.RATE).train()
        assert all(len(kept) == 64 for kept in trunk._draw_kept(images(32, 32, batch=64))[0])

    @pytest.mark.parametrize("kept", [[], [1], [0, 2], [0, 1, 2]])
    def test_dropped_samples_pass_unchanged_and_others_are_scaled(self, kept):
        trunk = make("tiny", *SWITCHES, drop_path=self.RATE).train()
        block, layout = trunk.blocks[5], WindowLayout(4, 6, 14)
        x = torch.randn(3, 24, block.norm1.normalized_shape[0], dtype=torch.float64)
        index = torch.tensor(kept, dtype=torch.int64)
        with torch.no_grad():
            out = block(x, layout, index, index[:0])
            for sample in range(3):
                alone = block.eval()(x[sample : sample + 1], layout, None, torch.empty(0, dtype=torch.int64))
                step = alone[0] - x[sample] if sample in kept else torch.zeros_like(x[0])
                torch.testing.assert_close(out[sample], x[sample] + step / (1 - block.drop_path1.drop_prob))

    def test_of_fixed_sizes_masks_drop_with_the_rate_and_keep_the_mean(self):
        trunk = make("tiny", "skip_dropped_paths", drop_path=self.RATE).train()
        trunk.fixed_sizes = True
        torch.manual_seed(0)
        masks = torch.stack([trunk._draw_kept(images(32, 32, batch=64))[-1][1] for _ in range(50)])
        assert set(masks.unique().tolist()) == {0.0, 1 / (1 - self.RATE)}
        assert masks.mean().item() == pytest.approx(1, abs=0.08)  # four standard deviations
        assert (trunk._draw_kept(images(32, 32))[0][0] == 1).all()

    @pytest.mark.parametrize("kept", [[], [1], [0, 1, 2]])
    def test_a_mask_is_the_same_as_leaving_samples_out(self, kept):
        trunk = make("tiny", *SWITCHES, drop_path=self.RATE).train()
        block, layout = trunk.blocks[5], WindowLayout(4, 6, 14)
        x = torch.randn(3, 24, block.norm1.normalized_shape[0], dtype=torch.float64)
        index, mask = torch.tensor(kept, dtype=torch.int64), torch.zeros(3, 1, 1, dtype=torch.float64)
        mask[kept] = 1 / (1 - block.drop_path1.drop_prob)
        with torch.no_grad():
            torch.testing.assert_close(block(x, layout, mask, mask), block(x, layout, index, index))

    def test_masks_are_the_same_when_blocks_are_computed_again(self):
        x, found = images(64, 64, batch=3), []
        for policy in ("none", "trunk"):
            trunk = make("tiny", *SWITCHES, drop_path=self.RATE).train()
            trunk.fixed_sizes, trunk.recompute = True, RecomputePolicy.parse(policy)
            torch.manual_seed(0)
            found.append(results(trunk, x))
        assert_same(*found)

    def test_mask_decides_alike_whether_dropped_samples_are_skipped_or_multiplied(self, monkeypatch):
        """Both ways, all gradients, with masks that drop some, all and no samples of a branch."""
        x = images(64, 64, batch=3)
        skipping = make("tiny", *SWITCHES, drop_path=self.RATE).train()
        masking = make("tiny", drop_path=self.RATE).train()
        masks = [[[0, 1, 2]] * 2, [[0, 1, 2]] * 2, [[0], []], [[1, 2], [0, 2]], [[], []], [[2], [1]], [[0, 1], []]]
        for pair, block in zip(masks, masking.blocks, strict=True):
            for kept, drop in zip(pair, (block.drop_path1, block.drop_path2), strict=True):
                scale = torch.zeros(3, 1, 1, 1, dtype=torch.float64)
                scale[kept] = 1 / (1 - getattr(drop, "drop_prob", 0.0))
                drop.forward = scale.mul
        index = [tuple(torch.tensor(kept, dtype=torch.int64) for kept in pair) for pair in masks]
        monkeypatch.setattr(skipping, "_draw_kept", lambda images: index)
        assert_same(results(skipping, x), results(masking, x))

    def test_every_parameter_has_a_gradient_when_all_samples_are_dropped(self):
        trunk = make("tiny", *SWITCHES, drop_path=0.999).train()
        torch.manual_seed(0)
        sum(out.sum() for out in trunk(images(64, 64, batch=1))).backward()
        assert all(parameter.grad is not None for parameter in trunk.parameters())
        assert all(parameter.grad.isfinite().all() for parameter in trunk.parameters())
        assert not trunk.blocks[-1].mlp.fc1.weight.grad.any()

    def test_evaluation_drops_nothing(self):
        x = images(64, 64)
        got = make("tiny", *SWITCHES, drop_path=self.RATE).eval()(x)
        assert_same(got, make("tiny").eval()(x))

    def test_the_cpu_seed_decides(self):
        trunk, x = make("tiny", *SWITCHES, drop_path=self.RATE).train(), images(64, 64)

        def run(seed: int) -> torch.Tensor:
            torch.manual_seed(seed)
            return trunk(x)[-1].detach()

        assert torch.equal(run(3), run(3)) and not torch.equal(run(3), run(4))


@pytest.mark.parametrize("switches", [(), ("unpadded_windows",), SWITCHES], ids=["off", "unpadded", "on"])
def test_recomputed_blocks_give_the_same_gradients_and_keep_less(switches):
    trunk, x = make("tiny", *switches, drop_path=0.5).train(), images(64, 96)
    found, kept = [], []
    for trunk.recompute in (RecomputePolicy(), RecomputePolicy(trunk=True)):
        sizes = []
        torch.manual_seed(5)
        with saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            found.append(results(trunk, x))
        kept.append(sum(sizes))
    assert_same(*found, tolerance=0)
    assert kept[1] < kept[0] / 4


@pytest.mark.parametrize("switches", [(), *((name,) for name in SWITCHES), SWITCHES], ids="+".join)
def test_autocast_agrees_with_timms(switches):
    x = images(96, 96).float()
    want = results(make(), x.double())
    trunk, reference = make("tiny", *switches).float(), make().float()
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = results(trunk, x), results(reference, x)
    for a, b, exact in zip(got, plain, want, strict=True):
        assert a.dtype == b.dtype
        floor = (b - exact).norm()
        assert (a - exact).norm() <= 2 * floor + 1e-3 * exact.norm()


def test_a_block_compiles_whole():
    trunk = make("tiny", *SWITCHES)
    block, layout = trunk.blocks[-1], WindowLayout(4, 6, 14)
    x = torch.randn(2, 24, block.norm1.normalized_shape[0], dtype=torch.float64)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, layout), block(x, layout))


def test_runs_on_fake_tensors():
    trunk = HieraTrunk(architecture("micro", drop_path=0.5), PerformanceConfig()).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        outputs = trunk(torch.empty(2, 3, 96, 64))
    assert [tuple(out.shape[2:]) for out in outputs] == [(24, 16), (12, 8), (6, 4), (3, 2)]


def test_sides_must_be_multiples_of_32():
    with pytest.raises(ValueError, match=r"\[64, 80\]"):
        make("tiny", *SWITCHES)(images(64, 80))


class TestProjections:
    """In float64, over more rows than a CPU takes at once, and none."""

    @pytest.mark.parametrize("rows", [0, 1, 700])
    @pytest.mark.parametrize(
        "frozen", [(), ("x",), ("weight",), ("weight", "bias")], ids=lambda f: "+".join(f) or "none"
    )
    def test_gelu_linear_equals_the_plain_layers(self, frozen, rows, poison_empty):
        layer = GeluLinear(1024, 6).double()
        wrt = {"x": torch.randn(2, rows, 1024, dtype=torch.float64), "weight": layer.weight, "bias": layer.bias}
        assert_same(
            gradients(layer, wrt, frozen), gradients(lambda x: F.linear(F.gelu(x), *layer.parameters()), wrt, frozen)
        )

    @pytest.mark.parametrize("rows", [0, 1, 700])
    @pytest.mark.parametrize(
        "frozen",
        [(), ("x",), ("scale", "shift"), ("weight", "bias"), ("x", "scale", "shift")],
        ids=lambda f: "+".join(f) or "none",
    )
    @pytest.mark.parametrize("normalized", [False, True])
    def test_normed_linear_equals_the_plain_layers(self, normalized, frozen, rows, poison_empty):
        layer, norm = NormedLinear(16, 6).double(), LayerNorm(16, eps=1e-3).double()
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
        wrt = {"x": torch.randn(2, rows, 16, dtype=torch.float64), "weight": layer.weight, "bias": layer.bias}
        if normalized:
            wrt |= {"scale": norm.weight, "shift": norm.bias}

        def plain(x):
            x = F.layer_norm(x, (16,), *norm.parameters(), norm.eps) if normalized else x
            return F.linear(x, *layer.parameters())

        def run(x):
            return torch.cat(layer(x, norm if normalized else None, parts=3), dim=-1)

        assert_same(gradients(run, wrt, frozen), gradients(plain, wrt, frozen))

    def test_normed_linear_under_autocast(self):
        """As autocast runs the two layers, and only the tokens are kept, as they are."""
        layer, norm = NormedLinear(256, 48), LayerNorm(256)
        x = torch.randn(2, 50, 256, dtype=torch.bfloat16)
        wrt = {"x": x, "weight": layer.weight, "scale": norm.weight}
        kept = []
        with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            got = gradients(lambda x: torch.cat(layer(x, norm, parts=3), dim=-1), wrt)
        with torch.autocast("cpu", torch.bfloat16):
            want = gradients(lambda x: F.linear(norm(x), layer.weight, layer.bias), wrt)
        assert_same(got, want, tolerance=1e-2)
        assert {t.data_ptr() for t in kept if t.shape == x.shape} == {x.data_ptr()}


def gradients(run, wrt, frozen=()):
    """Output of `run`, float64 or bfloat16, then the gradients of a function of it that are not frozen."""
    for name, tensor in wrt.items():
        tensor.requires_grad_(name not in frozen)
    out = run(wrt["x"])
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weight).sum(), [t for t in wrt.values() if t.requires_grad])]


class TestMaxPool:
    GROUP = WindowGroup(rows=1, columns=1, height=6, width=4, padding=0)

    def pooled(self, x):
        return F.max_pool2d(x.unflatten(1, (6, 4)).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1).flatten(1, 2)

    @pytest.mark.parametrize("values", ["distinct", "equal", "few", "infinite"])
    def test_equals_torchs(self, values):
        torch.manual_seed(0)
        x = torch.randn(3, 24, 5, dtype=torch.float64)
        x = {"distinct": x, "equal": 0 * x, "few": x.round(), "infinite": x.round() / 0}[values].nan_to_num(0, 9, -9)
        x = torch.where(x < -8, -torch.inf, x).requires_grad_()
        weight = torch.randn(3, 6, 5, dtype=torch.float64)
        got, want = max_pool(x, self.GROUP), self.pooled(x)
        assert torch.equal(got, want)
        assert torch.equal(*(torch.autograd.grad((out * weight).sum(), x)[0] for out in (got, want)))

    def test_nan_stays(self):
        x = torch.zeros(1, 24, 1, requires_grad=True)
        assert max_pool(torch.where(torch.arange(24).view(1, 24, 1) == 5, torch.nan, x), self.GROUP).isnan().sum() == 1

    def test_keeps_a_byte_per_output(self):
        kept = []
        with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            max_pool(torch.randn(3, 24, 5, requires_grad=True), self.GROUP)
        assert sum(t.untyped_storage().nbytes() for t in kept) == 3 * 6 * 5
