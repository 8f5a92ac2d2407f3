"""The DeepSpeed engine: ZeRO stages 0 to 3."""

from __future__ import annotations

import copy
import gc
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ConfigError, EngineConfig, OptimConfig
from .engine import (
    StepResult,
    autocast,
    clip_within_update,
    evaluating,
    set_rates,
    whole_copy,
)
from .mesh import Ranks
from .state import EngineState, WholeState
from .zero_state import gather_state, partitions, scatter_state

DEFAULT_STAGE = 1
"""States are a small part of SAM 2's memory, and stage 1 shards what is worth sharding without re-gathering weights."""
OWNED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
    "amp",
    "torch_autocast",
)
"""Entries of a DeepSpeed file that this project sets from its own config, where they can be validated."""


class DeepSpeedEngine(WholeState):
    """Weights stay float32 and autocast runs inside the module, as in the torch engine, so that both give the same
    losses."""

    def __init__(
        self,
        config: EngineConfig,
        optim: OptimConfig,
        ranks: Ranks,
        module: nn.Module,
        groups: list[dict],
        precision: str,
        accumulate: int,
        rebuild: Callable[[], nn.Module],
    ) -> None:
        compiled = any(part._compiled_call_impl for part in module.modules())
        settings = deepspeed_settings(config, optim, accumulate, compiled)
        self.stage = settings["zero_optimization"]["stage"]
        self.offloads = _offloads(settings["zero_optimization"], "offload_optimizer")
        self.layout = {
            "engine": "deepspeed",
            "zero_stage": self.stage,
            "precision": precision,
            "world_size": ranks.world_size,
        }
        deepspeed = import_deepspeed(ranks.device.type)
        self.ranks, self.rebuild = ranks, rebuild
        self.clip = optim.clip
        self.params = [p for group in groups for p in group["params"]]
        optimizer = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps, fused=True)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        self.module = self.engine.module
        self.autocast = lambda: autocast(precision, ranks.device)
        self.loss_scale = LossScale() if precision == "float16" else None
        if self.loss_scale and self.stage > 0:
            self.optimizer.override_loss_scale(self.loss_scale.value)

    def forward(self, *args: Any) -> Any:
        with self.autocast():
            return self.engine(*args)

    def backward(self, loss: Tensor, boundary: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(boundary)
        if self.loss_scale and self.stage == 0:
            loss = loss * self.loss_scale.value
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr_scale: float) -> StepResult:
        set_rates(self.optimizer.param_groups, lr_scale)
        if self.stage == 0:
            return self._step_unsharded()
        self.engine.step()
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.ranks.device)
        skipped = not self.engine.was_step_applied()
        if self.loss_scale:
            self.loss_scale.update(skipped)
            self.optimizer.override_loss_scale(self.loss_scale.value)
        # A parameter that the next batch does not reach would otherwise be updated with this step's gradient again.
        if self.stage == 3:
            self.optimizer.grad_partitions_flat_buffer.zero_()
        if self.offloads:
            self.optimizer.norm_for_param_grads.clear()
            for flat, _ in partitions(self.optimizer, self.stage):
                if flat.grad is not None:
                    flat.grad.zero_()
        return StepResult(norm, torch.tensor(float(skipped), device=self.ranks.device))

    def _step_unsharded(self) -> StepResult:
        """Stage 0: DeepSpeed reports no gradient norm and lets non-finite gradients through, so both are done here."""
        for param in self.params:
            if self.loss_scale:
                param.grad /= self.loss_scale.value
        result = clip_within_update(self.optimizer, self.params, self.clip)
        self.engine.step()
        if self.loss_scale:
            self.loss_scale.update(bool(result.skipped))
        return result

    def state(self) -> EngineState:
        scale = self.loss_scale
        scaler = {"scale": scale.value, "good_steps": scale.good_steps % scale.patience} if scale else {}
        return gather_state(self.module, self.optimizer, self.stage, self.ranks, scaler)

    def load_state(self, state: EngineState) -> None:
        scatter_state(state, self.module, self.optimizer, self.stage, self.ranks)
        if self.loss_scale:
            scaler = state.scaler
            self.loss_scale = LossScale(scaler["scale"], scaler["good_steps"]) if scaler else LossScale()
            if self.stage > 0:
                self.optimizer.override_loss_scale(self.loss_scale.value)

    def full_state_dict(self) -> dict[str, Tensor]:
        if self.stage < 3:
            return super().full_state_dict()
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        state = {name: value.detach().cpu() for name, value in self.module.named_buffers()}
        for name, param in self.module.named_parameters():
            with GatheredParameters([param]):
                state[name] = param.detach().cpu().clone()
        return state

    @contextmanager
    def evaluation(self) -> Iterator[nn.Module]:
        module = self.module if self.stage < 3 else whole_copy(self, self.rebuild, self.ranks.device)
        with evaluating(module, self.autocast()):
            yield module

    def close(self) -> None:
        self.engine.destroy()
        # DeepSpeed leaves reference cycles: without this the next stage is built while these weights still live.
        del self.engine, self.optimizer, self.module, self.params
        gc.collect()


