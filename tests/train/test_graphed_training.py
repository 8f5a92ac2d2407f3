"""Training with model.cuda_graphs: the wiring on a CPU, where a recording does the work again; real graphs on a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sam2fast import recipe, trainer
from sam2fast.config import LossConfig, OptimConfig
from sam2fast.config_file import load_config
from sam2fast.data.sample import Batch
from sam2fast.losses import SegmentationLoss
from sam2fast.models.architecture import architecture
from sam2fast.models.plan import RolloutPlan
from sam2fast.models.sam2 import SAM2
from sam2fast.models.trunk import HieraTrunk
from sam2fast.optim import build_groups
from sam2fast.parallel import CudaCapture, GraphedSteps, Ranks, setup, teardown
from sam2fast.parallel.ddp import TorchEngine

CLICKS = ((False, True), (True, False))
PLANS = {
    "mask": RolloutPlan(4, "mask", (0,)),
    "points": RolloutPlan(4, "point", (0,), (0, 2), (False,), CLICKS),
    "image": RolloutPlan(1, "point", (0,), (0,), (True,), CLICKS[:1]),
}


class Rerun:
    """Stands in for CUDA graphs: a replay does the work again."""

    recorded: Counter[str] = Counter()

    def __call__(self, work):
        self.recorded["kinds"] += 1

        def replay() -> None:
            self.recorded["replays"] += 1
            work()

        return replay

    def crowded(self) -> bool:
        return False


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)  # and again after the test
    yield setup("cpu")
    teardown()


def test_a_run_with_graphs_ends_with_the_weights_of_one_without(
    process: Ranks, config: Path, synthetic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images and clips, dropout, stochastic depth, clicks that ignore the errors."""
    monkeypatch.setattr(HieraTrunk, "fixed_sizes", True)  # in both runs, so that both draw the same
    monkeypatch.setattr(trainer, "CudaCapture", Rerun)
    monkeypatch.setattr(recipe, "check_config", lambda *_: None)
    Rerun.recorded.clear()
    base = load_config(config, [f"data.root={synthetic}", f"output_dir={tmp_path / 'eager'}", "validation.sets=[]"])
    click = {"mask": 0.0, "click": 1.0, "box": 0.0}
    prompts = {"image": click, "video": click, "click_from_ground_truth": 0.5, "correction_clicks": 1}
    prompts |= {"init_frames": 1, "corrected_frames": 1}
    stage = base.stages[2].model_dump() | {"steps": 6, "accumulate": 1, "prompts": prompts}
    values = base.model_dump() | {"stages": [stage]}
    for name, graphs in (("eager", False), ("graphs", True)):
        model = values["model"] | {"cuda_graphs": graphs}
        run = type(base).model_validate(values | {"model": model, "output_dir": str(tmp_path / name)})
        recipe.run(run, process)
    want, found = (torch.load(tmp_path / name / "export" / "model.pt")["model"] for name in ("eager", "graphs"))
    assert found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)
    assert Rerun.recorded["kinds"] >= 2 and Rerun.recorded["replays"] >= 2
    assert '"perf/replayed": 1.0' in (tmp_path / "graphs" / "log.jsonl").read_text()


def test_clicks_that_ignore_the_errors_may_come_as_a_tensor() -> None:
    model, batch, plan = build("cpu"), make_batch("points"), PLANS["points"]
    assert plan.kind == replace(plan, click_from_gt=((False, False), (False, False))).kind
    outputs = []
    for given in (plan, replace(plan.kind, on_object=torch.tensor(CLICKS)), plan.kind):
        torch.manual_seed(1)
        with torch.no_grad():
            outputs.append(model(batch, given))
    want, found, other = outputs
    points, found_points, other_points = (
        torch.cat([frame.points[-1][0].flatten(1) for frame in out.frames if frame.points[-1]], dim=1)
        for out in (want, found, other)
    )
    assert torch.equal(found_points, points) and not torch.equal(other_points, points)
    for mine, others in zip(found.frames, want.frames, strict=True):
        assert torch.equal(mine.steps[-1].low_res, others.steps[-1].low_res)


def build(device: str, rate: float = 0.0, side: int = 64) -> SAM2:
    torch.manual_seed(0)
    arch = architecture("micro", image_size=side, drop_path=rate, memory_dropout=rate)
    model = SAM2(arch, recompute="decoder+trunk").train()
    torch.nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 3.0)
    model.fix_sizes()
    return model.to(device)


