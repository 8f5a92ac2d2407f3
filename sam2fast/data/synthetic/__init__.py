"""Seeded synthetic datasets in the formats sam2fast reads, for first runs, tests and measurements without real data."""

from .dataset import FORMATS, SyntheticError, main, write_dataset
from .scene import Scene, SceneConfig

__all__ = ["FORMATS", "Scene", "SceneConfig", "SyntheticError", "main", "write_dataset"]
