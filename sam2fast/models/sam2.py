"""SAM 2 for one frame: encode images, condition on memory, predict masks, encode memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

from sam2fast_kernels.upsample import upsample

from ..performance import PerformanceConfig, RecomputePolicy
from .architecture import Architecture
from .encoder import ImageEncoder
from .layers import MLP, Learned, compute_dtype
from .mask_decoder import NUM_MASKS, MaskDecoder, stable_mask
from .memory_attention import MemoryAttention
from .memory_bank import FrameMemory, select_memories
from .memory_encoder import MemoryEncoder
from .position import TableCache, sine_encoding_1d, sine_encoding_2d
from .prompt_encoder import PromptEncoder
from .prompts import Points, is_ambiguous

if TYPE_CHECKING:
    from ..data.sample import Batch
    from .plan import RolloutPlan
    from .rollout import RolloutOutput

ABSENT_LOGIT = -1024.0
"""Every mask logit of an object that the object score calls absent."""
COMPILED_VARIANTS = 64
"""Forms of one function that are compiled before it runs uncompiled: blocks differ by stage and window."""
STRIDE = 16
"""Pixels per cell of the features that prompts and memories meet on."""
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, for values in 0..1."""


@dataclass
class ImageFeatures:
    """Features of images or, after `select`, of objects. One row serves any number of objects of one image."""

    top: Tensor
    """[B, 256, S/16, S/16]"""
    high_res: tuple[Tensor, Tensor]
    """[B, 32, S/4, S/4] and [B, 64, S/8, S/8], as the mask decoder adds them."""

    def row(self, index: int) -> ImageFeatures:
        """Features of one image, for any number of objects in it."""
        fine, middle = self.high_res
        return ImageFeatures(self.top[index, None], (fine[index, None], middle[index, None]))

    def select(self, index: Tensor) -> ImageFeatures:
        """Features of the images `index` (int64 [N])."""
        return ImageFeatures(self.top[index], (self.high_res[0][index], self.high_res[1][index]))


@dataclass
class MaskOutput:
    """One run of the heads for N objects with M candidate masks each."""

    low_res: Tensor
    """Logits of all candidates [N, M, S/4, S/4], float32; -1024 where the object score says absent."""
    ious: Tensor
    """Predicted IoU [N, M]."""
    object_score: Tensor
    """Logits of presence [N, 1]."""
    best: Tensor
    """Logits of the candidate of highest predicted IoU [N, 1, S/4, S/4]."""
    pointer: Tensor
    """Object pointer [N, 256]."""
    full_res: Tensor | None = None
    """Mask taken as output: its logits (+-10) at input resolution [N, 1, S, S]."""


