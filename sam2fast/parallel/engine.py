"""What the training loop asks of an engine, and the choice between the engines."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..config import ConfigError, EngineConfig, OptimConfig
from .mesh import Ranks


@dataclass
class StepResult:
    """Outcome of an optimizer step, both on the training device."""

    grad_norm: Tensor
    """L2 norm of all gradients before clipping."""
    skipped: Tensor
    """1 where the gradient was not finite and the update was left out, else 0."""


class Engine(Protocol):
    """Gradients, their reduction over ranks, the update and the state of one stage."""

    module: nn.Module
    layout: dict[str, Any]
    """What a checkpoint must agree with to be loaded: kind, precision, sharding and sizes of the optimizer groups."""

    def forward(self, *args: Any) -> Any:
        """Run the module under the engine's precision."""

    def backward(self, loss: Tensor, boundary: bool) -> None:
        """Accumulate gradients of `loss`; at the `boundary` they are averaged over ranks."""

    def step(self, lr_scale: float) -> StepResult:
        """Clip, update with every group's base rate times `lr_scale`, and clear the gradients."""

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state into `folder` (called on every rank).

        Raises:
            OSError, RuntimeError: a file of this rank could not be written (`is_write_error`); collectives are done.
        """

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""

    def full_state_dict(self) -> dict[str, Tensor]:
        """All weights on the CPU, on every rank."""

    def evaluation(self) -> AbstractContextManager[nn.Module]:
        """The module in eval mode with whole weights, usable on one rank without the others."""

    def close(self) -> None:
        """Release hooks and communicators before the process group goes."""


def build_engine(
    config: EngineConfig,
    optim: OptimConfig,
    ranks: Ranks,
    module: nn.Module,
    groups: list[dict],
    precision: str,
    accumulate: int,
    rebuild: Callable[[], nn.Module],
) -> Engine:
    """Wrap `module` and its optimizer groups in the engine that `config` chooses.

    Args:
        rebuild: makes an untrained module of the same shape, for engines that shard the weights they train.
    """
    kind = resolve_kind(config)
    if kind == "deepspeed":
        from .zero import DeepSpeedEngine

        return DeepSpeedEngine(config, optim, ranks, module, groups, precision, accumulate, rebuild)
    if config.zero_stage or config.deepspeed_config:
        raise ConfigError(
            "engine.kind is torch, but engine.zero_stage or engine.deepspeed_config asks for DeepSpeed; "
            "set engine.kind=deepspeed"
        )
    from .ddp import TorchEngine

    return TorchEngine(optim, ranks, module, groups, precision)


def resolve_kind(config: EngineConfig) -> str:
    """`torch` or `deepspeed`, with `auto` decided by the settings and the launcher."""
    if config.kind != "auto":
        return config.kind
    # The deepspeed launcher sets both, torchrun neither.
    launched = "CROSS_SIZE" in os.environ and "LOCAL_SIZE" in os.environ
    return "deepspeed" if launched or config.zero_stage is not None or config.deepspeed_config else "torch"


def is_write_error(error: Exception) -> bool:
    """Whether the file system is the cause. torch.save says so with errors of its own, which hide the reason."""
    signs = ("inline_container", "iostream error", "Parent directory", "cannot be opened")
    return isinstance(error, OSError) or (type(error) is RuntimeError and any(sign in str(error) for sign in signs))


AUTOCAST_DTYPE = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Mixed precision as the official trainer uses it: float32 weights, low-precision matmuls and convolutions."""
    return torch.autocast(device.type, AUTOCAST_DTYPE.get(precision), enabled=precision in AUTOCAST_DTYPE)


def set_tf32(allowed: bool, device: torch.device) -> None:
    """Whether float32 matrix products and convolutions on a GPU may round their inputs to TF32.

    By the two calls of PyTorch that leave both its older and its newer settings readable: after one of the newer
    alone, torch.compile, which reads the older ones, ends with an error.
    """
    if device.type == "cuda":  # on a CPU the first is about other formats
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def evaluating(module: nn.Module, precision: AbstractContextManager) -> Iterator[None]:
    """`module` in eval mode, without gradients and under `precision`; its mode comes back afterwards."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), precision:
            yield
    finally:
        module.train(training)


def clip_on_device(params: list[nn.Parameter], max_norm: float | None) -> StepResult:
    """Scale gradients to at most `max_norm` (L2 over all) without reading the norm on the host."""
    result = _measure(params)
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(params, max_norm, result.grad_norm)
    return result


def clip_within_update(
    optimizer: torch.optim.Optimizer, params: list[nn.Parameter], max_norm: float | None
) -> StepResult:
    """Let the next `step()` of a fused optimizer scale gradients to at most `max_norm` (L2 over all) as it reads them,
    and leave out the update where they are not finite. The norm is not read on the host."""
    result = _measure(params)
    optimizer.found_inf = result.skipped
    # The same factor as that of `clip_grads_with_norm_`; gradients are divided by it.
    optimizer.grad_scale = None if max_norm is None else ((result.grad_norm + 1e-6) / max_norm).clamp(min=1.0)
    return result


def _measure(params: list[nn.Parameter]) -> StepResult:
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    return StepResult(norm, (~torch.isfinite(norm)).float())


GROUP_SETTINGS = ("base_lr", "weight_decay", "betas", "eps")


def group_settings(groups: list[dict]) -> list[dict[str, Any]]:
    """What the configuration says of each optimizer group; loading a state would bring back the values it was saved
    with."""
    return [{name: group[name] for name in GROUP_SETTINGS} for group in groups]


def set_rates(groups: list[dict], lr_scale: float) -> None:
    for group in groups:
        group["lr"] = group["base_lr"] * lr_scale
