"""Switches of the optimizations of a training step.

Every one of them is exact: it changes the order of floating-point operations and the stream of random numbers at most.
With all of them off the model computes as the official one does, operation by operation.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from .config_section import Section


class PerformanceConfig(Section):
    """What makes a step faster or smaller."""

    fused_memory_attention: bool = True
    """Memory attention by one kernel that rotates, drops and never stores the scores; off is PyTorch's attention."""
    absorbed_values: bool = True
    """Memory attention sums the 64-wide memories and projects the sums, instead of projecting every memory."""
    shared_self_attention: bool = True
    """What the first layer of memory attention computes alike for all objects of a frame is computed once."""
    fused_dropout: bool = True
    """Dropout in one pass with the ReLU before or the sum after it, its mask computed again instead of stored."""
    unpadded_windows: bool = True
    """Window attention of the trunk projects the tokens of the image alone, not the padding of the windows."""
    skip_dropped_paths: bool = True
    """Stochastic depth leaves out the samples of a block that it drops, instead of multiplying them by zero."""
    lean_projections: bool = True
    """Linear layers of trunk and memory attention: what a LayerNorm or GELU hands to them is computed again in the
    backward pass, and the gradients of q, k and v are not joined."""
    folded_projections: bool = True
    """Projections that follow on each other are one matrix product: those of strides 4 and 8 in neck and decoder, and
    with `absorbed_values` those of values and output in memory attention."""
    shared_image_features: bool = True
    """Mask decoder: what is equal for all masks of an image is neither copied nor computed for each."""
    absorbed_projections: bool = True
    """Mask decoder: the tokens take over the projections of the image they attend to or are attended by, so that no
    queries, keys and values of the image exist; LayerNorm and residual sum are part of it."""
    fused_upscaling: bool = True
    """Mask decoder: features at stride 4 exist for a few objects at a time, and only masks in use are computed."""
    fused_norms: bool = True
    """Convolutions run channels-last, with LayerNorm2d, GELU and residual sums fused."""
    skip_unread: bool = True
    """Memories that no later frame reads (those of the last frame, and of images) are not encoded."""

    @classmethod
    def all_off(cls) -> PerformanceConfig:
        """Every optimization off."""
        return cls(**dict.fromkeys(cls.model_fields, False))


MANY_MASKS = 8
"""Objects of a batch from which on `many_masks` computes the decoder again. For B+ at 1024 px that saves 9 to 14 MB an
object and prediction (counted)."""


@dataclass(frozen=True)
class RecomputePolicy:
    """Which activations the backward pass computes again instead of keeping them. Exact: the same numbers for more
    arithmetic."""

    many_masks: bool = False
    """Prompt encoder and mask decoder where batches may have MANY_MASKS objects or more: fewer keep little, and to
    compute them again takes as many launches as for many. Settings decide, not the batch at hand: ranks must agree."""
    decoder: bool = False
    """Prompt encoder and mask decoder, whatever the number of objects."""
    trunk: bool = False
    """Blocks of the image encoder."""
    memory: bool = False
    """Layers of memory attention, and the memory encoder."""
    selective: bool = False
    """The outputs of matrix products, convolutions and attention are kept even so: less memory saved, little computed
    again."""

    @classmethod
    def parse(cls, text: str) -> RecomputePolicy:
        """Read "none" or parts joined by "+", for instance "decoder+trunk".

        Raises:
            ValueError: an unknown part, one that is named twice, or "selective" alone.
        """
        if text == "none":
            return cls()
        names, parts = [part.name for part in fields(cls)], text.split("+")
        if set(parts) - set(names) or len(set(parts)) < len(parts) or parts == ["selective"]:
            raise ValueError(
                f"unknown recompute policy {text!r}: write none, auto, auto:GIB, or parts joined by +, of "
                f"{', '.join(names)} (the last beside others), for instance decoder+trunk"
            )
        return cls(**dict.fromkeys(parts, True))

    def recomputes_decoder(self, objects: int) -> bool:
        """Whether the decoder is computed again where batches have up to so many objects."""
        return self.decoder or (self.many_masks and objects >= MANY_MASKS)

    def __str__(self) -> str:
        return "+".join(part.name for part in fields(self) if getattr(self, part.name)) or "none"


RECOMPUTE_LADDER = ("none", "many_masks", "decoder+trunk+selective", "decoder+trunk", "decoder+trunk+memory")
"""From the least to the most that is computed again: `auto` takes the first that fits."""


def recompute_ladder(objects: int) -> list[str]:
    """RECOMPUTE_LADDER without the policy that changes nothing for batches of up to so many objects."""
    return [policy for policy in RECOMPUTE_LADDER if policy != "many_masks" or objects >= MANY_MASKS]


def automatic_budget(text: str) -> float | None:
    """GiB of "auto:GIB", 0 for "auto" (whatever is free), None for a policy that is no automatic one.

    Raises:
        ValueError: a budget that is no positive number.
    """
    if text == "auto":
        return 0.0
    if not text.startswith("auto:"):
        return None
    try:
        budget = float(text.removeprefix("auto:"))
    except ValueError:
        budget = 0.0
    if not 0 < budget < float("inf"):
        raise ValueError(f"recompute {text!r}: write a positive number of GiB, for instance auto:40")
    return budget
