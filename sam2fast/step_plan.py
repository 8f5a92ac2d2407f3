"""What shapes the graph of each step: a function of configuration, stage and step alone, drawn one step ahead so that
ranks can find out whether they agree before they begin it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from .config import StageConfig
from .data.mixture import Mixture
from .models.plan import RolloutPlan, draw_plan


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step, equal on all ranks."""

    stage: str
    step: int
    """Steps of the stage before it."""
    item: int
    """Index of the entry of `data`."""
    dataset: str
    frames: int
    batch_size: int
    accumulate: int
    rollout: RolloutPlan
    """One for all micro-steps and ranks: graphs of different shape would deadlock sharded training, and N micro-steps
    then are one batch N times as large."""

    def facts(self) -> dict[str, Any]:
        """Plain values, by the names that an error shows."""
        values = {name: value for name, value in vars(self).items() if name != "rollout"}
        rollout = {f"rollout.{name}": value for name, value in asdict(self.rollout).items()}
        return {**values, **rollout, "step": self.step + 1}


class StepPlanner:
    """Plans of the steps of a stage.

    Args:
        seed: of the run.
        index: place of the stage in the recipe.
    """

    def __init__(self, stage: StageConfig, seed: int, index: int) -> None:
        self._stage, self._seed, self._index = stage, seed, index
        self._mixture = Mixture(stage, seed, index)

    def plan(self, step: int) -> StepPlan | None:
        """Of step `step` (from 0); None after the last."""
        stage = self._stage
        if step >= stage.steps:
            return None
        index = self._mixture.item(step)
        item = stage.data[index]
        random = np.random.Generator(np.random.PCG64([self._seed, self._index, step]))
        rollout = draw_plan(stage.prompts, item.frames, random)
        rollout = replace(rollout, max_objects=item.most_objects)
        return StepPlan(stage.name, step, index, item.dataset, item.frames, item.batch_size, stage.accumulate, rollout)
