"""A whole training step: rollout, loss, backward, clipping and AdamW, with every optimization off, on, or one off."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from harness.case import Case, Outputs, Provider
from harness.inputs import moving_discs
from harness.limits import FUSED_STEP_MS
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import sam2fast.compat  # noqa: F401  (before timm imports torchvision)
from sam2fast.config import LossConfig, OptimConfig
from sam2fast.data.sample import Batch
from sam2fast.losses import SegmentationLoss
from sam2fast.models.architecture import architecture
from sam2fast.models.plan import RolloutPlan
from sam2fast.models.sam2 import SAM2
from sam2fast.parallel import CudaCapture, GraphedSteps, Ranks
from sam2fast.parallel.ddp import TorchEngine
from sam2fast.parallel.engine import clip_within_update
from sam2fast.performance import PerformanceConfig
from sam2fast_kernels import library
from sam2fast_kernels.library import register_flop_formulas

SIZES = {"T": "tiny", "S": "small", "B+": "base_plus", "L": "large"}
CLICKS = ((False,) * 7,)
KINDS = {
    "mask": RolloutPlan(8, "mask", (0,)),
    "points": RolloutPlan(8, "point", (0,), (0, 4), (False,), CLICKS * 2),
    "image": RolloutPlan(1, "point", (0,), (0,), (False,), CLICKS),
}
"""What the simulated user does; a corrected frame gets seven clicks."""


class StepShape(NamedTuple):
    """Size of the model, kind of batch, objects, side of the image in pixels, precision, and whether it is the step
    that training runs, or one without dropout, whose numbers can be compared."""

    text: str
    size: str
    kind: str
    objects: int
    side: int
    dtype: torch.dtype
    random: bool

    @property
    def full_size_bytes(self) -> int:
        return 0


@dataclass
class Inputs:
    shape: StepShape
    batch: Batch
    steps: dict[str, Step] = field(default_factory=dict)
    """By provider: each has weights and optimizer of its own."""
    running: Step | None = None
    """The one whose backward pass comes next."""


class Step:
    """Model, loss and optimizer of one provider. The rate is 0, so that every step starts from the same weights."""

    def __init__(self, shape: StepShape, device: torch.device, switches: Switches) -> None:
        torch.manual_seed(0)
        rate = 0.1 if shape.random else 0.0
        arch = architecture(SIZES[shape.size], image_size=shape.side, drop_path=rate, memory_dropout=rate)
        self.model = SAM2(arch, switches.recompute, switches.performance, bfloat16_streams=switches.bfloat16_streams)
        self.model.train().to(device)
        if switches.compile:
            self.model.compile_regions()
        # Untrained scores call objects absent at random, and an absent object costs less.
        torch.nn.init.constant_(self.model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 3.0)
        self.loss = SegmentationLoss(LossConfig(fused=switches.fused_loss))
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, fused=True)
        self.autocast = torch.autocast(device.type, shape.dtype, enabled=shape.dtype != torch.float32)

    def forward(self, shape: StepShape, batch: Batch) -> Tensor:
        torch.manual_seed(1)  # of clicks and dropout
        with self.autocast:
            output = self.model(batch, KINDS[shape.kind])
            return self.loss([f.steps for f in output.frames], batch.masks, batch.num_objects)["total"]

    def update(self, total: Tensor) -> Tensor:
        """Gradient of the first layer, which comes last."""
        total.backward()
        gradient = self.model.image_encoder.trunk.patch_embed.proj.weight.grad.clone()
        clip_within_update(self.optimizer, self.parameters, 0.1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return gradient


class GraphedStep(Step):
    """One that is replayed as a CUDA graph; `forward` then computes the gradients too."""

    def __init__(self, shape: StepShape, device: torch.device, switches: Switches) -> None:
        super().__init__(shape, device, switches)
        self.model.fix_sizes()
        precision = str(shape.dtype).removeprefix("torch.")
        groups = [{"params": self.parameters, "lr": 0.0, "base_lr": 0.0}]
        self.engine = TorchEngine(OptimConfig(), Ranks(0, 1, 0, device), self.model, groups, precision)
        self.graphs = GraphedSteps(self.engine, self._terms, CudaCapture(), self.model.constant_tables, record_at=1)

    def _terms(self, plan: RolloutPlan, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        batch = Batch(inputs["frames"], inputs["masks"], inputs["object_to_clip"], [])
        output = self.engine.forward(batch, plan)
        return self.loss([f.steps for f in output.frames], batch.masks, batch.num_objects)

    def forward(self, shape: StepShape, batch: Batch) -> Tensor:
        torch.manual_seed(1)
        inputs = {name: getattr(batch, name) for name in ("frames", "masks", "object_to_clip")}
        return self.graphs.run(KINDS[shape.kind], inputs, boundary=True)["total"]

    def update(self, total: Tensor) -> Tensor:
        gradient = self.model.image_encoder.trunk.patch_embed.proj.weight.grad.clone()
        self.engine.step(1.0)
        return gradient


@dataclass(frozen=True)
class Switches:
    performance: PerformanceConfig = PerformanceConfig()
    fused_loss: bool = True
    recompute: str = "none"
    compile: bool = False
    bfloat16_streams: bool = False
    graphs: bool = False

    def obstacle(self, device: torch.device) -> str | None:
        """Why such a step cannot run on a device."""
        if self.graphs and device.type != "cuda":
            return "needs CUDA"
        return library.compile_obstacle(device) if self.compile else None


OFF = Switches(PerformanceConfig.all_off(), fused_loss=False)
PROVIDERS = {
    "all_off": OFF,
    "all_on": Switches(),
    "all_on_compiled": Switches(compile=True),
    "all_on_graphs": Switches(graphs=True),
    "all_on_compiled_graphs": Switches(compile=True, graphs=True),
    "all_on_bfloat16_streams": Switches(bfloat16_streams=True),
    "recompute_decoder": Switches(recompute="decoder"),
    "no_fused_loss": Switches(fused_loss=False),
    **{f"no_{name}": Switches(PerformanceConfig(**{name: False})) for name in PerformanceConfig.model_fields},
}


def _provider(name: str) -> Provider:
    switches = PROVIDERS[name]
    kind = GraphedStep if switches.graphs else Step

    def run(inputs: Inputs) -> Outputs:
        if name not in inputs.steps:
            inputs.steps[name] = kind(inputs.shape, inputs.batch.frames.device, switches)
        inputs.running = inputs.steps[name]
        return {"total": inputs.running.forward(inputs.shape, inputs.batch)}

    return Provider(lambda: run, obstacle=switches.obstacle)


class StepTimeCase(Case):
    name = "step_time"
    about = "training step with all optimizations on, all off, and one off at a time"
    modes = ("full",)
    shapes = ("T-mask@512", "T-points@512", "T-image@512")
    check_shape = "T-points@64-check"
    baseline = "all_off"
    tolerance = 2e-3
    """Without dropout; gradients pass through eight frames and fourteen clicks."""
    providers = {name: _provider(name) for name in PROVIDERS}

    def __init__(self) -> None:
        self._flops: dict[StepShape, int] = {}
        """Of the baseline, known once it has run."""

    def shape(self, text: str) -> StepShape:
        pattern = (
            rf"({'|'.join(map(re.escape, SIZES))})-({'|'.join(KINDS)})(?:x([1-9]\d*))?@([1-9]\d*)(-bf16)?(-check)?"
        )
        match = re.fullmatch(pattern, text)
        if match is None or int(match[4]) % 32:
            raise ValueError(
                f"unknown shape {text!r} of case {self.name}: write SIZE-KIND@SIDE or SIZE-KINDxOBJECTS@SIDE, SIZE "
                f"one of {', '.join(SIZES)}, KIND one of {', '.join(KINDS)}, SIDE a multiple of 32, for instance "
                "T-mask@512 or L-imagex64@1024-bf16"
            )
        size, kind, objects, side, half, check = match.groups()
        dtype = torch.bfloat16 if half else torch.float32
        count = int(objects or (16 if kind == "image" else 2))
        return StepShape(text, size, kind, count, int(side), dtype, not check)

    def make_inputs(self, shape: StepShape, device: torch.device) -> Inputs:
        self._random = shape.random
        num_frames = KINDS[shape.kind].num_frames
        generator = torch.Generator().manual_seed(0)
        size = (1, num_frames, 3, shape.side, shape.side)
        frames = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        masks = moving_discs(num_frames, shape.objects, shape.side)
        owner = torch.zeros(shape.objects, dtype=torch.long)
        return Inputs(shape, Batch(frames, masks, owner, ["discs"]).to(device))

    def dtype(self, inputs: Inputs) -> torch.dtype:
        return inputs.shape.dtype

    def backward(self, inputs: Inputs, outputs: Outputs) -> Tensor:
        return inputs.running.update(outputs["total"])

    def reference(self, inputs: Inputs) -> Outputs:
        register_flop_formulas()
        with FlopCounterMode(display=False) as counter:
            outputs = self.observe(self.providers[self.baseline].prepare(), inputs)
        self._flops[inputs.shape] = counter.get_total_flops()
        return outputs

    def model_flops(self, inputs: Inputs) -> int | None:
        return self._flops.get(inputs.shape)

    def limit_ms(self, inputs: Inputs, device: str) -> float | None:
        shape = inputs.shape
        kind, objects = ("image", 64) if shape.kind == "image" else ("video", 3)
        fits = (shape.side, shape.objects, shape.dtype) == (1024, objects, torch.bfloat16)
        return FUSED_STEP_MS[shape.size, kind].get(device) if fits else None

    def fault(self, provider: str, observed: Outputs, expected: Outputs) -> str | None:
        if not torch.stack([value.double().norm() for value in observed.values()]).isfinite().all():
            return "loss or gradient is not finite"
        # Providers draw dropout from streams of their own.
        return None if self._random else super().fault(provider, observed, expected)

    def ideal_bytes(self, inputs: Inputs, mode: str) -> int:
        """Parameters and their states, image and masks read once, parameters and states written once."""
        parameters = sum(p.nbytes for step in inputs.steps.values() for p in step.parameters) // len(inputs.steps)
        return 7 * parameters + inputs.batch.frames.nbytes + inputs.batch.masks.nbytes


CASE = StepTimeCase()
