"""A training step of the real program on one rank of many: model, losses, engine and normalization, on fake tensors and
a process group that communicates with nobody. No GPU and no other process is needed.

The step runs as on a CPU with bfloat16 autocast. Which collectives an engine starts does not depend on the device, nor
on the side of the images.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _foreach_utils

from sam2fast.config import EngineConfig, LossConfig, OptimConfig
from sam2fast.data.sample import Batch
from sam2fast.losses import SegmentationLoss
from sam2fast.models.architecture import architecture
from sam2fast.models.plan import RolloutPlan
from sam2fast.models.sam2 import SAM2
from sam2fast.optim import build_groups
from sam2fast.parallel import Engine, Ranks, build_engine

from .collectives import Collective, CollectiveRecorder
from .engines import SETTINGS

GPUS_OF_NODE = 8
LEARNING = {"torch": 1, "zero3": 1}
"""Steps before the one that is recorded, in which an engine learns which parameters are reached, or in which order."""


@dataclass(frozen=True)
class Trace:
    """What a rank does in a step."""

    engine: str
    size: str
    world_size: int
    parameters: int
    tensors: int
    collectives: list[Collective]
    state_bytes: int
    """Weights, buffers and moments of AdamW that this rank keeps between steps."""


def trace(engine: str, size: str, world_size: int, frames: int = 8, side: int = 1024, objects: int = 3) -> Trace:
    """Run a training step of rank 0 of `world_size`: a clip of which the first frame's masks are given."""
    with _fake_world(world_size), FakeTensorMode(allow_non_fake_inputs=True), _fakes_allowed(engine):
        recorder = CollectiveRecorder()
        with torch.autograd.set_multithreading_enabled(False), recorder:
            ranks = Ranks(0, world_size, 0, torch.device("cpu"))
            torch.manual_seed(0)
            model = SAM2(architecture(size, image_size=side)).train()
            parameters = [parameter.numel() for parameter in model.parameters()]
            built = _build(engine, model, ranks)
            batch = Batch(
                frames=torch.zeros(1, frames, 3, side, side, dtype=torch.uint8),
                masks=torch.zeros(frames, objects, side, side, dtype=torch.bool),
                object_to_clip=torch.zeros(objects, dtype=torch.long),
                sample_ids=["fake"],
            )
            for _ in range(1 + LEARNING.get(engine, 0)):
                recorder.clear()
                _step(built, recorder, ranks, batch, RolloutPlan(frames, "mask", (0,)))
            collectives = recorder.step()
            kept = state_bytes(built)
    return Trace(engine, size, world_size, sum(parameters), len(parameters), collectives, kept)


def _build(engine: str, model: SAM2, ranks: Ranks) -> Engine:
    model.to = lambda *_, **__: model  # DeepSpeed moves it to the device where it is; fake weights cannot be exchanged
    optim = OptimConfig()
    groups = build_groups(model, optim)
    settings = EngineConfig(**SETTINGS[engine])
    if settings.shard_size == "node":  # every rank would be asked how many its node has
        settings = settings.model_copy(update={"shard_size": min(GPUS_OF_NODE, ranks.world_size)})
    return build_engine(settings, optim, ranks, model, groups, "bfloat16", 1, lambda: model)


def _step(engine: Engine, recorder: CollectiveRecorder, ranks: Ranks, batch: Batch, plan: RolloutPlan) -> None:
    """As StageTrainer runs it."""
    loss = SegmentationLoss(LossConfig())
    objects = ranks.sum(torch.full((), float(batch.num_objects)))
    output = engine.forward(batch, plan)
    terms = loss([frame.steps for frame in output.frames], batch.masks, (objects / ranks.world_size).clamp(min=1))
    recorder.phase = "backward"
    engine.backward(terms["total"], boundary=True)
    recorder.phase = "update"
    engine.step(1.0)


def state_bytes(engine: Engine) -> int:
    """Of weights, buffers and the optimizer's state on this rank, each storage once."""
    storages = {}
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)  # DeepSpeed wraps the one that has the state
    tensors = [*engine.module.parameters(), *engine.module.buffers()]
    tensors += [parameter for group in inner.param_groups for parameter in group["params"]]
    tensors += [value for state in inner.state.values() for value in state.values() if torch.is_tensor(value)]
    # ZeRO 3 keeps the shard of a parameter beside it.
    tensors += [p.ds_tensor for p in engine.module.parameters() if getattr(p, "ds_tensor", None) is not None]
    for tensor in tensors:
        local = getattr(tensor, "_local_tensor", tensor)
        storage = local.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


@contextmanager
def _fake_world(world_size: int) -> Iterator[None]:
    known = dict(os.environ)
    local = min(GPUS_OF_NODE, world_size)
    os.environ.update(RANK="0", WORLD_SIZE=str(world_size), LOCAL_RANK="0", LOCAL_WORLD_SIZE=str(local))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", DS_ACCELERATOR="cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(known)


@contextmanager
def _fakes_allowed(engine: str) -> Iterator[None]:
    """Norms of lists of fake tensors take one operation, as those of plain ones; and ZeRO 3 does not ask whether the
    other ranks, which are not there, have called the same modules in the first step."""
    types = [*_foreach_utils._foreach_supported_types, FakeTensor]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(_foreach_utils, "_foreach_supported_types", types))
        if engine == "zero3":
            from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

            stack.enter_context(mock.patch.object(coordinator, "assert_ints_same_as_other_ranks", lambda _: None))
        if SETTINGS[engine]["kind"] == "fsdp":
            from torch.distributed.fsdp._fully_shard import _fsdp_param

            from sam2fast.parallel import fsdp

            # The shards of 256 ranks would be made of every parameter, each a fake tensor: this rank needs its own.
            stack.enter_context(mock.patch.object(_fsdp_param, "_chunk_with_empty", _first_chunk))
            stack.enter_context(mock.patch.object(fsdp, "_build_mesh", _plain(fsdp._build_mesh)))
        yield


def _first_chunk(tensor: torch.Tensor, count: int, dim: int) -> list[torch.Tensor]:
    """The first of the chunks of torch.chunk, which is that of rank 0."""
    return [tensor.narrow(dim, 0, -(-tensor.shape[dim] // count))]


def _plain(build: Callable) -> Callable:
    """`build` with plain tensors: a mesh looks for its rank in one."""

    def run(*args):
        with unset_fake_temporarily():
            return build(*args)

    return run
