"""Forward and backward of an image step with many objects and 7 corrections: what fills memory in SAM 2 training."""

from __future__ import annotations

from typing import NamedTuple

import torch
from harness.case import FACTOR, Case, Outputs, Provider, Run, Shape
from harness.inputs import discs
from torch import Tensor

import sam2fast.compat  # noqa: F401  (before timm imports torchvision)
from sam2fast.config import LossConfig
from sam2fast.data.sample import Batch
from sam2fast.losses import SegmentationLoss
from sam2fast.models.architecture import architecture
from sam2fast.models.plan import RolloutPlan
from sam2fast.models.rollout import rollout
from sam2fast.models.sam2 import SAM2
from sam2fast.performance import RecomputePolicy

CORRECTIONS = 7
SWITCHES = {"off": (False, "none"), "fused": (True, "none"), "recompute": (False, "decoder"), "on": (True, "decoder")}
"""`loss.fused` and `model.recompute` of each provider."""


class Inputs(NamedTuple):
    model: SAM2
    batch: Batch


def plan() -> RolloutPlan:
    """One click, then the corrections."""
    return RolloutPlan(1, "point", (0,), (0,), (False,), ((False,) * CORRECTIONS,))


def image_step(model: SAM2, batch: Batch, fused: bool, recompute: str) -> Tensor:
    """Total loss of an image batch in bfloat16 autocast."""
    model.recompute = RecomputePolicy.parse(recompute)
    with torch.autocast(batch.frames.device.type, torch.bfloat16):
        output = rollout(model, batch, plan())
        losses = SegmentationLoss(LossConfig(fused=fused))(
            [f.steps for f in output.frames], batch.masks, batch.num_objects
        )
    return losses["total"]


def _provider(fused: bool, recompute: str) -> Provider:
    def run(inputs: Inputs) -> Outputs:
        torch.manual_seed(0)  # of the clicks
        return {"total": image_step(inputs.model, inputs.batch, fused, recompute)}

    def prepare() -> Run:
        return run

    # Per click and candidate: about 8 tensors of the loss, and the decoder's, some 16 times smaller but 200 of them.
    tensors = 8 * (8 if not fused else 0) + (8 if recompute == "none" else 1) * 12
    return Provider(prepare, tensors)


class ImageStepCase(Case):
    name = "image_step"
    about = "rollout, loss and backward of Hiera-T on one image, a click and 7 corrections of every object"
    modes = ("full",)
    shapes = ("32@128",)
    check_shape = "2@32"
    has_candidates = False
    baseline = "off"
    tolerance = 2e-2  # bfloat16: a click that falls elsewhere changes what follows
    providers = {name: _provider(*switches) for name, switches in SWITCHES.items()}

    def make_inputs(self, shape: Shape, device: torch.device) -> Inputs:
        torch.manual_seed(0)
        side = FACTOR * shape.side
        model = SAM2(architecture("tiny", image_size=side, drop_path=0.0, memory_dropout=0.0)).train().to(device)
        torch.nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 3.0)  # all count as present
        _, targets = discs(shape, device)
        frames = torch.randint(0, 256, (1, 1, 3, side, side), dtype=torch.uint8, device=device)
        return Inputs(
            model, Batch(frames, targets[None], torch.zeros(len(targets), dtype=torch.long, device=device), ["discs"])
        )

    def dtype(self, inputs: Inputs) -> torch.dtype:
        return torch.bfloat16

    def backward(self, inputs: Inputs, outputs: Outputs) -> Tensor:
        """Gradients of all parameters, of which the first layer's is compared: it comes last."""
        first = inputs.model.image_encoder.trunk.patch_embed.proj.weight
        others = [parameter for parameter in inputs.model.parameters() if parameter is not first]
        return torch.autograd.grad(outputs["total"], [first, *others], allow_unused=True)[0]

    def reference(self, inputs: Inputs) -> Outputs:
        return self.observe(self.providers[self.baseline].prepare(), inputs)

    def ideal_bytes(self, inputs: Inputs, mode: str) -> int:
        """Parameters, image and masks read once, gradients written once."""
        parameters = sum(parameter.nbytes for parameter in inputs.model.parameters())
        return 2 * parameters + inputs.batch.frames.nbytes + inputs.batch.masks.nbytes


CASE = ImageStepCase()
