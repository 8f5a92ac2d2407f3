"""Out of memory: what was being done and what to change, with the planner's numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from .config import Config, StageConfig, UserError
from .data.sample import PackedBatch
from .memory_plan import GIB, MARGIN, estimate_peak
from .models.architecture import Architecture
from .models.sam2 import SAM2
from .parallel.engine import is_out_of_memory
from .performance import RECOMPUTE_LADDER, RecomputePolicy, recompute_ladder
from .run_state import RunState
from .step_plan import StepPlan


class OutOfMemory(UserError):
    """A step needs more memory than there is."""


@contextmanager
def explained(
    config: Config,
    state: RunState,
    plan: StepPlan,
    batches: Sequence[PackedBatch],
    model: SAM2,
    device: torch.device,
) -> Iterator[None]:
    """Around a step on `batches`.

    Raises:
        OutOfMemory: in place of an allocator's error; it says what to change.
    """
    try:
        yield
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
    # Here the error, and with it the frames that hold the activations, are gone.
    clips, objects = [len(batch.sample_ids) for batch in batches], [batch.num_objects for batch in batches]
    advice = advise(config, state.stage, plan.item, model.arch, str(model.recompute), device)
    raise OutOfMemory(
        f"out of memory in step {state.global_step + 1} (stage {plan.stage!r}, dataset {plan.dataset!r}): {reason}. "
        f"Its micro-batches have {_span(clips)} clips of {plan.frames} frames at {config.model.image_size} pixels with "
        f"{_span(objects)} objects. {advice}"
    )


def advise(
    config: Config, stage_index: int, item_index: int, arch: Architecture, recompute: str, device: torch.device
) -> str:
    """What to change. With what a step needs now, and would with more recomputed (at most, computed: memory_plan.py; a
    number takes seconds, so there are two).

    Args:
        recompute: the policy in use.
    """
    stage = config.stages[stage_index]
    item, where = stage.data[item_index], f"stages.{stage_index}.data.{item_index}"

    def need(policy: str) -> float:
        settings, precision = config.model, config.precision
        performance, streams = settings.performance, settings.bfloat16_streams
        peak = estimate_peak(arch, performance, policy, stage, item, precision, device, streams)
        return MARGIN * peak / GIB

    more = _more(recompute, item.most_objects)
    options = [f"model.recompute={policy} ({need(policy):.2f} GiB)" for policy in more[:1]]
    if item.batch_size > 1:
        half = item.batch_size // 2
        factor = -(-item.batch_size // half) * stage.accumulate
        options.append(f"{where}.batch_size={half} with stages.{stage_index}.accumulate={factor} (the same update)")
    if item.max_objects > 1:
        options.append(f"{where}.max_objects={item.max_objects // 2}")
    if fewer := _fewer_frames(stage, item.frames):
        options.append(f"{where}.frames={fewer}")
    if config.precision == "float32":
        options.append("precision=bfloat16")
    options.append(f"a model.image_size below {config.model.image_size}")
    return (
        f"Such a step needs up to {need(recompute):.2f} GiB (computed, with {item.max_objects} objects a clip). Change "
        f"one or several of: {'; '.join(options)}"
    )


def first_line(error: BaseException) -> str:
    """What an allocator says, without its hints and addresses."""
    text = (str(error).splitlines() or [""])[0] or type(error).__name__
    return text.partition("DefaultCPUAllocator: ")[2] or text


def _more(recompute: str, objects: int) -> list[str]:
    """Policies of the ladder that recompute more of batches of up to so many objects, the next one first."""
    policy = RecomputePolicy.parse(recompute)
    current = "many_masks" if policy == RecomputePolicy(decoder=True) else str(policy)
    if current not in RECOMPUTE_LADDER:
        return [RECOMPUTE_LADDER[-1]]
    more = RECOMPUTE_LADDER[RECOMPUTE_LADDER.index(current) + 1 :]
    return [text for text in recompute_ladder(objects) if text in more]


def _fewer_frames(stage: StageConfig, frames: int) -> int:
    """Half as many frames, as far as the prompts of the stage allow; 0 where they do not."""
    fewer = frames // 2
    return fewer if fewer > 1 and fewer > stage.prompts.init_frames else 0


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"
