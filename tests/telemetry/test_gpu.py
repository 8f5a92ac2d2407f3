from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from sam2fast.telemetry.gpu import GpuStats


class NVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch):
    """A driver with one GPU, whose UUID is 1234; its answers can be changed by the test."""
    answers = SimpleNamespace(used=3 * 2**30, gpu=87, broken=False)

    def ask(value):
        if answers.broken:
            raise NVMLError("GPU is lost")
        return value

    handles = {"GPU-1234": "handle"}
    module = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: ask(None),
        nvmlDeviceGetHandleByUUID=lambda uuid: handles[uuid],
        nvmlDeviceGetMemoryInfo=lambda handle: ask(SimpleNamespace(used=answers.used)),
        nvmlDeviceGetUtilizationRates=lambda handle: ask(SimpleNamespace(gpu=answers.gpu)),
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    return answers


def test_a_gpu_is_found_by_its_uuid(nvml):
    assert GpuStats(torch.device("cuda", 0))() == {"gpu/memory_gb": 3.0, "gpu/utilization": 87.0}


def test_without_a_gpu_there_are_no_tags(nvml):
    assert GpuStats(torch.device("cpu"))() == {}


def test_without_pynvml_there_are_no_tags(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # makes the import fail
    assert GpuStats(torch.device("cuda", 0))() == {}


def test_a_driver_that_does_not_answer_is_no_error(nvml):
    stats = GpuStats(torch.device("cuda", 0))
    nvml.broken = True
    assert stats() == {}
    assert GpuStats(torch.device("cuda", 0))() == {}
