"""Trains a micro SAM 2 on one global batch a step with a list of engines, and writes how far each is from one process.

Arguments: JSON list of cases, JSON file to write, file of the reference. One rank makes the reference, from the first
case; two ranks compare with it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from sam2fast.config import EngineConfig, LossConfig, OptimConfig
from sam2fast.data.sample import Batch
from sam2fast.losses import SegmentationLoss
from sam2fast.models.architecture import architecture
from sam2fast.models.plan import RolloutPlan
from sam2fast.models.sam2 import SAM2
from sam2fast.optim import build_groups, freeze
from sam2fast.parallel import Engine, Ranks, build_engine, setup, teardown

SIZE, FRAMES = 64, 2
OBJECTS = (1, 3, 1, 2, 2, 1, 1, 3)
"""Of the clips of a step; the ranks have different numbers, and so have their micro-steps."""
PLANS = (
    RolloutPlan(FRAMES, "point", (0,), box=(False,), first_click="center"),
    RolloutPlan(1, "point", (0,), box=(True,), box_noise=0.0),
    RolloutPlan(FRAMES, "mask", (0,)),
)
"""Clips from a click, images from a box, clips from a mask: nothing random. Each reaches other parts of the model."""
# AdamW divides by the size of gradients. Some here are zero but for rounding (biases of keys): eps is above it.
OPTIM = {"lr": 1e-4, "eps": 1e-6, "warmup": 0}


def build(recompute: str = "decoder") -> SAM2:
    torch.manual_seed(0)
    return SAM2(architecture("micro", image_size=SIZE, drop_path=0.0, memory_dropout=0.0), recompute=recompute).train()


def batch(step: int, clips: range, frames: int) -> Batch:
    """Discs on noise that move by a pixel a frame; what a clip shows depends on its number alone."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    images, masks, owners = [], [], []
    for position, clip in enumerate(clips):
        generator = torch.Generator().manual_seed(100 * step + clip)
        images.append(torch.randn(frames, 3, SIZE, SIZE, generator=generator))
        for center_x, center_y, radius in torch.rand(OBJECTS[clip], 3, generator=generator):
            shifts = torch.arange(frames).view(-1, 1, 1)
            squares = (x - 16 - 32 * center_x - shifts) ** 2 + (y - 16 - 32 * center_y) ** 2
            masks.append(squares < (6 + 8 * radius) ** 2)
            owners.append(position)
    return Batch(torch.stack(images), torch.stack(masks, dim=1), torch.tensor(owners), [str(clip) for clip in clips])


def train(engine: Engine, ranks: Ranks, steps: int, accumulate: int) -> list[float]:
    loss, losses = SegmentationLoss(LossConfig()), []
    each = len(OBJECTS) // ranks.world_size // accumulate
    normalizer = torch.tensor(sum(OBJECTS) / ranks.world_size)
    for step in range(steps):
        plan, total = PLANS[step % len(PLANS)], torch.zeros(())
        for micro in range(accumulate):
            start = (ranks.rank * accumulate + micro) * each
            inputs = batch(step, range(start, start + each), plan.num_frames)
            output = engine.forward(inputs, plan)
            value = loss([frame.steps for frame in output.frames], inputs.masks, normalizer)["total"]
            engine.backward(value, boundary=micro == accumulate - 1)
            total += value.detach() / ranks.world_size
        losses.append(ranks.sum(total).item())
        engine.step(1 - step / (2 * steps))
    return losses


def run(case: dict, ranks: Ranks) -> tuple[list[float], dict[str, Tensor]]:
    module = build(case.get("recompute", "decoder"))
    freeze(module, case.get("freeze", []))
    if case.get("compile"):
        module.compile_regions(case["compile"])
    optim = OptimConfig(**OPTIM, **case.get("optim", {}))
    engine = build_engine(
        EngineConfig(**case["engine"]),
        optim,
        ranks,
        module,
        build_groups(module, optim),
        case.get("precision", "float32"),
        case["accumulate"],
        build,
    )
    losses = train(engine, ranks, case["steps"], case["accumulate"])
    weights = engine.full_state_dict()
    engine.close()
    return losses, weights


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Length of the difference relative to that of the weights. Single weights may differ by more: rounding turns the
    sign of a hidden unit of the decoder, which sees a few tokens only, and AdamW makes a whole step of it."""
    length = torch.stack([value.float().norm() for value in wanted.values()]).norm()
    return float(torch.stack([(found[name] - value).float().norm() for name, value in wanted.items()]).norm() / length)


def main() -> None:
    ranks, cases, reference = setup("cpu"), json.loads(sys.argv[1]), Path(sys.argv[3])
    if ranks.world_size == 1:
        torch.save(run(cases[0], ranks), reference)
    else:
        losses, weights = torch.load(reference)
        found = {}
        for case in cases:
            got = run(case, ranks)
            found[case["name"]] = {
                "losses": max(abs(a - b) / abs(b) for a, b in zip(got[0], losses, strict=True)),
                "weights": distance(got[1], weights),
            }
            if ranks.main:
                print(case["name"], found[case["name"]], flush=True)
        if ranks.main:
            Path(sys.argv[2]).write_text(json.dumps(found))
    teardown()


if __name__ == "__main__":
    main()