class SAM2(nn.Module):
    """Segment Anything Model 2 and 2.1 (arXiv 2408.00714).

    Inputs may have any size of which both sides are multiples of 32; S x S stands for it below. Parameters carry the
    official names but for the differences that official.py lists.
    """

    def __init__(
        self,
        arch: Architecture,
        recompute: str = "none",
        performance: PerformanceConfig | None = None,
        offload_activations: bool = False,
        bfloat16_streams: bool = False,
    ) -> None:
        """Build the model with random weights.

        Args:
            recompute: what the backward pass of `rollout` computes again, see `RecomputePolicy.parse`.
            performance: the optimizations that are on; None takes the defaults.
            offload_activations: what the image encoder keeps for the backward pass waits in memory of the host.
            bfloat16_streams: under bfloat16 autocast, round the residual streams of the trunk, of memory attention and
                of the mask decoder's image to bfloat16. Not exact.
        """
        super().__init__()
        dim, memory_dim = arch.hidden_dim, arch.memory_dim
        self.arch = arch
        self.recompute = RecomputePolicy.parse(recompute)
        self.offload_activations = offload_activations
        self.bfloat16_streams = bfloat16_streams
        self.performance = performance or PerformanceConfig()
        self._tables = TableCache()

        # In the order of the official state dict, where these five are bare parameters.
        self.maskmem_tpos_enc = Learned(arch.num_memories, 1, 1, memory_dim, std=0.02)
        self.no_mem_embed = Learned(1, 1, dim, std=0.02)
        self.no_mem_pos_enc = Learned(1, 1, dim, std=0.02)  # in every official checkpoint, but nothing reads it
        self.no_obj_ptr = Learned(1, dim, std=0.02)
        if arch.no_object_embed_spatial:
            self.no_obj_embed_spatial = Learned(1, memory_dim, std=0.02)
        self.image_encoder = ImageEncoder(arch, self.performance)
        self.mask_downsample = nn.Conv2d(1, 1, kernel_size=4, stride=4)
        self.memory_attention = MemoryAttention(
            dim, memory_dim, arch.memory_layers, arch.memory_dropout, self.performance
        )
        self.memory_encoder = MemoryEncoder(dim, memory_dim, self.performance)
        self.sam_prompt_encoder = PromptEncoder(dim, performance=self.performance)
        self.sam_mask_decoder = MaskDecoder(dim, self.performance)
        self.obj_ptr_proj = MLP(dim, dim, dim, num_layers=3)
        if arch.pointer_time_encoding:
            self.obj_ptr_tpos_proj = nn.Linear(dim, memory_dim)

    def forward(self, batch: Batch, plan: RolloutPlan) -> RolloutOutput:
        """Play the simulated user of `plan` over the clips of `batch` (see rollout.py)."""
        from .rollout import rollout

        return rollout(self, batch, plan)

    def compile_regions(self, backend: str = "inductor") -> None:
        """Compile what repeats and costs most, each part at its first call; call it before training, once.

        A block of the trunk is compiled for every shape that it sees. Layers of memory attention and the memory encoder
        take any number of memories and objects without another compilation, after the second number that they see.
        """
        # All blocks share one function, and every block that differs in shape counts as a recompilation of it.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_VARIANTS)
        self.fix_sizes()
        for block in self.image_encoder.trunk.blocks:
            block.compile(backend=backend, dynamic=False)
        for region in (*self.memory_attention.layers, self.memory_encoder):
            region.compile(backend=backend)

    def fix_sizes(self) -> None:
        """From now on the sizes of a training step follow from the shapes of its batch and its plan alone."""
        self.image_encoder.trunk.fixed_sizes = True

    def blocks_run_once(self) -> list[nn.Module]:
        """Modules that run once in a training step, in the order of their calls, each the only reader of its weights:
        an engine may gather these for the call alone. All else runs once for every frame or click."""
        return list(self.image_encoder.trunk.blocks)

    def constant_tables(self) -> list[Tensor]:
        """Tensors that steps read beside inputs, parameters and buffers."""
        caches = (part for module in self.modules() for part in vars(module).values() if isinstance(part, TableCache))
        return [table for cache in caches for table in cache.tensors()]

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters, whatever autocast does."""
        return self.no_obj_ptr.weight.dtype

    def wants_candidates(self, points: Points | None, initial: bool) -> bool:
        """Whether a frame with these points (initially prompted or tracked) gets three candidate masks rather than
        one."""
        return is_ambiguous(points) and (initial or self.arch.multimask_tracking)

    def normalize(self, frames: Tensor) -> Tensor:
        """uint8 frames [..., 3, H, W] to float32, normalized; floats are taken as normalized already."""
        if frames.is_floating_point():
            return frames

        def build() -> tuple[Tensor, Tensor]:
            mean, std = torch.tensor([PIXEL_MEAN, PIXEL_STD], device=frames.device).view(2, 3, 1, 1)
            return 1 / (255 * std), -mean / std

        scale, shift = self._tables.get(("pixel", frames.device), build)
        return frames * scale + shift

    def encode_images(self, frames: Tensor) -> ImageFeatures:
        """Encode frames [B, 3, S, S], uint8 or normalized."""
        dtype, projections = self.dtype, (self.sam_mask_decoder.conv_s0, self.sam_mask_decoder.conv_s1)
        folded = projections if self.performance.folded_projections else ()
        rounds = self.bfloat16_streams and compute_dtype(frames) == torch.bfloat16
        trunk, stream = self.image_encoder.trunk, torch.bfloat16 if rounds else dtype
        trunk.recompute, trunk.stream_dtype = self.recompute, torch.bfloat16 if rounds else None
        with save_on_cpu(pin_memory=frames.is_cuda) if self.offload_activations else nullcontext():
            fine, middle, top = self.image_encoder(self.normalize(frames).to(dtype), folded)
        if not folded:
            fine, middle = projections[0](fine), projections[1](middle)
        return ImageFeatures(top.to(stream), (fine, middle))

    def condition_on_memory(
        self,
        top: Tensor,
        memories: Sequence[FrameMemory],
        frame: int,
        num_frames: int,
        reverse: bool = False,
        initial: bool = False,
        index: Tensor | None = None,
    ) -> Tensor:
        """Condition the features of `frame` on the memory bank: [N, 256, h, w], or one row where equal for all.

        `top` has the features [N, 256, h, w] of objects; with `index` (int64 [N]) it has the features [B, 256, h, w] of
        images, and object n is in image index[n].

        Frames prompted at the start (`initial`), and frames without any memory, only get the no-memory embedding. See
        `select_memories` for which memories count; in training mode these include pointers from the future.
        """
        chosen = None if initial else select_memories(memories, frame, num_frames, self.arch, self.training, reverse)
        if chosen is None or not (chosen.spatial or chosen.pointers):
            shared = index is None or (len(top) == 1 and self.performance.shared_image_features)
            top = top if shared else top[index]
            return top + self.no_mem_embed().view(1, -1, 1, 1).to(top.dtype)
        tokens, positions = self._spatial_tokens(chosen.spatial)
        num_pointer_tokens = 0
        if chosen.pointers:
            max_distance = max(1, min(num_frames, self.arch.max_pointers) - 1)
            pointers, pointer_positions = self._pointer_tokens(chosen.pointers, max_distance)
            num_pointer_tokens = pointers.shape[1]
            tokens, positions = [*tokens, pointers], [*positions, pointer_positions]
        memory, position = torch.cat(tokens, dim=1), torch.cat(positions, dim=1)
        return self.memory_attention(top, memory, position, num_pointer_tokens, index, self.recompute)

    def _spatial_tokens(self, chosen: Sequence[tuple[FrameMemory, int]]) -> tuple[list[Tensor], list[Tensor]]:
        """Tokens [N, hw, 64] and their encodings in space and time [1, hw, 64], of every memory."""
        if not chosen:
            return [], []
        (height, width), device = chosen[0][0].spatial.shape[-2:], chosen[0][0].spatial.device

        def build() -> tuple[Tensor]:
            return (sine_encoding_2d(self.arch.memory_dim, height, width, device).flatten(1).T.unsqueeze(0),)

        (position,) = self._tables.get(("memory", height, width, device), build)
        position, times = position.to(self.dtype), self.maskmem_tpos_enc()
        tokens = [memory.spatial.flatten(2).transpose(1, 2) for memory, _ in chosen]
        return tokens, [position + times[row] for _, row in chosen]

    def _pointer_tokens(self, chosen: Sequence[tuple[FrameMemory, int]], max_distance: int) -> tuple[Tensor, Tensor]:
        """Every pointer as 256 / 64 = 4 tokens [N, 4 K, 64], and their encoding in time [1, 4 K, 64]."""
        pointers = torch.stack([memory.pointer for memory, _ in chosen], dim=1)  # [N, K, 256]
        tokens = pointers.reshape(len(pointers), -1, self.arch.memory_dim)
        if not self.arch.pointer_time_encoding:
            return tokens, tokens.new_zeros(1, tokens.shape[1], tokens.shape[2])
        distances = tuple(distance for _, distance in chosen)

        def build() -> tuple[Tensor]:
            relative = torch.tensor(distances, device=pointers.device) / max_distance
            return (sine_encoding_1d(relative, self.arch.hidden_dim),)

        (encoding,) = self._tables.get(("pointer", distances, max_distance, pointers.device), build)
        positions = self.obj_ptr_tpos_proj(encoding.to(self.dtype))  # [K, 64]
        return tokens, positions.repeat_interleave(tokens.shape[1] // len(chosen), dim=0).unsqueeze(0)

    def _decode(
        self,
        image: Tensor,
        points: tuple[Tensor, Tensor] | None,
        mask_prompt: Tensor | None,
        high_res: tuple[Tensor, Tensor] | None,
        candidates: slice,
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        grid = (image.shape[-2], image.shape[-1])
        objects = len(image)
        if points is not None:
            objects = len(points[0])
        elif mask_prompt is not None:
            objects = len(mask_prompt)
        mask_prompt = None if mask_prompt is None else mask_prompt.to(image.dtype)
        sparse, dense = self.sam_prompt_encoder(points, mask_prompt, objects, grid)
        position = self.sam_prompt_encoder.grid_encoding(grid).to(image.dtype)
        return self.sam_mask_decoder(image, position, sparse, dense, high_res, candidates)

    def _pointer(self, token: Tensor, present: Tensor) -> Tensor:
        """Pointer [N, 256] of the output token [N, 256], the learned "no object" where `present` [N, 1] is false."""
        return self._or_absent(self.obj_ptr_proj(token), present)

    def _or_absent(self, pointer: Tensor, present: Tensor) -> Tensor:
        present = present.to(self.dtype)
        return present * pointer + (1 - present) * self.no_obj_ptr()

    def predict_masks(
        self,
        conditioned: Tensor,
        high_res: tuple[Tensor, Tensor],
        points: tuple[Tensor, Tensor] | None,
        mask_prompt: Tensor | None,
        multimask: bool,
        stable: bool = False,
    ) -> MaskOutput:
        """Run the heads for N objects, as many as there are prompts.

        Args:
            conditioned: features [N, 256, h, w] of `condition_on_memory`, one row where equal for all objects.
            high_res: `ImageFeatures.high_res` of the same objects, or one row for all.
            points: pixels [N, P, 2] (x, y) of the S x S input and labels [N, P]: 1 positive, 0 negative, 2 and
                3 corners of a box, -1 padding. None where the object is tracked without a prompt.
            mask_prompt: mask logits [N, 1, S/4, S/4], for example those of the previous click.
            multimask: three candidates (the rule of SAM 2: at most one point), else one mask.
            stable: inference rule of the official predictors for one mask, see `stable_mask`.
        """
        candidates = slice(1, NUM_MASKS) if multimask else slice(NUM_MASKS if stable else 1)
        masks, ious, tokens, object_score = self._decode(conditioned, points, mask_prompt, high_res, candidates)
        present = object_score > 0
        ious, tokens = ious[:, candidates], tokens[:, candidates]
        if stable and not multimask:
            masks, ious = stable_mask(masks, ious)
        low_res = torch.where(present[..., None, None], masks, ABSENT_LOGIT).float()
        best, token = low_res, tokens[:, 0]
        if multimask:
            objects, index = torch.arange(len(ious), device=ious.device), ious.argmax(dim=1)
            best, token = low_res[objects, index].unsqueeze(1), tokens[objects, index]
        return MaskOutput(low_res, ious, object_score, best, self._pointer(token, present))

    def mask_as_output(self, features: ImageFeatures, masks: Tensor) -> MaskOutput:
        """Take the masks [N, 1, S, S] that the user drew as the prediction; an empty one says absent.

        The heads only run to make an object pointer, on features without the no-memory embedding.
        """
        drawn = masks.to(features.top.dtype)
        full_res = masks.float() * 20 - 10
        size = (full_res.shape[-2] // 4, full_res.shape[-1] // 4)
        low_res = F.interpolate(full_res, size=size, mode="bilinear", align_corners=False, antialias=True)
        _, _, tokens, score = self._decode(features.top, None, self.mask_downsample(drawn), None, slice(1))
        present = masks.flatten(1).any(dim=1, keepdim=True)
        pointer = self._or_absent(self._pointer(tokens[:, 0], score > 0), present)
        ious = low_res.new_ones(len(masks), 1)
        return MaskOutput(low_res, ious, present.float() * 20 - 10, low_res, pointer, full_res)

    def encode_memory(self, top: Tensor, mask_logits: Tensor, object_score: Tensor, binarize: bool = False) -> Tensor:
        """Memory [N, 64, h, w] of a frame with features [N, 256, h, w] (not conditioned on memory).

        Args:
            mask_logits: [N, 1, S/4, S/4] or [N, 1, S, S].
            object_score: logits [N, 1]; absent objects get a learned embedding (SAM 2.1).
            binarize: threshold the mask instead of its sigmoid (official predictor, on frames with clicks).
        """
        size = (STRIDE * top.shape[-2], STRIDE * top.shape[-1])
        factor = size[0] // mask_logits.shape[-2]
        if (factor * mask_logits.shape[-2], factor * mask_logits.shape[-1]) != size:
            raise ValueError(
                f"mask logits of {list(mask_logits.shape[-2:])} pixels do not fit images of {list(size)}: both sides "
                "must be the same whole fraction of the image"
            )
        mask = upsample(
            mask_logits,
            factor,
            activation="binary" if binarize else "sigmoid",
            scale=self.arch.mask_scale,
            bias=self.arch.mask_bias,
            dtype=compute_dtype(top),  # in another, autocast would cast the mask at full resolution
        )
        memory = self.memory_encoder(top, mask)
        if self.arch.no_object_embed_spatial:
            absent = (object_score <= 0).to(self.dtype) * self.no_obj_embed_spatial()  # [N, 64]
            memory = memory + absent[..., None, None].to(memory.dtype)
        return memory
