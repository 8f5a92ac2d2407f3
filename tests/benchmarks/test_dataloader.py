"""The dataloader benchmark: three objects out of one, and a check that a wrong pipeline does not pass."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def case(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    yield importlib.import_module("cases.dataloader").CASE
    torch.set_num_threads(threads)


def test_pipelines_pass_their_check_and_wrong_ones_do_not(case, shared_data, monkeypatch):
    monkeypatch.setenv("SAM2FAST_TEST_DATA", str(shared_data))
    for text in ("finetune-2x3@256", "staged-2x2@256"):
        inputs = case.make_inputs(case.shape(text), torch.device("cpu"))
        expected = case.reference(inputs)
        for name, run in ((name, provider.prepare()) for name, provider in case.providers.items()):
            observed = case.observe(run, inputs)
            assert case.fault(name, observed, expected) is None, (text, name)
            times = case.measure(run, inputs, case.modes, torch.device("cpu"))
            assert list(times) == list(case.modes) and min(times.values()) >= 0
        mirrored = {name: value.flip(-1) for name, value in observed.items()}
        assert "levels" in case.fault(name, mirrored, expected)
        assert "IoU" in case.fault(name, observed | {"masks 1": mirrored["masks 1"]}, expected)


def test_without_real_data_the_videos_are_synthetic(case, monkeypatch, tmp_path, capsys):
    clips = importlib.import_module("loading.clips")
    monkeypatch.setenv("SAM2FAST_TEST_DATA", str(tmp_path / "absent"))
    dataset = clips.open_clips(tmp_path / "clips")
    assert len(dataset) == 3 and dataset[0].size == (480, 854)
    assert "synthetic videos instead" in capsys.readouterr().err


def test_thirds_have_equal_areas_from_left_to_right(case):
    clips = importlib.import_module("loading.clips")
    mask = np.random.default_rng(0).random((30, 50)) < 0.4
    labels = clips.thirds(mask)
    assert ((labels > 0) == mask).all()
    areas = [(labels == number).sum() for number in (1, 2, 3)]
    assert max(areas) - min(areas) <= 1
    columns = [np.nonzero(labels == number)[1] for number in (1, 2, 3)]
    assert columns[0].max() <= columns[1].min() and columns[1].max() <= columns[2].min()


def test_shapes_are_checked(case):
    for text in ("8x3@1024", "paper-8x3@1024", "staged-8x4@1024", "staged-8x3@1000"):
        with pytest.raises(ValueError, match="write RECIPE-FRAMESxOBJECTS@SIDE"):
            case.shape(text)
