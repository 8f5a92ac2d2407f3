"""One launch of a Triton kernel as data: to run it, or to compile it for a GPU that is not there (aot.py)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


def multiprocessors(tensor: Tensor) -> int:
    """Of the GPU of a tensor; 1 on a CPU, where kernels are interpreted."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1


class Launch(NamedTuple):
    """Every tensor of a launch is on the same device."""

    kernel: Any
    """A `triton.jit` function."""
    programs: int
    arguments: dict[str, Any]
    """By name of the parameter: tensors, numbers and compile-time constants."""
    warps: int = 4
    stages: int = 3
    """Iterations of a loop whose loads are in flight at a time."""

    def run(self) -> None:
        """Launch on the current stream of the device that the tensors are on; no programs, no launch."""
        tensor = next(value for value in self.arguments.values() if isinstance(value, Tensor))
        if self.programs:
            with torch.cuda.device_of(tensor):
                self.kernel[(self.programs,)](**self.arguments, num_warps=self.warps, num_stages=self.stages)
