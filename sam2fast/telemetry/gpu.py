"""Memory and utilization of the training GPU, from NVML."""

from __future__ import annotations

from typing import Any

import torch


class GpuStats:
    """Calling it gives `gpu/memory_gb` (GiB in use) and `gpu/utilization` (percent of the last sample period).

    Nothing on a CPU, and where NVML (pynvml and a driver) is missing or does not answer: training does not need it.
    """

    def __init__(self, device: torch.device) -> None:
        self._handle = _open(device) if device.type == "cuda" else None

    def __call__(self) -> dict[str, float]:
        if self._handle is None:
            return {}
        import pynvml

        try:
            used = pynvml.nvmlDeviceGetMemoryInfo(self._handle).used
            busy = pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu
        except pynvml.NVMLError:
            return {}
        return {"gpu/memory_gb": used / 2**30, "gpu/utilization": float(busy)}


def _open(device: torch.device) -> Any:
    """NVML's handle of a torch device, found by UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices but not NVML's."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except ImportError:
        return None
    except pynvml.NVMLError:
        return None
