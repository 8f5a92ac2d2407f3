"""Process groups and training engines."""

from .cuda_graphs import CudaCapture, GraphedSteps
from .engine import Engine, StepResult, build_engine
from .mesh import Ranks, setup, teardown

__all__ = ["CudaCapture", "Engine", "GraphedSteps", "Ranks", "StepResult", "build_engine", "setup", "teardown"]
