"""Mask decoder: a two-way transformer between prompt tokens and image features (SAM, arXiv 2304.02643, appendix A)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..performance import PerformanceConfig
from .image_attention import attend_to_image, attend_to_tokens
from .layers import MLP, Attention, Conv2d, ConvTranspose2d, LayerNorm, LayerNorm2d, Learned
from .upscaling import upscaled_masks

NUM_MASKS = 4
"""The mask for unambiguous prompts, and three candidates for ambiguous ones."""


class ImageAttention(Attention):
    """Attention between tokens and the image, which can do without projecting the image (see image_attention.py)."""

    def from_tokens(self, tokens: Tensor, image: Tensor, position: Tensor) -> Tensor:
        """What `forward(tokens, image + position, image)` gives, for tokens [N, L, dim] and an image [N or 1, hw, dim]
        with position [1, hw, dim]."""
        (key_weight, key_bias), (value_weight, value_bias) = self.k_proj(), self.v_proj()
        queries = self._absorb(self._heads(self.q_proj(tokens)), key_weight) * self._scale
        sums = attend_to_image(queries.flatten(1, 2), image, position).unflatten(1, (self.num_heads, -1))
        value_weight = value_weight.unflatten(0, (self.num_heads, -1))
        values = torch.einsum("nhlc,hdc->nlhd", sums, value_weight).flatten(2)
        # Alike in all scores of a token, the bias of the keys changes nothing: its gradient is zero, but not missing.
        return self.out_proj(values + (value_bias + 0 * key_bias))

    def from_image(self, image: Tensor, position: Tensor, places: Tensor, tokens: Tensor, norm: LayerNorm) -> Tensor:
        """What `norm(image + self(image + position, places, tokens))` gives, for an image [N or 1, hw, dim] with
        position [1, hw, dim] and tokens [N, L, dim], with and without their places."""
        (query_weight, query_bias), (weight, bias) = self.q_proj(), self.out_proj()
        keys = self._heads(self.k_proj(places)) * self._scale
        offsets = torch.einsum("nhld,hd->nhl", keys, query_bias.unflatten(0, (self.num_heads, -1)))
        values = self._absorb(self._heads(self.v_proj(tokens)), weight.T)
        values = values + bias / self.num_heads  # attention weights of each head sum to 1
        keys = self._absorb(keys, query_weight)
        tokens = (keys.flatten(1, 2), offsets.flatten(1), values.flatten(1, 2))
        return attend_to_tokens(image, position, *tokens, (*norm(), norm.eps), self.num_heads)

    def _absorb(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """Tokens [N, heads, L, d] times the weight [heads d, C] of each head: [N, heads, L, C]."""
        return torch.einsum("nhld,hdc->nhlc", tokens, weight.unflatten(0, (self.num_heads, -1)))

    @property
    def _scale(self) -> float:
        return (self.q_proj.out_features // self.num_heads) ** -0.5


class TwoWayBlock(nn.Module):
    """Learned attend to themselves and to the image, pass an MLP, and the image attends to the tokens."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, first: bool, absorb: bool = True) -> None:
        super().__init__()
        self.first = first
        self.absorb = absorb
        self.self_attn = Attention(dim, num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn_token_to_image = ImageAttention(dim, num_heads, inner_dim=dim // 2)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, hidden_dim, dim, num_layers=2)
        self.norm3 = nn.LayerNorm(dim)
        self.norm4 = LayerNorm(dim)
        self.cross_attn_image_to_token = ImageAttention(dim, num_heads, inner_dim=dim // 2)

    def forward(self, tokens: Tensor, image: Tensor, prompt: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """tokens, prompt [N, L, dim]; image [N or 1, hw, dim], position [1, hw, dim]. `prompt`, the tokens before the
        first block, is the tokens' position encoding."""
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            placed = tokens + prompt
            tokens = tokens + self.self_attn(placed, placed, tokens)
        tokens = self.norm1(tokens)
        if self.absorb:
            attended = self.cross_attn_token_to_image.from_tokens(tokens + prompt, image, position)
            tokens = self.norm2(tokens + attended)
            tokens = self.norm3(tokens + self.mlp(tokens))
            return tokens, self.cross_attn_image_to_token.from_image(
                image, position, tokens + prompt, tokens, self.norm4
            )
        placed_image = image + position
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + prompt, placed_image, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.cross_attn_image_to_token(placed_image, tokens + prompt, tokens))
        return tokens, image


class TwoWayTransformer(nn.Module):
    """Two-way blocks and a last attention of the tokens to the image."""

    def __init__(
        self, dim: int, num_heads: int = 8, hidden_dim: int = 2048, num_layers: int = 2, absorb: bool = True
    ) -> None:
        super().__init__()
        self.absorb = absorb
        self.layers = nn.ModuleList(
            TwoWayBlock(dim, num_heads, hidden_dim, index == 0, absorb) for index in range(num_layers)
        )
        self.final_attn_token_to_image = ImageAttention(dim, num_heads, inner_dim=dim // 2)
        self.norm_final_attn = nn.LayerNorm(dim)

    def forward(self, prompt: Tensor, image: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        tokens = prompt
        for layer in self.layers:
            tokens, image = layer(tokens, image, prompt, position)
        if self.absorb:
            attended = self.final_attn_token_to_image.from_tokens(tokens + prompt, image, position)
        else:
            attended = self.final_attn_token_to_image(tokens + prompt, image + position, image)
        return self.norm_final_attn(tokens + attended), image


class MaskDecoder(nn.Module):
    """Predicts mask logits at stride 4, their IoU, and whether the object is present."""

    def __init__(self, dim: int, performance: PerformanceConfig | None = None) -> None:
        super().__init__()
        performance = performance or PerformanceConfig()
        self.fused_upscaling = performance.fused_upscaling
        self.transformer = TwoWayTransformer(dim, absorb=performance.absorbed_projections)
        self.iou_token = Learned(1, dim)
        self.mask_tokens = Learned(NUM_MASKS, dim)
        self.obj_score_token = Learned(1, dim)
        self.output_upscaling = nn.Sequential(
            ConvTranspose2d(dim, dim // 4, kernel_size=2, stride=2),
            LayerNorm2d(dim // 4),
            nn.GELU(),
            ConvTranspose2d(dim // 4, dim // 8, kernel_size=2, stride=2),
            nn.GELU(),
        )
        # Applied to the image features once per image, by the caller.
        self.conv_s0 = Conv2d(dim, dim // 8, kernel_size=1)
        self.conv_s1 = Conv2d(dim, dim // 4, kernel_size=1)
        self.output_hypernetworks_mlps = nn.ModuleList(MLP(dim, dim, dim // 8, num_layers=3) for _ in range(NUM_MASKS))
        self.iou_prediction_head = MLP(dim, 256, NUM_MASKS, num_layers=3)
        self.pred_obj_score_head = MLP(dim, dim, 1, num_layers=3)

    def _run_transformer(
        self, image: Tensor, position: Tensor, sparse: Tensor, dense: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Outputs for the object score [N, dim], the IoUs [N, dim], the masks [N, 4, dim], the image [N, h, w, dim]."""
        outputs = torch.cat([self.obj_score_token(), self.iou_token(), self.mask_tokens()])  # [6, dim]
        prompt = torch.cat([outputs.expand(len(sparse), -1, -1), sparse], dim=1)
        tokens, features = self.transformer(
            prompt, (image + dense.to(image.dtype)).flatten(2).transpose(1, 2), position.flatten(2).transpose(1, 2)
        )
        features = features.unflatten(1, image.shape[-2:])
        return tokens[:, 0], tokens[:, 1], tokens[:, 2 : 2 + NUM_MASKS], features

    def _upscale(self, features: Tensor, high_res: tuple[Tensor, Tensor]) -> Tensor:
        """Features [N, h, w, dim] at stride 16 to [N, dim/8, 4h, 4w], with the encoder's features of strides 4 and 8
        added on the way."""
        up1, norm, act1, up2, act2 = self.output_upscaling
        features = act1(norm(up1(features.permute(0, 3, 1, 2)) + high_res[1]))
        return act2(up2(features) + high_res[0])

    def _masks(self, features: Tensor, high_res: tuple[Tensor, Tensor], tokens: Tensor, candidates: slice) -> Tensor:
        """Logits [N, K, 4h, 4w]: products of upscaled features [N, h, w, dim] and weights made of the mask tokens."""
        weights = [mlp(token) for mlp, token in zip(self.output_hypernetworks_mlps, tokens.unbind(1), strict=True)]
        hyper = torch.stack(weights, dim=1)
        if self.fused_upscaling:
            up1, norm, _, up2, _ = self.output_upscaling
            return upscaled_masks(features, high_res, hyper[:, candidates], up1(), (*norm(), norm.eps), up2())
        upscaled = self._upscale(features, high_res)
        return (hyper @ upscaled.flatten(2)).unflatten(-1, upscaled.shape[-2:])[:, candidates]

    def forward(
        self,
        image: Tensor,
        position: Tensor,
        sparse: Tensor,
        dense: Tensor,
        high_res: tuple[Tensor, Tensor] | None,
        candidates: slice = slice(NUM_MASKS),
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """Decode N objects. Arguments with one row instead of N are equal for all of them.

        Args:
            image: features [N or 1, dim, h, w], conditioned on memory; position: their encoding [1, dim, h, w].
            sparse: prompt tokens [N, P, dim]; dense: mask prompt [N or 1, dim, h, w].
            high_res: features [N or 1, dim/8, 4h, 4w] and [N or 1, dim/4, 2h, 2w]; None where the masks are not wanted.
            candidates: which K of the four masks are wanted.

        Returns:
            mask logits [N, K, 4h, 4w]; of all four masks: predicted IoUs [N, 4], tokens [N, 4, dim]; object score
            [N, 1].
        """
        score_token, iou_token, mask_tokens, features = self._run_transformer(image, position, sparse, dense)
        masks = None if high_res is None else self._masks(features, high_res, mask_tokens, candidates)
        return masks, self.iou_prediction_head(iou_token).sigmoid(), mask_tokens, self.pred_obj_score_head(score_token)


def stable_mask(masks: Tensor, ious: Tensor, delta: float = 0.05, threshold: float = 0.98) -> tuple[Tensor, Tensor]:
    """Inference rule for one mask of all four [N, 4, h, w], [N, 4]: the first one, or the best of the other three where
    the first is unstable, that is where the IoU of its areas over +delta and over -delta is under `threshold`.

    Returns logits [N, 1, h, w] and IoU [N, 1]. SAM 2's official predictors use it.
    """
    best = ious[:, 1:].argmax(dim=1) + 1
    objects = torch.arange(len(best), device=best.device)
    first = masks[:, 0].flatten(1)
    inner, outer = (first > delta).sum(1), (first > -delta).sum(1)
    stable = (outer == 0) | (inner / outer.clamp(min=1) >= threshold)
    index = torch.where(stable, 0, best)
    return masks[objects, index].unsqueeze(1), ious[objects, index].unsqueeze(1)