def make_batch(kind: str, side: int = 64, seed: int = 0) -> Batch:
    frames = PLANS[kind].num_frames
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (1, frames, 3, side, side), dtype=torch.uint8, generator=generator)
    masks = torch.zeros(frames, 2, side, side, dtype=torch.bool)
    start = side // 8 + seed
    masks[:, 0, start : start + side // 4, 3:-3] = masks[:, 1, side // 2 :, start : start + side // 3] = True
    return Batch(images, masks, torch.zeros(2, dtype=torch.long), ["squares"])


class Steps:
    """Engine and graphs of one model on a GPU."""

    def __init__(self, rate: float, graphs: bool, precision: str = "bfloat16") -> None:
        self.device = torch.device("cuda")
        self.model = build("cuda", rate, side=256)
        groups = build_groups(self.model, OptimConfig())
        self.engine = TorchEngine(OptimConfig(), Ranks(0, 1, 0, self.device), self.model, groups, precision)
        self.loss = SegmentationLoss(LossConfig())
        self.graphs = None
        if graphs:
            self.graphs = GraphedSteps(self.engine, self.compute, CudaCapture(), self.model.constant_tables)

    def compute(self, kind: RolloutPlan, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        batch = Batch(inputs["frames"], inputs["masks"], inputs["object_to_clip"], [])
        output = self.engine.forward(batch, replace(kind, on_object=inputs.get("on_object")))
        return self.loss([frame.steps for frame in output.frames], batch.masks, 2.0)

    def run(self, kind: str, batch: Batch, seed: int, update: bool = True) -> dict[str, Tensor]:
        """Loss terms and gradients of one step."""
        plan = PLANS[kind]
        inputs = {name: getattr(batch, name) for name in ("frames", "masks", "object_to_clip")}
        if plan.clicks:
            inputs["on_object"] = torch.tensor(plan.click_from_gt)
        inputs = {name: x.pin_memory() for name, x in inputs.items()}
        torch.manual_seed(seed)
        if self.graphs is None:
            terms = self.compute(plan.kind, {name: x.to(self.device, non_blocking=True) for name, x in inputs.items()})
            self.engine.backward(terms["total"], boundary=True)
        else:
            terms = self.graphs.run(plan.kind, inputs, boundary=True)
        found = {name: value.detach() for name, value in terms.items()}
        found |= {name: p.grad.clone() for name, p in self.model.named_parameters()}
        self.engine.step(1.0 if update else 0.0)
        return found


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize(
    # Products may be added up in another order in a recording. In bfloat16 that turns the sign of some hidden units,
    # and changes single gradients by up to a fifth (the difference between float32 and bfloat16).
    "precision, losses, gradients",
    [("float32", 1e-4, 1e-3), ("bfloat16", 1e-2, 5e-2)],
)
def test_replays_give_the_losses_and_gradients_of_eager_steps(
    deterministic, rate: float, precision: str, losses: float, gradients: float
) -> None:
    """Over updates, kinds that take turns and batches that differ; with dropout too, as the seeds are the same."""
    eager, graphed = Steps(rate, graphs=False, precision=precision), Steps(rate, graphs=True, precision=precision)
    parameters = dict(eager.model.named_parameters())
    kinds = ["mask", "points", "image"] * 4
    for number, kind in enumerate(kinds):
        batch = make_batch(kind, 256, seed=number)
        # Gradients differ in their last bits from run to run. Without this the weights would drift apart, a pixel would
        # change its sign, and a click its place.
        eager.model.load_state_dict(graphed.model.state_dict())
        want, found = eager.run(kind, batch, number, update=False), graphed.run(kind, batch, number)
        for name in want.keys() - parameters.keys():
            assert found[name].item() == pytest.approx(want[name].item(), rel=losses, abs=losses), (number, kind, name)
        # By length: some gradients, such as those of the biases of keys, are nothing but rounding.
        errors = {name: (found[name] - want[name]).norm().item() for name in parameters}
        length = torch.stack([want[name].norm() for name in parameters]).norm().item()
        assert max(errors.values()) <= gradients * length, (number, kind, max(errors, key=errors.get), length)
    assert graphed.graphs.replayed_share() == 0.5


@pytest.mark.gpu
def test_replays_draw_anew_and_repeat_with_the_seed() -> None:
    steps = Steps(0.3, graphs=True)
    batch = make_batch("mask", 256)
    totals = [steps.run("mask", batch, seed, update=False)["total"].item() for seed in (0, 0, 1, 2, 1, 2)]
    assert totals[2] == totals[4] != totals[3] == totals[5]


@pytest.mark.gpu
def test_a_replayed_step_neither_waits_nor_launches_much() -> None:
    from torch.profiler import ProfilerActivity, profile

    steps = Steps(0.1, graphs=True)
    batches = {kind: make_batch(kind, 256) for kind in PLANS}
    for _ in range(3):
        for kind, batch in batches.items():
            steps.run(kind, batch, 0)
    for kind, batch in batches.items():
        plan = PLANS[kind]
        inputs = {name: getattr(batch, name) for name in ("frames", "masks", "object_to_clip")}
        if plan.clicks:
            inputs["on_object"] = torch.tensor(plan.click_from_gt)
        inputs = {name: x.pin_memory() for name, x in inputs.items()}
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
                steps.graphs.run(plan.kind, inputs, boundary=True)
                steps.engine.step(1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        calls = Counter(event.name for event in profiled.events())
        assert calls["cudaGraphLaunch"] == 1
        started = sum(count for name, count in calls.items() if name.startswith(("cudaLaunch", "cuLaunch", "cudaMem")))
        assert started < 1000, calls.most_common(8)
