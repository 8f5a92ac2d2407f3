from __future__ import annotations

import math

import pytest
import torch

from sam2fast.config import ConfigError, OptimConfig
from sam2fast.models.architecture import architecture
from sam2fast.models.sam2 import SAM2
from sam2fast.optim import build_groups, freeze, learning_rate


def meta_model(size="micro"):
    with torch.device("meta"):
        return SAM2(architecture(size))


def by_name(groups):
    return {name: group for group in groups for name in group["names"]}


def test_every_trained_parameter_is_in_one_group():
    model = meta_model()
    groups = build_groups(model, OptimConfig(layer_decay=0.9, encoder_lr=1e-5))
    parameters = [parameter for group in groups for parameter in group["params"]]
    assert len({id(p) for p in parameters}) == len(parameters) == len(list(model.parameters()))
    assert all(len(group["params"]) == len(group["names"]) for group in groups)


def test_rates_fall_with_the_depth_of_the_trunk():
    """Start rates of the official MOSE fine-tuning of B+."""
    groups = by_name(build_groups(meta_model("base_plus"), OptimConfig(lr=5e-6, encoder_lr=3e-6, layer_decay=0.9)))
    want = {
        "image_encoder.trunk.patch_embed.proj.weight": 3e-6 * 0.9**25,
        "image_encoder.trunk.blocks.0.mlp.layers.0.weight": 3e-6 * 0.9**24,
        "image_encoder.trunk.blocks.23.attn.qkv.bias": 3e-6 * 0.9,
        "image_encoder.trunk.pos_embed": 3e-6,
        "image_encoder.trunk.pos_embed_window": 3e-6,
        "image_encoder.neck.convs.0.conv.weight": 3e-6,
        "sam_mask_decoder.conv_s0.weight": 5e-6,
        "maskmem_tpos_enc": 5e-6,
    }
    for name, rate in want.items():
        assert groups[name]["base_lr"] == groups[name]["lr"] == pytest.approx(rate, rel=1e-12), name


def test_biases_and_layer_norms_are_not_decayed():
    groups = by_name(build_groups(meta_model(), OptimConfig(weight_decay=0.3)))
    for name in (
        "image_encoder.trunk.blocks.0.norm1.weight",
        "memory_attention.norm.weight",
        "sam_mask_decoder.transformer.layers.0.norm1.weight",
        "image_encoder.trunk.blocks.0.mlp.layers.0.bias",
        "memory_encoder.fuser.layers.0.norm.bias",
    ):
        assert groups[name]["weight_decay"] == 0, name
    for name in (
        "memory_encoder.fuser.layers.0.norm.weight",  # LayerNorm2d is not an nn.LayerNorm
        "memory_encoder.fuser.layers.0.gamma",
        "image_encoder.trunk.pos_embed",
        "no_mem_embed",
        "image_encoder.trunk.blocks.0.mlp.layers.0.weight",
    ):
        assert groups[name]["weight_decay"] == 0.3, name


def test_without_layer_decay_there_are_four_groups():
    groups = build_groups(meta_model(), OptimConfig(lr=1e-4))
    assert len(groups) == 4
    assert {(g["label"], g["weight_decay"]) for g in groups} == {
        (label, decay) for label in ("base", "encoder") for decay in (0.0, 0.1)
    }
    assert {group["base_lr"] for group in groups} == {1e-4}


def test_frozen_parameters_are_in_no_group():
    model = meta_model()
    frozen = freeze(model, ["encoder", "memory"])
    names = by_name(build_groups(model, OptimConfig(layer_decay=0.9)))
    assert not set(names) & set(frozen)
    assert all(name.startswith(("sam_prompt_encoder.", "sam_mask_decoder.")) for name in names)


