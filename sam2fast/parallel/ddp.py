"""The plain torch engine: one process, or data parallel with gradients averaged in flat buckets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import OptimConfig
from .engine import StepResult, autocast, clip_on_device, clip_within_update, evaluating, group_settings, set_rates
from .mesh import Ranks
from .place import HERE

BUCKET_BYTES = 25 * 2**20


class TorchEngine:
    """Whole weights on every rank; gradients are averaged after the last micro-step.

    Which parameters a batch reaches depends on its kind, and the kind is equal on all ranks, so no unused-parameter
    search is needed: a gradient is missing on every rank or on none.
    """

    def __init__(self, optim: OptimConfig, ranks: Ranks, module: nn.Module, groups: list[dict], precision: str) -> None:
        self.module = module
        self.ranks = ranks
        self.clip = optim.clip
        self.fill_missing = optim.missing_grad == "zero"
        self.params = [p for group in groups for p in group["params"]]
        # The fused update skips a bad step without a host sync, and clips as it reads the gradients.
        self.optimizer = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps, fused=True)
        self.layout = {"engine": "torch", "precision": precision, "groups": [len(group["params"]) for group in groups]}
        self.autocast = lambda: autocast(precision, ranks.device)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=precision == "float16")
        for tensor in [*module.parameters(), *module.buffers()]:
            if ranks.world_size > 1:
                dist.broadcast(tensor.data, src=0)

    def forward(self, *args: Any) -> Any:
        with self.autocast():
            return self.module(*args)

    def backward(self, loss: Tensor, boundary: bool) -> None:
        self.scaler.scale(loss).backward()
        if boundary:
            self.finish_gradients()

    def finish_gradients(self) -> None:
        """What follows on the last gradient of an optimizer step: missing ones are filled, all averaged over ranks."""
        if self.fill_missing:
            for param in self.params:
                if param.grad is None:
                    param.grad = torch.zeros_like(param)
        self._average_gradients()

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
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def save(self, folder: Path) -> None:
        if self.ranks.main:
            torch.save(
                {
                    "module": self.module.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": self.scaler.state_dict(),
                },
                folder / "torch.pt",
            )

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "torch.pt", map_location=self.ranks.device, weights_only=True)
        self.module.load_state_dict(state["module"])
        settings = group_settings(self.optimizer.param_groups)
        self.optimizer.load_state_dict(state["optimizer"])
        for group, values in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(values)
        self.scaler.load_state_dict(state["scaler"])

    def full_state_dict(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu() for name, value in self.module.state_dict().items()}

    @contextmanager
    def evaluation(self) -> Iterator[nn.Module]:
        with evaluating(self.module, self.autocast()):
            yield self.module

    def close(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _average_gradients(self) -> None:
        if self.ranks.world_size == 1:
            return
        HERE.go("reducing gradients")
        for bucket in _buckets([p.grad for p in self.params if p.grad is not None]):
            flat = torch.cat([grad.flatten() for grad in bucket])
            dist.all_reduce(flat)
            flat /= self.ranks.world_size
            parts = flat.split([grad.numel() for grad in bucket])
            torch._foreach_copy_(bucket, [part.view_as(grad) for grad, part in zip(bucket, parts, strict=True)])


def _buckets(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive gradients in groups of about BUCKET_BYTES."""
    bucket: list[Tensor] = []
    size = 0
    for grad in grads:
        bucket.append(grad)
        size += grad.numel() * grad.element_size()
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
