"""The benchmark of run-length masks: all providers agree, a wrong pixel is a fault, a mistake in the shape is named."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from sam2fast_kernels import library

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def case(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("cases").load("rle")


@pytest.mark.parametrize("text", ["random", "random@37"])
def test_a_wrong_pixel_is_a_fault(case, text):
    inputs = case.make_inputs(case.shape(text), torch.device("cpu"))
    expected = case.reference(inputs)
    for name, provider in case.providers.items():
        if provider.obstacle(torch.device("cpu")):
            assert not library.load_native()
            continue
        observed = case.observe(provider.prepare(), inputs)
        assert case.fault(name, observed, expected) is None
        observed["frame 0"][3, 1, 0] ^= 1
        assert case.fault("cpp", observed, expected) == "frame 0: 1 pixels are wrong"


def test_mistakes_in_the_shape_are_named(case, monkeypatch, tmp_path):
    monkeypatch.setenv("SAM2FAST_TEST_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"needs sav/\*_manual.json .* in .*; set SAM2FAST_TEST_DATA"):
        case.shape("sav@1024")
    for text in ("davis", "sav@0", "8x3"):
        with pytest.raises(ValueError, match=f"unknown shape '{text}' of case rle: write sav"):
            case.shape(text)
