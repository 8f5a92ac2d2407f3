"""Sizes, versions and the errors of wrong ones."""

from __future__ import annotations

import pytest
import torch

from sam2fast.models.architecture import SIZES, architecture
from sam2fast.models.sam2 import SAM2


@pytest.mark.parametrize(
    ("size", "version", "parameters"),
    [
        ("tiny", "2.1", 38_962_498),
        ("small", "2.1", 46_060_354),
        ("base_plus", "2.1", 80_850_178),
        ("large", "2.1", 224_446_642),
        ("base_plus", "2.0", 80_833_666),
    ],
)
def test_parameter_counts_are_the_official_ones(size, version, parameters):
    with torch.device("meta"):
        model = SAM2(architecture(size, version))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_overrides_replace_single_fields():
    assert architecture("tiny", max_conditioning_frames=4).max_conditioning_frames == 4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"size": "huge"}, ["huge", *SIZES]),
        ({"size": "tiny", "version": "2"}, ["2.0", "2.1"]),
        ({"size": "tiny", "image_size": 1000}, ["1000", "multiple of 32"]),
        ({"size": "tiny", "image_size": 0}, ["0", "multiple of 32"]),
    ],
)
def test_a_wrong_choice_names_the_right_ones(arguments, named):
    with pytest.raises(ValueError) as error:
        architecture(**arguments)
    assert all(word in str(error.value) for word in named)


def test_drop_path_grows_with_depth():
    with torch.device("meta"):
        trunk = SAM2(architecture("tiny", drop_path=0.3)).image_encoder.trunk
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in trunk.blocks]
    assert rates == pytest.approx(torch.linspace(0, 0.3, len(rates)).tolist())
