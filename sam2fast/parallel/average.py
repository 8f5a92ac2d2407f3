"""Exponential moving averages of the weights beside any engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .engine import Engine, StepResult
from .state import EngineState


class AveragingEngine:
    """An engine that keeps, of every trained weight, the average a <- decay * a + (1 - decay) * w after each step, also
    after one that was skipped, whose weights are those before.

    Averages are float32 and sharded as the weights are. Evaluation is theirs; training does not see them.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self.engine, self.decay = engine, decay
        self._weights = engine.local_weights()  # the tensors stay; to look for them walks over all modules
        self._averages = {name: value.detach().clone() for name, value in self._weights.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    @torch.no_grad()
    def step(self, lr_scale: float) -> StepResult:
        result = self.engine.step(lr_scale)
        torch._foreach_lerp_(list(self._averages.values()), list(self._weights.values()), 1 - self.decay)
        return result

    def state(self) -> EngineState:
        state = self.engine.state()
        state.averages = self.engine.shared(self._averages)
        return state

    @torch.no_grad()
    def load_state(self, state: EngineState) -> None:
        """Averages begin with the weights where the state holds none."""
        self.engine.load_state(state)
        given = self.engine.local(state.averages)
        for name, value in self._averages.items():
            value.copy_(given.get(name, self._weights[name]))

    @contextmanager
    def evaluation(self) -> Iterator[nn.Module]:
        with self._in_place(), self.engine.evaluation() as module:
            yield module

    def averaged_state_dict(self) -> dict[str, Tensor]:
        """All weights on the CPU, on every rank, the trained ones as averages."""
        with self._in_place():
            return {name: value.clone() for name, value in self.engine.full_state_dict().items()}  # it may be a view

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Averages in the place of the weights; in the end both are as before."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, weight in self._weights.items():
            average = self._averages[name]
            former = weight.clone()
            weight.copy_(average)
            average.copy_(former)
