"""The plain torch engine: one process, or data parallel with gradients averaged as they become complete."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config import OptimConfig
from .buckets import GradientBuckets
from .engine import (
    StepResult,
    autocast,
    broadcast_weights,
    clip_on_device,
    clip_within_update,
    evaluating,
    set_rates,
)
from .mesh import Ranks
from .place import HERE
from .state import EngineState, WholeState, load_unsharded_moments, trained_parameters, unsharded_moments


class TorchEngine(WholeState):
    """Whole weights on every rank; gradients are averaged in the backward pass of the last micro-step, see
    `GradientBuckets`."""

    def __init__(
        self,
        optim: OptimConfig,
        ranks: Ranks,
        module: nn.Module,
        groups: list[dict],
        precision: str,
        reduce_dtype: str = "float32",
    ) -> None:
        self.module = module
        self.ranks = ranks
        self.clip = optim.clip
        self.fill_missing = optim.missing_grad == "zero"
        self.params = [p for group in groups for p in group["params"]]
        # The fused update skips a bad step without a host sync, and clips as it reads the gradients.
        self.optimizer = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps, fused=True)
        self.layout = {"engine": "torch", "precision": precision, "world_size": ranks.world_size}
        self.autocast = lambda: autocast(precision, ranks.device)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=precision == "float16")
        broadcast_weights(module, ranks)
        self.buckets: GradientBuckets | None = None
        if ranks.world_size > 1:
            trained = trained_parameters(module)
            self.trained = list(trained)
            dtype = getattr(torch, reduce_dtype)
            self.buckets = GradientBuckets(trained.values(), ranks.world_size, dtype, self.fill_missing)

    def forward(self, *args: Any) -> Any:
        with self.autocast():
            return self.module(*args)

    def backward(self, loss: Tensor, boundary: bool) -> None:
        if self.buckets is not None:
            self.buckets.begin(last=boundary)
        self.scaler.scale(loss).backward()
        if boundary:
            self.finish_gradients()

    def finish_gradients(self) -> None:
        """What follows on the last gradient of an optimizer step: missing ones are filled, all averaged over ranks."""
        if self.buckets is not None:
            HERE.go("reducing gradients")
            self.buckets.finish()
        elif self.fill_missing:
            for param in self.params:
                if param.grad is None:
                    param.grad = torch.zeros_like(param)

    def step(self, lr_scale: float) -> StepResult:
        set_rates(self.optimizer.param_groups, lr_scale)
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
            result = clip_on_device(self.params, self.clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            result = clip_within_update(self.optimizer, self.params, self.clip)
            self.optimizer.step()
        if self.buckets is not None:
            self.buckets.reset()
        else:
            self.optimizer.zero_grad(set_to_none=True)
        return result

    def state(self) -> EngineState:
        weights, trained = self.shared(self.module.state_dict()), self.shared(trained_parameters(self.module))
        scaler = {}
        if self.scaler.is_enabled():
            values = self.scaler.state_dict()
            scaler = {"scale": values["scale"], "good_steps": values["_growth_tracker"]}
        unreached = [self.trained[index] for index in sorted(self.buckets.optional)] if self.buckets else []
        return EngineState(weights, unsharded_moments(self.optimizer, trained), scaler, unreached=unreached)

    def load_state(self, state: EngineState) -> None:
        self.module.load_state_dict(state.weights)
        load_unsharded_moments(self.optimizer, trained_parameters(self.module), state.moments)
        if self.scaler.is_enabled() and state.scaler:
            values = {"scale": state.scaler["scale"], "_growth_tracker": state.scaler["good_steps"]}
            self.scaler.load_state_dict(self.scaler.state_dict() | values)
        if self.buckets is not None:
            self.buckets.expect_missing(self.trained.index(name) for name in state.unreached if name in self.trained)

    @contextmanager
    def evaluation(self) -> Iterator[nn.Module]:
        with evaluating(self.module, self.autocast()):
            yield self.module

    def close(self) -> None:
        if self.buckets is not None:
            self.buckets.close()
        self.optimizer.zero_grad(set_to_none=True)
