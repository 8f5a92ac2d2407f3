"""The training steps that are counted, on fake CUDA tensors.

`fake_cuda.load()` comes before the import of this module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from sam2fast.config import LossConfig, ModelConfig
from sam2fast.data.sample import Batch
from sam2fast.losses import SegmentationLoss
from sam2fast.models import rollout, trunk
from sam2fast.models.architecture import architecture
from sam2fast.models.plan import RolloutPlan
from sam2fast.models.position import TableCache
from sam2fast.models.sam2 import SAM2
from sam2fast.performance import PerformanceConfig

from .counter import StepCounter
from .parts import PartTracker

FRAMES, VIDEO_OBJECTS, IMAGE_OBJECTS, CORRECTIONS = 8, 3, 64, 7
SWITCHES: tuple[str, ...] = (*PerformanceConfig.model_fields, "fused_loss")
"""What can be off: the fields of model.performance, and loss.fused."""
ADAM_BYTES = 8
"""Of a parameter: two moments in float32."""

_CLICKS = (False,) * CORRECTIONS
PLANS: dict[str, tuple[RolloutPlan, int]] = {
    "video": (RolloutPlan(FRAMES, "mask", (0,)), VIDEO_OBJECTS),
    "points": (RolloutPlan(FRAMES, "point", (0, 4), (0, 4), (False, False), (_CLICKS, _CLICKS)), VIDEO_OBJECTS),
    "image": (RolloutPlan(1, "point", (0,), (0,), (False,), (_CLICKS,)), IMAGE_OBJECTS),
}
"""Plan and number of objects: 8 frames with the mask of the first one given; 8 frames of which two are clicked on and
corrected; one image."""


@dataclass(frozen=True)
class Setup:
    """A step and its optimizations."""

    size: str
    batch: str
    off: frozenset[str] = frozenset()
    """Of SWITCHES."""
    recompute: str = ModelConfig.model_fields["recompute"].default
    side: int = 1024
    """Of the images, in pixels."""
    bfloat16_streams: bool = False
    """`model.bfloat16_streams`, which is not exact."""


@dataclass(frozen=True)
class StepCount:
    """What a step costs."""

    counter: StepCounter
    saved: dict[tuple[str, str], int]
    """Bytes that are alive when the forward pass is over, by part and operation."""
    state_bytes: int
    """Parameters, buffers, moments of AdamW, frames and masks, which are alive all the time."""

    @property
    def peak_bytes(self) -> int:
        """Most memory that the step has alive: activations, gradients and results."""
        return self.counter.at_peak.total()


def count_step(setup: Setup) -> StepCount:
    """Forward pass, losses and backward pass of one step, under bfloat16 autocast as the trainer runs them."""
    torch.manual_seed(0)
    tracker = PartTracker()
    counter = StepCounter(tracker)
    plan, objects = PLANS[setup.batch]
    with FakeTensorMode(), gpu_attention(), _kept_tables(counter), _skipped_paths(), _single_thread():
        model, loss = fake_model(setup), SegmentationLoss(LossConfig(fused="fused_loss" not in setup.off))
        tracker.watch_model(model)
        tracker.watch(loss, "loss")
        batch = fake_batch(plan.num_frames, objects, setup.side)
        with counter, _tracked_clicks(tracker):
            with torch.autocast("cuda", torch.bfloat16):
                output = model(batch, plan)
            terms = loss([frame.steps for frame in output.frames], batch.masks, float(objects))
            saved = dict(counter.live)
            terms["total"].backward()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        tensors: list[Tensor] = [*model.parameters(), *model.buffers(), batch.frames, batch.masks]
        state = ADAM_BYTES * parameters + sum(tensor.nbytes for tensor in tensors)
    return StepCount(counter, saved, state)


def fake_model(setup: Setup) -> SAM2:
    """The model with weights that are fake CUDA tensors if called in FakeTensorMode."""
    performance = PerformanceConfig(**{name: name not in setup.off for name in PerformanceConfig.model_fields})
    arch = architecture(setup.size, image_size=setup.side)
    with unset_fake_temporarily(), torch.device("meta"):  # constructors may read numbers from tensors on the CPU
        model = SAM2(arch, setup.recompute, performance, bfloat16_streams=setup.bfloat16_streams)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(_fake(parameter)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, _fake(buffer))
    return model.train()


def _fake(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


def fake_batch(frames: int, objects: int, side: int, device: str = "cuda") -> Batch:
    return Batch(
        frames=torch.empty(1, frames, 3, side, side, dtype=torch.uint8, device=device),
        masks=torch.empty(frames, objects, side, side, dtype=torch.bool, device=device),
        object_to_clip=torch.zeros(objects, dtype=torch.long, device=device),
        sample_ids=["fake"],
    )


@contextmanager
def _single_thread() -> Iterator[None]:
    """The backward pass runs in this thread, as PartTracker needs it."""
    with torch.autograd.set_multithreading_enabled(False):
        yield


@contextmanager
def gpu_attention() -> Iterator[None]:
    """Attention is the kernel that PyTorch takes on an A100 for bfloat16: flash, or with a mask, or values of another
    width than the keys, the memory-efficient one."""

    def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if q.dtype not in (torch.bfloat16, torch.float16) or enable_gqa:
            raise NotImplementedError(f"attention in {q.dtype}, or with shared heads, is not counted")
        if attn_mask is None and v.shape[-1] == k.shape[-1]:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
        if v.shape[-1] % 8:
            raise NotImplementedError(
                f"attention to values of {v.shape[-1]} channels, no multiple of 8, is not counted"
            )
        mask = None if attn_mask is None else attn_mask.expand(*q.shape[:-1], k.shape[-2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, mask, True, dropout_p, is_causal, scale=scale
        )[0]

    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", attend, "AutogradCUDA")  # below autocast
    try:
        yield
    finally:
        library._destroy()


@contextmanager
def _skipped_paths() -> Iterator[None]:
    """Stochastic depth leaves samples out, as in training, where the trunk masks fake tensors: one draw, of seed 0."""
    draw = trunk.HieraTrunk._draw_kept

    def drawn(self: trunk.HieraTrunk, images: Tensor):
        with unset_fake_temporarily(), mock.patch.object(trunk, "FakeTensor", ()):
            kept = draw(self, torch.empty(len(images)))
        return [[None if index is None else _fake(index) for index in pair] for pair in kept]

    with mock.patch.object(trunk.HieraTrunk, "_draw_kept", drawn):
        yield


@contextmanager
def _kept_tables(counter: StepCounter) -> Iterator[None]:
    """Constant tables are built once and cost nothing afterwards, as for plain tensors; see TableCache."""

    def get(self, key, build):
        if key not in self._entries:
            with counter.paused(), torch.no_grad():
                self._entries[key] = build()
        return self._entries[key]

    with mock.patch.object(TableCache, "get", get):
        yield


@contextmanager
def _tracked_clicks(tracker: PartTracker) -> Iterator[None]:
    """The functions of the simulated user are click sampling."""
    names = ("sample_click", "sample_box", "coarse_mask")
    functions = {name: tracker.tracked(getattr(rollout, name), "click sampling") for name in names}
    with mock.patch.multiple(rollout, **functions):
        yield
