"""How much memory a training step needs, computed on fake tensors, and the recompute policy that fits.

The real model, rollout and losses run without data or arithmetic, and the storages that are alive are added up: those
of activations, gradients and results, and 16 bytes a parameter (weight, gradient and the two moments of AdamW in
float32). `MARGIN` is for what is not counted: the allocator's fragmentation, scratch inside operators, and buffers of
communication.
"""

from __future__ import annotations

import weakref
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .config import Config, MixItem, StageConfig
from .data.sample import Batch
from .losses import SegmentationLoss
from .models.architecture import Architecture
from .models.plan import RolloutPlan
from .models.sam2 import SAM2
from .optim import freeze
from .parallel.engine import autocast
from .performance import RECOMPUTE_LADDER, PerformanceConfig, recompute_ladder

GIB = 2**30
MARGIN = 1.15
"""Memory in use over memory counted."""
STATE_BYTES = 16


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def heaviest_plan(stage: StageConfig, num_frames: int) -> RolloutPlan:
    """Of the plans that a stage can draw for clips of this length, the one that keeps most."""
    prompts = stage.prompts
    init = tuple(range(min(prompts.init_frames, num_frames)))
    corrected = tuple(range(min(prompts.corrected_frames, num_frames)))
    if num_frames > 1 and prompts.video.mask == 1:
        return RolloutPlan(num_frames, "mask", (0,))
    clicks = ((False,) * prompts.correction_clicks,) * len(corrected)
    return RolloutPlan(num_frames, "point", init[:1], corrected, (False,), clicks)


def estimate_peak(
    arch: Architecture,
    performance: PerformanceConfig,
    recompute: str,
    stage: StageConfig,
    item: MixItem,
    precision: str,
    device: torch.device,
    bfloat16_streams: bool = False,
    steps: int = 1,
) -> int:
    """Bytes of one step of `stage` on a batch of `item`, whose every clip has its largest number of objects, or of
    several `steps` side by side."""
    with torch.device("meta"):
        model = SAM2(arch, recompute, performance, bfloat16_streams=bfloat16_streams).train()
    with FakeTensorMode(), torch.device(device.type):
        _materialize(model)
        freeze(model, stage.freeze)
        side, objects = arch.image_size, item.most_objects
        batch = Batch(
            torch.empty(item.batch_size, item.frames, 3, side, side, dtype=torch.uint8),
            torch.empty(item.frames, objects, side, side, dtype=torch.bool),
            torch.empty(objects, dtype=torch.long),
            ["fake"] * item.batch_size,
        )
        loss = SegmentationLoss(stage.loss)
        with LiveBytes() as live:
            with autocast(precision, device):
                output = model(batch, heaviest_plan(stage, item.frames))
            loss([frame.steps for frame in output.frames], batch.masks, objects)["total"].backward()
    return steps * live.peak + STATE_BYTES * sum(parameter.numel() for parameter in model.parameters())


def _materialize(model: torch.nn.Module) -> None:
    """Give parameters and buffers of the meta device (fake) memory on the current one."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape))


def choose_recompute(
    config: Config, stage: StageConfig, arch: Architecture, device: torch.device, budget_gib: float
) -> tuple[str, str]:
    """The first policy of `RECOMPUTE_LADDER` that fits into the budget (0: what is free on the device), and a line that
    says so; the last one where none fits."""
    budget = budget_gib * GIB or free_bytes(device)
    needs: dict[str, float] = {}
    steps = 2 if config.model.cuda_graphs else 1  # the memory of the graphs, and an eager step of another kind
    for policy in recompute_ladder(max(item.most_objects for item in stage.data)):
        settings = config.model
        peaks = [
            estimate_peak(arch, settings.performance, policy, stage, item, config.precision, device,
                          settings.bfloat16_streams, steps)
            for item in stage.data
        ]  # fmt: skip
        needs[policy] = MARGIN * max(peaks)
        if needs[policy] <= budget:
            break
    fits = "fits into" if needs[policy] <= budget else "is the least, but does not fit into"
    line = (
        f"recompute={policy}: about {needs[policy] / GIB:.1f} GiB (computed), {fits} {budget / GIB:.1f} GiB; without "
        f"recomputation {needs[RECOMPUTE_LADDER[0]] / GIB:.1f} GiB"
    )
    return policy, line


def free_bytes(device: torch.device) -> float:
    """Memory that can still be allocated; unlimited where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return 1024.0 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
