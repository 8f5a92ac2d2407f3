"""What the host launches in a training step whose micro-step is replayed as a CUDA graph, on fake CUDA tensors.

The trainer, its engine and the bookkeeping of graphs are the real ones; what a recording holds is left out.
`fake_cuda.load()` comes before the import of this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import Parameter
from torch.utils import _foreach_utils

from sam2fast import trainer
from sam2fast.config import Config
from sam2fast.data.bad_records import BadRecords
from sam2fast.data.sample import Batch, PackedBatch
from sam2fast.optim import build_groups
from sam2fast.parallel import GraphedSteps, Ranks
from sam2fast.parallel.ddp import TorchEngine
from sam2fast.run_state import RunState
from sam2fast.stopping import StopRequest
from sam2fast.telemetry.meters import Meters

from .counter import StepCounter, Tally
from .parts import PartTracker
from .steps import PLANS, Setup, fake_batch, fake_model

RANKS = 8
PLACES = ("inputs_replay_terms", "all_reduce", "clip_and_update", "meters", "other")
"""Where the host launches something; other is the batch on its way (copies, masks unpacked from bits) and the number of
objects that losses are divided by."""


def count_host_launches(setup: Setup) -> dict[str, int]:
    """By place, the launches of a replayed step on one of `RANKS` GPUs: one micro-step, bfloat16, default optimizer.

    The replay is one launch. The kernels in the graph are those of the eager step with masks for stochastic depth.
    """
    tracker = PartTracker()
    counter = StepCounter(tracker)
    plan, objects = PLANS[setup.batch]

    def results(graphs: GraphedSteps, *_):
        names = ("focal", "dice", "iou", "object_score", "total")
        return names, torch.empty(len(names), device="cuda"), frozenset(range(len(graphs._grads)))

    with ExitStack() as stack:
        for context in (FakeTensorMode(), _fake_ranks()):
            stack.enter_context(context)
        stack.enter_context(mock.patch.object(GraphedSteps, "_accumulate", results))
        changes = {"GraphedSteps": partial(GraphedSteps, record_at=1)}
        changes |= {"CudaCapture": partial(_Capture, counter, tracker), "Transfer": _Transfer}
        stack.enter_context(mock.patch.multiple(trainer, **changes))
        stage = _trainer(setup, plan.num_frames)
        stage.plan = replace(stage.plan, rollout=plan)
        batch = _packed(fake_batch(plan.num_frames, objects, setup.side, "cpu"))
        for owner, name, place in (
            (stage.graphs, "run", PLACES[0]),
            (stage.engine, "finish_gradients", PLACES[1]),
            (stage.engine, "step", PLACES[2]),
            (stage, "_record", PLACES[3]),
        ):
            setattr(owner, name, tracker.tracked(getattr(owner, name), place))
        with counter:
            stage._step([batch])
            counter.tallies.clear()
            stage._step([batch])
    host = dict.fromkeys(PLACES, 0)
    for (_, (place, _)), tally in counter.tallies.items():
        host[place] += tally.launches
    return host


def _packed(batch: Batch) -> PackedBatch:
    width = batch.masks.shape[-1]
    bits = torch.empty(*batch.masks.shape[:-1], -(-width // 8), dtype=torch.uint8)
    return PackedBatch(batch.frames, bits, width, batch.object_to_clip, batch.sample_ids)


class _Transfer:
    """The stream of `transfer.Transfer` needs a device; its copies are these."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self, batch: PackedBatch) -> None:
        self._batch = batch.copied(self._device)

    def take(self) -> Batch:
        return self._batch.to(self._device)


class _Capture:
    """Records nothing; a replay is one launch."""

    def __init__(self, counter: StepCounter, tracker: PartTracker) -> None:
        self._counter, self._tracker = counter, tracker

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            self._counter.tallies["forward", (self._tracker.current(), "replay")].add(Tally(launches=1))

        return replay

    def crowded(self) -> bool:
        return False


def _trainer(setup: Setup, frames: int) -> trainer.StageTrainer:
    model = fake_model(setup)
    model.fix_sizes()
    data = {"dataset": "fake", "frames": frames, "max_objects": 1}
    config = Config(
        name="count",
        precision="bfloat16",
        model={"size": setup.size, "cuda_graphs": True},
        data={"datasets": {"fake": {"root": "nowhere"}}},
        stages=[{"name": "count", "steps": 9, "data": [data], "loss": {"fused": "fused_loss" not in setup.off}}],
    )
    optim, ranks = config.stages[0].optim, Ranks(0, RANKS, 0, torch.device("cuda"))
    engine = TorchEngine(optim, ranks, model, build_groups(model, optim), config.precision)
    telemetry = trainer.Telemetry(Meters(), None, None, None, dict, print)
    stop = StopRequest(Ranks(0, 1, 0, ranks.device), 1.0)  # asked between steps, which nobody counts
    return trainer.StageTrainer(
        config, RunState(), engine, [], [], ranks, None, telemetry, dict, BadRecords({}, 0), stop
    )


@contextmanager
def _fake_ranks() -> Iterator[None]:
    """Collectives are one launch each; pinned memory is memory."""
    # Fake tensors too are of a type that PyTorch's optimizers and norms take in lists.
    types = mock.patch.object(_foreach_utils, "_foreach_supported_types", [torch.Tensor, Parameter, FakeTensor])
    with (
        types,
        mock.patch.multiple(torch.distributed, all_reduce=_all_reduce, broadcast=lambda x, src: None),
        mock.patch.object(torch.Tensor, "pin_memory", lambda x: x),
    ):
        yield


def _all_reduce(x: torch.Tensor, group: None = None, async_op: bool = False) -> mock.Mock | None:
    x.mul_(1)
    return mock.Mock() if async_op else None
