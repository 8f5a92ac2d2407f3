"""Between two logging steps nothing waits for the device: no value of a tensor is read on the host."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

# A whole step of each kind of batch on fake CUDA tensors, which have no values: reading one, or branching on one,
# raises. A process of its own, as one that has imported torch without a GPU cannot get a fake one.
FAKE_STEPS = """
from counting import fake_cuda
fake_cuda.load()
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from counting.steps import Setup, fake_batch, fake_model, gpu_attention
from sam2fast.config import LossConfig
from sam2fast.losses import SegmentationLoss
from sam2fast.models.plan import RolloutPlan
from sam2fast.parallel.engine import clip_within_update

clicks = (False,) * 3
plans = {
    "video": RolloutPlan(4, "mask", (0,)),
    "points": RolloutPlan(3, "point", (0, 1), (0, 1), (False, False), (clicks, clicks)),
    "image": RolloutPlan(1, "point", (0,), (0,), (False,), (clicks,)),
}
for kind, plan in plans.items():
    with FakeTensorMode(), gpu_attention(), torch.autograd.set_multithreading_enabled(False):
        model, batch = fake_model(Setup("micro", kind)), fake_batch(plan.num_frames, 3, 1024)
        parameters, loss = list(model.parameters()), SegmentationLoss(LossConfig())
        optimizer = torch.optim.AdamW(parameters, fused=True)
        with torch.autocast("cuda", torch.bfloat16):
            output = model(batch, plan)
        loss([frame.steps for frame in output.frames], batch.masks, 3.0)["total"].backward()
        norm = clip_within_update(optimizer, parameters, 0.1).grad_norm
        optimizer.step()
        optimizer.zero_grad()
        try:
            norm.item()
        except Exception as error:
            print(kind, type(error).__name__)
"""


def test_a_step_reads_no_value_of_the_device():
    done = subprocess.run([sys.executable, "-c", FAKE_STEPS], capture_output=True, text=True, cwd=BENCHMARKS)
    if "C++20 compiler" in done.stderr or "sees no GPU" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    # The last line of each kind shows that reading one would have raised.
    assert done.stdout.split("\n")[:3] == [
        f"{kind} DataDependentOutputException" for kind in ("video", "points", "image")
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mask", "point"])
def test_a_step_never_waits_for_the_gpu(kind):
    from sam2fast.config import LossConfig
    from sam2fast.data.sample import Batch
    from sam2fast.losses import SegmentationLoss
    from sam2fast.models.architecture import architecture
    from sam2fast.models.plan import RolloutPlan
    from sam2fast.models.sam2 import SAM2
    from sam2fast.parallel.engine import clip_within_update

    corrections = {"mask": (), "point": ((0, 2), (False, False), ((False,) * 3,) * 2)}[kind]
    plan = RolloutPlan(4, kind, (0,), *corrections)
    model = SAM2(architecture("micro", image_size=256)).cuda().train()
    masks = torch.zeros(4, 2, 256, 256, dtype=torch.bool)
    masks[:, 0, 50:100, 50:100] = masks[:, 1, 150:200, 20:90] = True
    frames = torch.randint(0, 256, (1, 4, 3, 256, 256), dtype=torch.uint8)
    batch = Batch(frames, masks, torch.zeros(2, dtype=torch.long), ["squares"]).to(torch.device("cuda"))
    parameters, loss = list(model.parameters()), SegmentationLoss(LossConfig())
    optimizer = torch.optim.AdamW(parameters, fused=True)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            output = model(batch, plan)
        loss([frame.steps for frame in output.frames], batch.masks, batch.num_objects)["total"].backward()
        clip_within_update(optimizer, parameters, 0.1)
        optimizer.step()
        optimizer.zero_grad()

    step()  # builds tables and compiles kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
