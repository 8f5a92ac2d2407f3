"""Process groups and training engines."""

from .engine import Engine, StepResult, build_engine
from .mesh import Ranks, setup, teardown

__all__ = ["Engine", "Ranks", "StepResult", "build_engine", "setup", "teardown"]
