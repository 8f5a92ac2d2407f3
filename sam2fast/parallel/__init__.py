"""Process groups and training engines."""

from .agreement import StepAgreement
from .cuda_graphs import CudaCapture, GraphedSteps
from .engine import Engine, StepResult, build_engine, check_engine
from .mesh import Ranks, setup, teardown
from .place import HERE
from .state import EngineState
from .watchdog import LostRankError, Watchdog

__all__ = [
    "HERE",
    "CudaCapture",
    "Engine",
    "EngineState",
    "GraphedSteps",
    "LostRankError",
    "Ranks",
    "StepAgreement",
    "StepResult",
    "Watchdog",
    "build_engine",
    "check_engine",
    "setup",
    "teardown",
]
