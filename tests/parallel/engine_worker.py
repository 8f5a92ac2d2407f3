"""Trains a small module with every engine in turn and writes what each did, as JSON, on rank 0.

Arguments: precision, file to write, and optionally a file with states of other engines to continue from. The states of
these engines are written beside the first file.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from sam2fast.config import EngineConfig, OptimConfig
from sam2fast.parallel import Engine, EngineState, Ranks, build_engine, setup, teardown

STEPS, LAST, BAD_STEP, ACCUMULATE, GLOBAL_BATCH, DECAY = 10, 3, 5, 2, 8, 0.8
ENGINES = {
    "torch": {"kind": "torch"},
    "fsdp": {"kind": "fsdp"},
    "fsdp_hybrid": {"kind": "fsdp", "shard_size": 1},
    **{f"deepspeed{stage}": {"kind": "deepspeed", "zero_stage": stage} for stage in range(4)},
    **{
        f"deepspeed{stage}_offload": {"kind": "deepspeed", "zero_stage": stage, "offload_optimizer": True}
        for stage in (2, 3)
    },
}


class Net(nn.Module):
    """Has a bare parameter and a part that only every other batch reaches, as SAM 2 has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
        self.memory = nn.Linear(4, 4)
        self.token = nn.Parameter(torch.randn(1, 4))
        self.frozen = nn.Parameter(torch.randn(3, 4), requires_grad=False)

    def blocks_run_once(self) -> list[nn.Module]:
        return list(self.trunk)

    def forward(self, x: Tensor, use_memory: bool) -> Tensor:
        y = self.trunk(x) + self.token + self.frozen.sum(0)
        return self.memory(y) if use_memory else y


def groups_of(module: nn.Module) -> list[dict]:
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
    return [
        {"params": matrices, "lr": 1e-2, "base_lr": 1e-2, "weight_decay": 0.1},
        {"params": vectors, "lr": 5e-3, "base_lr": 5e-3, "weight_decay": 0.0},
    ]


def run(ranks: Ranks, settings: dict, precision: str, others: dict[str, EngineState]) -> tuple:
    """What happened, and the state before the last steps; `others` are states to continue from as well."""
    averaging = settings.get("zero_stage") != 3
    engine = build_engine(
        EngineConfig(**settings),
        OptimConfig(lr=1e-2, clip=1.0, ema=DECAY if averaging else None),
        ranks,
        (module := Net()),
        groups_of(module),
        precision,
        ACCUMULATE,
        Net,
    )
    losses, skipped, norms = [], [], []
    for step in range(STEPS):
        if step == STEPS - LAST:
            saved = whole_state(engine, ranks)
        loss, result = train_step(engine, ranks, step)
        losses.append(loss)
        norms.append(float(result.grad_norm))
        skipped.append(bool(result.skipped))
    weights = {name: value.tolist() for name, value in engine.full_state_dict().items()}
    with (engine.engine if averaging else engine).evaluation() as whole:
        output = whole(torch.ones(1, 8), True).tolist() if ranks.main else None  # one rank alone must not hang
    ranks.barrier()
    averages = averages_of(engine) if averaging else None
    continued = {}
    for name, state in {"own": saved, **others}.items():
        engine.load_state(given_to(engine, copy.deepcopy(state)))
        continued[name] = [train_step(engine, ranks, step)[0] for step in range(STEPS - LAST, STEPS)]
        if averaging and name == "own":
            assert averages_of(engine) == averages
    engine.close()
    return {
        "losses": losses,
        "norms": [n if math.isfinite(n) else None for n in norms],
        "skipped": skipped,
        "weights": weights,
        "output": output,
        "averages": averages,
        "continued": continued,
    }, saved


def averages_of(engine: Engine) -> dict[str, list]:
    """The averaged weights, which are those of the evaluation; the weights that train stay."""
    before = copy.deepcopy(engine.full_state_dict())
    averages = engine.averaged_state_dict()
    with engine.evaluation() as module:
        assert all(torch.equal(module.state_dict()[name], value) for name, value in averages.items())
    after = engine.full_state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    return {name: value.tolist() for name, value in averages.items()}


def whole_state(engine: Engine, ranks: Ranks) -> EngineState:
    """The shares of all ranks together."""
    own = engine.state()
    tensors = {key: x.full_tensor() if isinstance(x, DTensor) else x for key, x in own.tensors().items()}
    whole = {key: x for share in ranks.gather(copy.deepcopy(tensors)) for key, x in share.items()}
    return EngineState.from_tensors(whole, own.scaler)


def given_to(engine: Engine, whole: EngineState) -> EngineState:
    """As a checkpoint is read for an engine."""
    own, tensors = engine.state().tensors(), whole.tensors()
    for key, value in tensors.items():
        if isinstance(own.get(key), DTensor):
            tensors[key] = distribute_tensor(value, own[key].device_mesh, own[key].placements)
    return EngineState.from_tensors(tensors, whole.scaler)


def train_step(engine, ranks: Ranks, step: int):
    x = torch.randn(GLOBAL_BATCH, 8, generator=torch.Generator().manual_seed(step))
    total = torch.zeros(())
    for micro, part in enumerate(x.chunk(ranks.world_size)[ranks.rank].chunk(ACCUMULATE)):
        loss = engine.forward(part, step % 2 == 0).float().pow(2).sum() * ranks.world_size / GLOBAL_BATCH
        if step == BAD_STEP:
            loss = loss * float("inf") - loss * float("inf")
        engine.backward(loss, boundary=micro == ACCUMULATE - 1)
        total += loss.detach() / ranks.world_size
    return ranks.sum(total).item(), engine.step(1 - step / 20)


if __name__ == "__main__":
    ranks = setup("cpu")
    results, states = {}, {}
    others = torch.load(sys.argv[3], weights_only=False) if len(sys.argv) > 3 else {}
    for name, settings in ENGINES.items():
        results[name], states[name] = run(ranks, settings, sys.argv[1], others)
    if ranks.main:
        Path(sys.argv[2]).write_text(json.dumps(results))
        torch.save(states, f"{sys.argv[2]}.states")
    teardown()
