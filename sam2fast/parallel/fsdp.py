"""The FSDP engine: weights, gradients and optimizer state sharded by torch's `fully_shard`, over all ranks or over
groups of them that hold copies (hybrid).

Blocks that run once in a micro-step are gathered around their call, several to a unit. All else, which a clip runs once
a frame or more, is one unit: gathered before the first micro-step of an optimizer step, and reduced after the last.
"""

from __future__ import annotations

import gc
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ..config import ConfigError, EngineConfig, OptimConfig
from .engine import (
    StepResult,
    autocast,
    broadcast_weights,
    clip_within_update,
    evaluating,
    set_rates,
    whole_copy,
)
from .mesh import Ranks
from .state import MOMENTS, EngineState

UNITS = 8
"""Of blocks that are gathered together. Fewer keep more weights at once, more wait for the latency of more collectives:
at 256 GPUs a unit for every block of Hiera-L is predicted to take four times as long."""


class FSDPEngine:
    """Weights stay float32 and autocast runs inside the module, as in the other engines, so that all give the same
    losses.

    The optimizer works on the shards as plain tensors: its fused update takes the factor of clipping and the flag of a
    step to skip from the device.
    """

    state_is_sharded = True

    def __init__(
        self,
        config: EngineConfig,
        optim: OptimConfig,
        ranks: Ranks,
        module: nn.Module,
        groups: list[dict],
        precision: str,
        rebuild: Callable[[], nn.Module],
    ) -> None:
        self.module, self.ranks, self.rebuild = module, ranks, rebuild
        self.clip = optim.clip
        self.fill_missing = optim.missing_grad == "zero"
        names = {id(param): name for name, param in module.named_parameters()}
        broadcast_weights(module, ranks)
        self.mesh = _mesh(config, ranks)
        self.shard_group = self.mesh.get_group(self.mesh.ndim - 1)
        self.root, self.reducing = self._shard(config.reduce_dtype), True
        self.sharded: dict[str, DTensor] = dict(module.named_parameters())
        self.shards = {name: _shard_of(param) for name, param in self.sharded.items() if param.requires_grad}
        self.params = [self.shards[names[id(param)]] for group in groups for param in group["params"]]
        groups = [{**group, "params": [self.shards[names[id(param)]] for param in group["params"]]} for group in groups]
        self.optimizer = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps, fused=True)
        self.layout = {"engine": "fsdp", "precision": precision, "world_size": ranks.world_size}
        self.autocast = lambda: autocast(precision, ranks.device)
        self.loss_scale = LossScale(ranks.device) if precision == "float16" else None

    def _shard(self, reduce_dtype: str) -> nn.Module:
        policy = MixedPrecisionPolicy(reduce_dtype=getattr(torch, reduce_dtype))
        blocks = getattr(self.module, "blocks_run_once", list)()
        for unit in group_blocks(blocks, UNITS):
            fully_shard(unit, mesh=self.mesh, reshard_after_forward=True, mp_policy=policy)
        root = fully_shard(_Root(self.module), mesh=self.mesh, mp_policy=policy)
        if self.ranks.device.type == "cpu":
            for part in root.modules():  # gloo has no average
                if hasattr(part, "set_force_sum_reduction_for_comms"):
                    part.set_force_sum_reduction_for_comms(True)
        return root

    def forward(self, *args: Any) -> Any:
        with self.autocast():
            return self.root(*args)[0].value

    def backward(self, loss: Tensor, boundary: bool) -> None:
        if boundary != self.reducing:  # walks over all modules
            self.reducing = boundary
            self.root.set_requires_gradient_sync(boundary)
            self.root.set_reshard_after_backward(boundary, recurse=False)
        (loss * self.loss_scale.value if self.loss_scale else loss).backward()
        if boundary:
            self._take_gradients()

    def _take_gradients(self) -> None:
        """Give the averaged gradients to the optimizer; missing ones are filled."""
        with torch.no_grad():
            for name, shard in self.shards.items():
                param = self.sharded[name]
                if param.grad is not None:
                    shard.grad = param.grad.to_local()
                    param.grad = None
                elif self.fill_missing:
                    shard.grad = torch.zeros_like(shard)

    def step(self, lr_scale: float) -> StepResult:
        set_rates(self.optimizer.param_groups, lr_scale)
        scale = self.loss_scale.value if self.loss_scale else None
        result = clip_within_update(self.optimizer, self.params, self.clip, self.shard_group, scale)
        self.optimizer.step()
        if self.loss_scale:
            self.loss_scale.update(result.skipped)
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def state(self) -> EngineState:
        moments = {}
        for name, shard in self.shards.items():
            own, like = self._moments(shard), self.sharded[name]
            moments[name] = {key: _as_sharded(own[key], like) for key in MOMENTS} | {"step": own["step"]}
        scaler = self.loss_scale.state_dict() if self.loss_scale else {}
        return EngineState(self.module.state_dict(), moments, scaler)

    @torch.no_grad()
    def load_state(self, state: EngineState) -> None:
        self.module.load_state_dict(state.weights)
        for name, shard in self.shards.items():
            if name not in state.moments:  # of a parameter that has not been updated yet
                self.optimizer.state.pop(shard, None)
                continue
            for key, value in self._moments(shard).items():
                given = state.moments[name][key]
                value.copy_(given.to_local() if isinstance(given, DTensor) else given)
        if self.loss_scale and state.scaler:
            self.loss_scale.load_state_dict(state.scaler)

    def _moments(self, shard: nn.Parameter) -> dict[str, Tensor]:
        """Of AdamW: those that it has, or begins with."""
        state = self.optimizer.state[shard]
        if not state:
            state["step"] = torch.zeros((), device=shard.device)
            state |= {key: torch.zeros_like(shard.data) for key in MOMENTS}
        return state

    def local_weights(self) -> dict[str, Tensor]:
        return {name: shard.data for name, shard in self.shards.items()}

    def shared(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: _as_sharded(value, self.sharded[name]) for name, value in local.items()}

    def local(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to_local() if isinstance(value, DTensor) else value for name, value in given.items()}

    def full_state_dict(self) -> dict[str, Tensor]:
        return {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
            for name, value in self.module.state_dict().items()
        }

    @contextmanager
    def evaluation(self) -> Iterator[nn.Module]:
        module = whole_copy(self, self.rebuild, self.ranks.device)
        with evaluating(module, self.autocast()):
            yield module

    def close(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        del self.module, self.root, self.optimizer, self.params, self.shards, self.sharded
        gc.collect()  # modules and their sharding state refer to each other; the next stage is built after this


class LossScale:
    """Dynamic loss scale for float16, kept on the device: halved at an overflow, doubled after `GROWTH_INTERVAL` steps
    without one. The rule of `torch.amp.GradScaler`, which would see an overflow of this rank's shards alone.
    """

    GROWTH_INTERVAL = 2000

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), 2.0**16, device=device)
        self.good_steps = torch.zeros((), device=device)

    def update(self, overflow: Tensor) -> None:
        """`overflow` is 1 or 0."""
        steps = (self.good_steps + 1) * (1 - overflow)
        grown = (steps == self.GROWTH_INTERVAL).float()
        self.value *= (1 - overflow / 2) * (1 + grown)
        self.good_steps = steps * (1 - grown)

    def state_dict(self) -> dict[str, float | int]:
        return {"scale": self.value.item(), "good_steps": int(self.good_steps.item())}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        self.value.fill_(state["scale"])
        self.good_steps.fill_(state["good_steps"])


