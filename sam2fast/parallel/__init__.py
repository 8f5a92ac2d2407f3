"""Process groups and training engines."""

from .background import BackgroundRanks
from .cuda_graphs import CudaCapture, GraphedSteps
from .engine import Engine, StepResult, build_engine
from .mesh import Ranks, setup, teardown
from .state import EngineState

__all__ = [
    "BackgroundRanks",
    "CudaCapture",
    "Engine",
    "EngineState",
    "GraphedSteps",
    "Ranks",
    "StepResult",
    "build_engine",
    "setup",
    "teardown",
]
