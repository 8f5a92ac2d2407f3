"""The state of an engine that a checkpoint holds: the same names and shapes whatever the engine and number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import UserError
from .mesh import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of every element, by its names."""


@dataclass
class EngineState:
    """Weights, and what the optimizer and the loss scale remember.

    Of a rank's share, every tensor is whole, or a DTensor; each tensor is in the share of some rank at least.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    """Parameters and buffers by their names in `module.state_dict()`, float32."""
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """`exp_avg`, `exp_avg_sq` (shapes of the parameter) and `step` (a float32 scalar) by names of trained parameters.
    One that has not been updated yet has none, or zeros."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """`scale` and `good_steps` (since it last changed) of float16's loss scaling; empty in other precisions."""
    averages: dict[str, Tensor] = field(default_factory=dict)
    """Moving averages of trained parameters by name, where they are kept."""
    unreached: list[str] = field(default_factory=list)
    """Trained parameters that some step did not reach: where their gradients are reduced depends on it, and so does
    rounding on three ranks and more."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors under one flat key each: `weights/NAME`, `averages/NAME`, `moments/NAME/exp_avg`."""
        flat = {f"weights/{name}": value for name, value in self.weights.items()}
        flat |= {f"averages/{name}": value for name, value in self.averages.items()}
        for name, values in self.moments.items():
            flat |= {f"moments/{name}/{key}": value for key, value in values.items()}
        return flat

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], scaler: dict[str, Any]) -> EngineState:
        """The inverse of `tensors`."""
        state = cls(scaler=scaler)
        for key, value in tensors.items():
            kind, name = key.split("/", 1)
            if kind == "weights":
                state.weights[name] = value
            elif kind == "averages":
                state.averages[name] = value
            else:
                name, key = name.rsplit("/", 1)
                state.moments.setdefault(name, {})[key] = value
        return state


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: param for name, param in module.named_parameters() if param.requires_grad}


def owned_names(module: nn.Module, rank: int, world_size: int) -> set[str]:
    """Parameters and buffers whose state is in the share of `rank`, where every rank could give them: about the same
    number of bytes for each."""
    trained = trained_parameters(module)
    costs = {name: value.numel() for name, value in module.state_dict().items()}
    for name, param in module.named_parameters():
        costs[name] = getattr(param, "ds_numel", param.numel()) * (3 if name in trained else 1)
    loads, owned = [0] * world_size, set()
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        owner = loads.index(min(loads))
        loads[owner] += costs[name]
        if owner == rank:
            owned.add(name)
    return owned


class WholeState:
    """What engines have in common that give whole tensors, each in the share of one rank."""

    state_is_sharded = False
    module: nn.Module
    ranks: Ranks

    def local_weights(self) -> dict[str, Tensor]:
        return {name: param.data for name, param in trained_parameters(self.module).items()}

    def shared(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = owned_names(self.module, self.ranks.rank, self.ranks.world_size)
        return {name: value for name, value in local.items() if name in own}

    def local(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(given)

    def full_state_dict(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu() for name, value in self.module.state_dict().items()}


def unsharded_moments(optimizer: torch.optim.Optimizer, params: Mapping[str, nn.Parameter]) -> dict[str, dict]:
    """Moments of `params` in an optimizer that holds each of them whole."""
    return {name: dict(optimizer.state[param]) for name, param in params.items() if param in optimizer.state}


def load_unsharded_moments(
    optimizer: torch.optim.Optimizer, params: Mapping[str, nn.Parameter], moments: Mapping[str, dict[str, Tensor]]
) -> None:
    """Give an optimizer that holds each of `params` whole the `moments`; it has none of the others then."""
    optimizer.state.clear()
    for name, values in moments.items():
        param = params[name]
        optimizer.state[param] = {key: value.to(param.device) for key, value in values.items()}


def common_step(moments: Mapping[str, dict[str, Tensor]], names: list[str]) -> Tensor | None:
    """The number of updates that all parameters `names` have had; None where they have had none.

    Raises:
        UserError: the numbers differ.
    """
    if not any(name in moments for name in names):
        return None
    steps = {float(moments[name]["step"]) if name in moments else 0.0 for name in names}
    if len(steps) > 1:
        raise UserError(
            f"the checkpoint holds parameters of different numbers of updates ({min(steps):g} to {max(steps):g}), as "
            "optim.missing_grad=skip leaves them, and ZeRO stages 1 to 3 keep one number for all; continue with "
            "engine.kind=torch or engine.kind=fsdp"
        )
    return torch.tensor(steps.pop())
