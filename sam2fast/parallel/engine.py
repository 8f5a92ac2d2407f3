"""What the training loop asks of an engine, and the choice between the engines."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import Config, EngineConfig, OptimConfig, StageConfig
from .mesh import Ranks
from .state import EngineState


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
    """Kind, precision and sharding, for messages; a checkpoint of any is read by any."""

    def forward(self, *args: Any) -> Any:
        """Run the module under the engine's precision."""

    def backward(self, loss: Tensor, boundary: bool) -> None:
        """Accumulate gradients of `loss`; at the `boundary` they are averaged over ranks."""

    def step(self, lr_scale: float) -> StepResult:
        """Clip, update with every group's base rate times `lr_scale`, and clear the gradients."""

    state_is_sharded: bool
    """Whether `state` gives DTensors, and `load_state` wants some like them."""

    def state(self) -> EngineState:
        """This rank's share of the state, which may alias that of the engine (called on every rank)."""

    def load_state(self, state: EngineState) -> None:
        """Take over a state that any engine gave, on any number of ranks (called on every rank). What it says of rates
        and weight decay stays as the configuration has it.

        Args:
            state: whole, in main memory; of what `state()` gives as DTensors, DTensors like those. It is used up.

        Raises:
            UserError: this engine cannot represent it.
        """

    def local_weights(self) -> dict[str, Tensor]:
        """This rank's part of each trained weight, by name: what the optimizer updates. Rows of it where the engine
        shards weights."""

    def shared(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors with the shapes of `local_weights`, as `state` gives weights."""

    def local(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors as `load_state` takes weights, with the shapes of `local_weights`."""

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

    Raises:
        ConfigError: settings that do not go together.
    """
    kind = resolve_kind(config)
    if kind == "deepspeed":
        from .zero import DeepSpeedEngine

        engine = DeepSpeedEngine(config, optim, ranks, module, groups, precision, accumulate, rebuild)
    elif kind == "fsdp":
        from .fsdp import FSDPEngine

        engine = FSDPEngine(config, optim, ranks, module, groups, precision, rebuild)
    else:
        from .ddp import TorchEngine

        engine = TorchEngine(optim, ranks, module, groups, precision, config.reduce_dtype)
    if optim.ema is None:
        return engine
    from .average import AveragingEngine

    return AveragingEngine(engine, optim.ema)


def check_engine(config: Config, ranks: Ranks, stages: Sequence[StageConfig]) -> None:
    """What `build_engine` would refuse in `stages`, but for nodes with different numbers of ranks.

    Raises:
        ConfigError: settings that do not go together, with each other or with the number of ranks.
    """
    kind, settings = resolve_kind(config.engine), config.engine
    if kind == "deepspeed":
        from .zero import deepspeed_settings, import_deepspeed

        for stage in stages:
            deepspeed_settings(settings, stage.optim, stage.accumulate, config.model.compile)
        import_deepspeed(ranks.device.type)
    elif kind == "fsdp" and isinstance(settings.shard_size, int):
        from .fsdp import check_shard_size

        check_shard_size(settings.shard_size, ranks.world_size)


def resolve_kind(config: EngineConfig) -> str:
    """`torch`, `fsdp` or `deepspeed`, with `auto` decided by the settings and the launcher."""
    if config.kind != "auto":
        return config.kind
    # The deepspeed launcher sets both, torchrun neither.
    launched = "CROSS_SIZE" in os.environ and "LOCAL_SIZE" in os.environ
    asked = config.zero_stage is not None or config.deepspeed_config or config.offload_optimizer
    return "deepspeed" if launched or asked else "torch"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator, of a GPU or of the host, is the cause."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)


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


def whole_copy(engine: Engine, rebuild: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """A module with the whole weights of an engine that shards them: ranks may then run different numbers of frames."""
    module = rebuild()
    module.load_state_dict(engine.full_state_dict())
    return module.to(device)


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
    optimizer: torch.optim.Optimizer,
    params: list[nn.Parameter],
    max_norm: float | None,
    shards: dist.ProcessGroup | None = None,
    loss_scale: Tensor | None = None,
) -> StepResult:
    """Let the next `step()` of a fused optimizer scale gradients to at most `max_norm` (L2 over all) as it reads them,
    and leave out the update where they are not finite. The norm is not read on the host.

    Args:
        shards: the ranks that together have all gradients, where every one has some.
        loss_scale: the factor in all gradients.
    """
    result = _measure(params, shards)
    if loss_scale is not None:
        result.grad_norm = result.grad_norm / loss_scale
    optimizer.found_inf = result.skipped
    # The same factor as that of `clip_grads_with_norm_`; gradients are divided by it.
    divisor = None if max_norm is None else ((result.grad_norm + 1e-6) / max_norm).clamp(min=1.0)
    optimizer.grad_scale = divisor if loss_scale is None else loss_scale * (1.0 if divisor is None else divisor)
    return result


def _measure(params: list[nn.Parameter], shards: dist.ProcessGroup | None = None) -> StepResult:
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    if shards is not None:
        squares = norm.to(params[0].device).square()  # the norm of no gradients is on the CPU
        dist.all_reduce(squares, group=shards)
        norm = squares.sqrt()
    return StepResult(norm, (~torch.isfinite(norm)).float())


def broadcast_weights(module: nn.Module, ranks: Ranks) -> None:
    """Parameters and buffers of rank 0 on every rank."""
    if ranks.world_size > 1:
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.data, src=0)


def set_rates(groups: list[dict], lr_scale: float) -> None:
    for group in groups:
        group["lr"] = group["base_lr"] * lr_scale
