"""The state of DeepSpeed's ZeRO optimizers under the names and in the shapes of the model's parameters.

Weights are trained in float32, so DeepSpeed's partitions of "low precision" weights and its master weights hold the
same numbers, and one of them is enough.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mesh import Ranks
from .state import (
    MOMENTS,
    EngineState,
    common_step,
    load_unsharded_moments,
    owned_names,
    trained_parameters,
    unsharded_moments,
)


def gather_state(module: nn.Module, optimizer: Any, stage: int, ranks: Ranks, scaler: dict[str, Any]) -> EngineState:
    """A rank's share of the state; what other ranks hold of it is gathered parameter by parameter.

    Args:
        optimizer: what `deepspeed.initialize` gave for this ZeRO `stage`.
    """
    own = owned_names(module, ranks.rank, ranks.world_size)
    state = EngineState(scaler=scaler)
    state.weights = {name: value for name, value in module.state_dict().items() if name in own}
    trained = trained_parameters(module)
    if stage == 3:
        state.weights |= _gather_weights(module, own)
    if stage == 0:
        state.moments = unsharded_moments(optimizer, {name: trained[name] for name in own & trained.keys()})
    elif optimizer.optimizer.state:
        state.moments = _gather_moments(optimizer, stage, trained, own)
    return state


def scatter_state(state: EngineState, module: nn.Module, optimizer: Any, stage: int, ranks: Ranks) -> None:
    """Give every rank its part of a whole `state`; arguments as those of `gather_state`."""
    trained = trained_parameters(module)
    if stage < 3:
        module.load_state_dict(state.weights)
    else:
        _scatter_weights(state.weights, module)
    if stage == 0:
        load_unsharded_moments(optimizer, trained, state.moments)
        return
    optimizer.refresh_fp32_params()
    names = {id(param): name for name, param in trained.items()}
    inner, flats = optimizer.optimizer, partitions(optimizer, stage)
    inner.state.clear()
    for flat, params in flats:
        step = common_step(state.moments, [names[id(param)] for param in params])
        if step is not None:
            inner.state[flat] = {key: torch.zeros_like(flat) for key in MOMENTS} | {"step": step.to(flat.device)}
    if not inner.state:
        return
    if stage < 3:
        _link_moments(optimizer)
    for name, param in trained.items():
        for key in MOMENTS:
            _set_moment(param, state.moments[name][key], key, stage, ranks)


def partitions(optimizer: Any, stage: int) -> list[tuple[Tensor, list[nn.Parameter]]]:
    """This rank's flat partitions of master weights, by which the inner optimizer keeps its state, and the parameters
    that each has a part of."""
    if stage == 3:
        return list(zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True))
    return list(zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True))


def _gather_weights(module: nn.Module, own: set[str]) -> dict[str, Tensor]:
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    weights = {}
    for name, param in module.named_parameters():
        with GatheredParameters([param]):
            if name in own:
                weights[name] = param.detach().to("cpu", copy=True)
    return weights


def _scatter_weights(weights: dict[str, Tensor], module: nn.Module) -> None:
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    for name, buffer in module.named_buffers():
        if name in weights:  # others are not part of the state dict
            buffer.copy_(weights[name])
    for name, param in module.named_parameters():
        with GatheredParameters([param], modifier_rank=0), torch.no_grad():
            param.copy_(weights[name])


def _gather_moments(
    optimizer: Any, stage: int, trained: dict[str, nn.Parameter], own: set[str]
) -> dict[str, dict[str, Tensor]]:
    from deepspeed.utils import safe_get_full_optimizer_state

    if stage < 3:
        _link_moments(optimizer)
    steps = {}
    for flat, params in partitions(optimizer, stage):
        steps |= {id(param): optimizer.optimizer.state[flat]["step"] for param in params}
    moments = {}
    for name, param in trained.items():
        values = {}
        for key in MOMENTS:
            whole = safe_get_full_optimizer_state(param, key)
            if name in own:  # whole ones of one parameter at a time stay on the device
                values[key] = whole.to("cpu", copy=True)
        if name in own:
            moments[name] = values | {"step": torch.tensor(float(steps[id(param)]))}
    return moments


def _link_moments(optimizer: Any) -> None:
    """Let each parameter find its part of the moments. DeepSpeed does so after the first update of the first group,
    when the others have no moments yet."""
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    for flat, params in partitions(optimizer, 2):
        lazy_init_hp_params_optimizer_state(params, flat, optimizer.optimizer.state)


def _set_moment(param: nn.Parameter, value: Tensor, key: str, stage: int, ranks: Ranks) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if stage < 3:
        safe_set_full_optimizer_state(param, value, key)
        return
    size = param.ds_tensor.numel()
    padded = F.pad(value.flatten(), (0, size * ranks.world_size - value.numel()))
    safe_set_local_optimizer_state(param, padded.narrow(0, size * ranks.rank, size), key)
