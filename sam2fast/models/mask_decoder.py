"""Mask decoder: a two-way transformer between prompt tokens and image features (SAM, arXiv 2304.02643, appendix A)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layers import MLP, Attention, LayerNorm2d, Learned

NUM_MASKS = 4
"""The mask for unambiguous prompts, and three candidates for ambiguous ones."""


class TwoWayBlock(nn.Module):
    """Learned attend to themselves and to the image, pass an MLP, and the image attends to the tokens."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn = Attention(dim, num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn_token_to_image = Attention(dim, num_heads, inner_dim=dim // 2)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, hidden_dim, dim, num_layers=2)
        self.norm3 = nn.LayerNorm(dim)
        self.norm4 = nn.LayerNorm(dim)
        self.cross_attn_image_to_token = Attention(dim, num_heads, inner_dim=dim // 2)

    def forward(self, tokens: Tensor, image: Tensor, prompt: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """tokens, prompt [N, L, dim]; image [N, hw, dim], position [1, hw, dim]. `prompt`, the tokens before the first
        block, is the tokens' position encoding."""
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            placed = tokens + prompt
            tokens = tokens + self.self_attn(placed, placed, tokens)
        tokens = self.norm1(tokens)
        placed_image = image + position
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + prompt, placed_image, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.cross_attn_image_to_token(placed_image, tokens + prompt, tokens))
        return tokens, image


class TwoWayTransformer(nn.Module):
    """Two-way blocks and a last attention of the tokens to the image."""

    def __init__(self, dim: int, num_heads: int = 8, hidden_dim: int = 2048, num_layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TwoWayBlock(dim, num_heads, hidden_dim, first=index == 0) for index in range(num_layers)
        )
        self.final_attn_token_to_image = Attention(dim, num_heads, inner_dim=dim // 2)
        self.norm_final_attn = nn.LayerNorm(dim)

    def forward(self, prompt: Tensor, image: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        tokens = prompt
        for layer in self.layers:
            tokens, image = layer(tokens, image, prompt, position)
        attended = self.final_attn_token_to_image(tokens + prompt, image + position, image)
        return self.norm_final_attn(tokens + attended), image


class MaskDecoder(nn.Module):
    """Predicts mask logits at stride 4, their IoU, and whether the object is present."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.transformer = TwoWayTransformer(dim)
        self.iou_token = Learned(1, dim)
        self.mask_tokens = Learned(NUM_MASKS, dim)
        self.obj_score_token = Learned(1, dim)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 4, kernel_size=2, stride=2),
            LayerNorm2d(dim // 4),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 4, dim // 8, kernel_size=2, stride=2),
            nn.GELU(),
        )
        # Applied to the image features once per image, by the caller.
        self.conv_s0 = nn.Conv2d(dim, dim // 8, kernel_size=1)
        self.conv_s1 = nn.Conv2d(dim, dim // 4, kernel_size=1)
        self.output_hypernetworks_mlps = nn.ModuleList(MLP(dim, dim, dim // 8, num_layers=3) for _ in range(NUM_MASKS))
        self.iou_prediction_head = MLP(dim, 256, NUM_MASKS, num_layers=3)
        self.pred_obj_score_head = MLP(dim, dim, 1, num_layers=3)

    def _run_transformer(
        self, image: Tensor, position: Tensor, sparse: Tensor, dense: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Outputs for the object score [N, dim], the IoUs [N, dim], the masks [N, 4, dim], the image [N, dim, h, w]."""
        outputs = torch.cat([self.obj_score_token(), self.iou_token(), self.mask_tokens()])  # [6, dim]
        prompt = torch.cat([outputs.expand(len(sparse), -1, -1), sparse], dim=1)
        tokens, features = self.transformer(
            prompt, (image + dense).flatten(2).transpose(1, 2), position.flatten(2).transpose(1, 2)
        )
        features = features.transpose(1, 2).unflatten(-1, image.shape[-2:])
        return tokens[:, 0], tokens[:, 1], tokens[:, 2 : 2 + NUM_MASKS], features

    def _upscale(self, features: Tensor, high_res: tuple[Tensor, Tensor]) -> Tensor:
        """Features at stride 16 to stride 4, with the encoder's features of strides 4 and 8 added on the way."""
        up1, norm, act1, up2, act2 = self.output_upscaling
        features = act1(norm(up1(features) + high_res[1]))
        return act2(up2(features) + high_res[0])

    def _masks(self, tokens: Tensor, upscaled: Tensor) -> Tensor:
        """Logits [N, 4, H, W]: products of upscaled features [N, dim/8, H, W] and weights made of the mask tokens."""
        weights = [mlp(token) for mlp, token in zip(self.output_hypernetworks_mlps, tokens.unbind(1), strict=True)]
        return (torch.stack(weights, dim=1) @ upscaled.flatten(2)).unflatten(-1, upscaled.shape[-2:])

    def forward(
        self, image: Tensor, position: Tensor, sparse: Tensor, dense: Tensor, high_res: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """Decode N objects.

        Args:
            image: features [N, dim, h, w], conditioned on memory; position: their encoding [1, dim, h, w].
            sparse: prompt tokens [N, P, dim]; dense: mask prompt [N or 1, dim, h, w].
            high_res: features [N, dim/8, 4h, 4w] and [N, dim/4, 2h, 2w]; None where the masks are not wanted.

        Returns:
            of all four masks: logits [N, 4, 4h, 4w], predicted IoUs [N, 4], tokens [N, 4, dim]; object score [N, 1].
        """
        score_token, iou_token, mask_tokens, features = self._run_transformer(image, position, sparse, dense)
        masks = None if high_res is None else self._masks(mask_tokens, self._upscale(features, high_res))
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