@pytest.mark.parametrize(
    ("part", "member", "outsider"),
    [
        ("encoder", "image_encoder.neck.convs.0.conv.bias", "sam_mask_decoder.conv_s0.weight"),
        ("prompt_encoder", "sam_prompt_encoder.not_a_point_embed.weight", "sam_mask_decoder.conv_s0.weight"),
        ("mask_decoder", "sam_mask_decoder.conv_s0.weight", "obj_ptr_proj.layers.0.weight"),
        ("memory", "maskmem_tpos_enc", "sam_mask_decoder.conv_s0.weight"),
        ("memory", "memory_encoder.out_proj.weight", "image_encoder.trunk.pos_embed"),
        (
            "image_encoder.trunk.*",
            "image_encoder.trunk.blocks.1.mlp.layers.1.bias",
            "image_encoder.neck.convs.0.conv.bias",
        ),
        ("*.bias", "memory_attention.norm.bias", "memory_attention.norm.weight"),
    ],
)
def test_parts_and_patterns_select_official_names(part, member, outsider):
    frozen = freeze(meta_model(), [part])
    assert member in frozen
    assert outsider not in frozen


def test_freezing_anew_frees_what_another_stage_froze():
    model = meta_model()
    freeze(model, ["memory"])
    assert freeze(model, []) == []
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("encodr", "'encoder'"),
        ("memory_atention.*", "'memory_attention.*'"),
        ("image_encoder", "'image_encoder.*'"),
        ("image_encoder.trunk.block.0.*", "'image_encoder.trunk.blocks.0.*'"),
        ("no_mem_embd", "'no_mem_embed'"),
        ("qqq", "did you mean"),
    ],
)
def test_a_pattern_that_selects_nothing_is_an_error_with_the_nearest_one(pattern, nearest):
    with pytest.raises(ConfigError, match="did you mean") as error:
        freeze(meta_model(), ["memory", pattern])
    assert repr(pattern) in str(error.value)
    assert nearest in str(error.value)


def test_freezing_everything_is_an_error_and_changes_nothing():
    model = meta_model()
    with pytest.raises(ConfigError, match="no parameter to train"):
        freeze(model, ["*"])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_constant_schedule_with_warmup():
    optim = OptimConfig(schedule="constant", warmup=4)
    assert [learning_rate(optim, step, 10) for step in range(7)] == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert learning_rate(OptimConfig(schedule="constant"), 0, 10) == 1


def test_cosine_schedule():
    optim = OptimConfig(schedule="cosine", final_scale=0.1)
    assert learning_rate(optim, 0, 100) == 1
    assert learning_rate(optim, 25, 100) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate(optim, 50, 100) == pytest.approx(0.55)
    assert learning_rate(optim, 100, 100) == pytest.approx(0.1)
    warm = OptimConfig(schedule="cosine", final_scale=0.0, warmup=20)
    assert learning_rate(warm, 10, 100) == 0.5
    assert learning_rate(warm, 20, 100) == 1
    assert learning_rate(warm, 60, 100) == pytest.approx(0.5)


def test_inverse_square_root_schedule_of_the_paper():
    """Where timescale and warm-up are equal, as there, the rate between warm-up and cool-down is sqrt(1000 / step)."""
    optim = OptimConfig(schedule="inverse_sqrt", timescale=1000, warmup=1000, cooldown=5000)
    total = 90_000
    assert learning_rate(optim, 500, total) == 0.5
    assert learning_rate(optim, 1000, total) == 1
    assert learning_rate(optim, 4000, total) == pytest.approx(0.5)
    assert learning_rate(optim, 85_000, total) == pytest.approx(math.sqrt(1000 / 85_000))
    assert learning_rate(optim, 87_500, total) == pytest.approx(math.sqrt(1000 / 87_500) / 2)
    assert learning_rate(optim, total, total) == 0


@pytest.mark.parametrize("schedule", ["constant", "cosine", "inverse_sqrt"])
@pytest.mark.parametrize(("warmup", "cooldown", "total"), [(0, 0, 1), (10, 0, 5), (3, 9, 10), (5, 5, 5)])
def test_rates_stay_between_zero_and_one(schedule, warmup, cooldown, total):
    optim = OptimConfig(schedule=schedule, warmup=warmup, cooldown=cooldown)
    assert all(0 <= learning_rate(optim, step, total) <= 1 for step in range(total + 1))