class _Output:
    """Hides an output from the search for tensors in it."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Root(nn.Module):
    """Beside the output, returns the tensors in it that may receive gradients, as a list.

    A gradient of one of them is the sign for `fully_shard` that the backward pass has begun; not every version of torch
    finds tensors in dataclasses, and it warns of views.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> tuple[_Output, list[Tensor]]:
        output = self.module(*args)
        found = list(_differentiable(output))
        return _Output(output), [x for x in found if x._base is None] or found


def _differentiable(value: Any) -> Iterator[Tensor]:
    """Tensors with a gradient function in a structure of dataclasses, lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _differentiable(getattr(value, field.name))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _differentiable(item)
    elif isinstance(value, dict):
        yield from _differentiable(list(value.values()))


def group_blocks(blocks: Sequence[nn.Module], count: int) -> list[list[nn.Module]]:
    """Consecutive blocks in at most `count` groups with about equal numbers of parameters."""
    sizes = [sum(param.numel() for param in block.parameters()) for block in blocks]
    groups: list[list[nn.Module]] = [[] for _ in range(count)]
    before, total = 0, max(1, sum(sizes))
    for block, size in zip(blocks, sizes, strict=True):
        middle = before + size / 2
        groups[min(count - 1, int(count * middle / total))].append(block)
        before += size
    return [group for group in groups if group]


def _mesh(config: EngineConfig, ranks: Ranks) -> DeviceMesh:
    """One dimension of all ranks, or copies x shards of `engine.shard_size` neighboring ranks.

    Raises:
        ConfigError: the ranks do not divide into such groups.
    """
    world, size = ranks.world_size, config.shard_size
    if size is None:
        return _build_mesh(dist.group.WORLD, ranks.device.type, (world,))
    if size == "node":
        size = ranks_of_a_node(ranks.gather(socket.gethostname()))
    check_shard_size(size, world)
    return _build_mesh(dist.group.WORLD, ranks.device.type, (world // size, size))


def check_shard_size(size: int, world: int) -> None:
    """Raises:
    ConfigError: the ranks do not divide into groups of this size.
    """
    if world % size:
        raise ConfigError(
            f"engine.shard_size is {size}, which does not divide the {world} ranks of this run; choose one of "
            f"{[n for n in range(1, world + 1) if world % n == 0]}"
        )


def ranks_of_a_node(hosts: list[str]) -> int:
    """How many neighboring ranks share a host, of the host of each rank.

    Raises:
        ConfigError: not as many everywhere, or they are not neighbors.
    """
    runs = [len(list(group)) for _, group in groupby(hosts)]
    if len(runs) > len(set(hosts)) or len(set(runs)) > 1:
        raise ConfigError(
            f"engine.shard_size=node needs as many ranks on every node, with neighboring numbers; nodes have {runs}: "
            "start as many everywhere, or set engine.shard_size to a number of ranks"
        )
    return runs[0]


@cache
def _build_mesh(world: dist.ProcessGroup, device_type: str, shape: tuple[int, ...]) -> DeviceMesh:
    """One for all stages of a run, for its communicators take memory of the device."""
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


@torch.no_grad()
def _shard_of(param: DTensor) -> nn.Parameter:
    """This rank's rows of a sharded parameter, sharing its memory."""
    return nn.Parameter(param.to_local())


def _as_sharded(rows: Tensor, like: DTensor) -> DTensor:
    """This rank's rows of a tensor that is sharded as `like` is."""
    return DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