@dataclass
class LossScale:
    """Dynamic loss scale for float16: halved at an overflow, doubled after `patience` steps without one.

    DeepSpeed's own scaling beside torch autocast never lowers its scale and clips scaled gradients.
    """

    value: float = 2.0**16
    good_steps: int = 0
    patience: int = 2000

    def update(self, overflow: bool) -> None:
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.value = max(self.value / 2, 1.0)
        elif self.good_steps % self.patience == 0:
            self.value *= 2


def deepspeed_settings(config: EngineConfig, optim: OptimConfig, accumulate: int, compiled: bool) -> dict:
    """The DeepSpeed configuration: ours, under the entries of the user's file.

    Args:
        compiled: parts of the module run through torch.compile.

    Raises:
        ConfigError: the file is missing, is not JSON, or sets an entry that sam2fast's own config decides; or DeepSpeed
            cannot do what the other arguments ask for.
    """
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulate,
        "steps_per_print": 2**31 - 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": DEFAULT_STAGE},
    }
    if config.deepspeed_config:
        user = _read_json(config.deepspeed_config)
        refused = [key for key in OWNED_KEYS if user.get(key) not in (None, "auto")]
        if refused:
            raise ConfigError(
                f"{config.deepspeed_config} sets {', '.join(refused)}, which sam2fast takes from its own config "
                '(stages.*.optim, stages.*.accumulate, precision); remove these entries or set them to "auto"'
            )
        if not isinstance(user.get("zero_optimization", {}), dict):
            raise ConfigError(
                f'{config.deepspeed_config}: zero_optimization must be an object, for example {{"stage": 2}}'
            )
        settings.update({key: copy.deepcopy(value) for key, value in user.items() if key not in OWNED_KEYS})
    if config.zero_stage is not None:
        settings["zero_optimization"] = {**settings["zero_optimization"], "stage": config.zero_stage}
    settings["zero_optimization"].setdefault("stage", DEFAULT_STAGE)
    stage = settings["zero_optimization"]["stage"]
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"{config.deepspeed_config} sets ZeRO stage {stage!r}; choose 0, 1, 2 or 3")
    _place_states(settings, config)
    _refuse_impossible(stage, optim, compiled)
    if config.reduce_dtype == "bfloat16":
        settings.setdefault("communication_data_type", "bf16")
    sharded = stage > 0
    settings["gradient_clipping"] = optim.clip or 0.0 if sharded else 0.0
    return settings


def _refuse_impossible(stage: int, optim: OptimConfig, compiled: bool) -> None:
    if optim.missing_grad == "skip":
        raise ConfigError(
            "optim.missing_grad=skip cannot work with DeepSpeed, which gives a zero gradient to parameters that a "
            "batch does not reach; set optim.missing_grad=zero, engine.kind=torch or engine.kind=fsdp"
        )
    if stage == 3 and optim.ema is not None:
        raise ConfigError(
            "optim.ema cannot work with ZeRO stage 3, which keeps no whole weights to average; set "
            "engine.zero_stage=2 or engine.kind=fsdp, or leave optim.ema empty"
        )
    if stage == 3 and compiled:
        raise ConfigError(
            "model.compile cannot work with ZeRO stage 3, which gathers parameters around the call of every "
            "module; set model.compile=false or engine.zero_stage=2"
        )


def _place_states(settings: dict, config: EngineConfig) -> None:
    """Optimizer states in main memory, where it is asked for.

    Raises:
        ConfigError: the ZeRO stage has no such states.
    """
    zero = settings["zero_optimization"]
    stage = zero["stage"]
    if config.offload_optimizer:
        zero.setdefault("offload_optimizer", {"device": "cpu"})

    if _offloads(zero, "offload_optimizer") and stage == 0:
        raise ConfigError(
            "ZeRO stage 0 keeps whole optimizer states on the device and cannot offload them; set engine.zero_stage=1 "
            "(or 2 or 3), or remove engine.offload_optimizer (offload_optimizer in a DeepSpeed file)"
        )
    if _offloads(zero, "offload_param") and stage < 3:
        raise ConfigError(
            f"{config.deepspeed_config} sets offload_param, which needs ZeRO stage 3 and has stage {stage}; set "
            "engine.zero_stage=3, or remove it"
        )


def _offloads(zero: dict, entry: str) -> bool:
    return (zero.get(entry) or {}).get("device", "none") != "none"


def _read_json(path: str) -> dict:
    try:
        value = json.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(
            f"cannot read the DeepSpeed config {path}: {error.strerror}; check engine.deepspeed_config"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the DeepSpeed config {path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"the DeepSpeed config {path} must hold an object at its top, not {type(value).__name__}")
    return value


def import_deepspeed(device: str) -> Any:
    """DeepSpeed for this kind of device.

    Raises:
        ConfigError: it cannot be imported.
    """
    os.environ.setdefault("DS_ACCELERATOR", device)
    try:
        import deepspeed
        from deepspeed.ops import __compatible_ops__
    except ImportError as error:
        raise ConfigError(
            f"the DeepSpeed engine was chosen but deepspeed cannot be imported ({error}); "
            "pip install deepspeed, or set engine.kind=torch"
        ) from None
    # Its shared-memory collective is compiled at the first run (a minute on a CPU) and gloo does the same work.
    __compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It calls collectives by names that newer versions of torch have replaced.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed
