"""Ground truth of the fused mask loss: upsample everything, then sum elementwise terms. Any dtype, any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks import unpack_masks


def upsample(logits: Tensor, height: int) -> Tensor:
    """Bilinear (align_corners=False) from [N, M, h, w] to [N, M, H, W], H = `height`, at least in float32."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    size = (height, height // logits.shape[-2] * logits.shape[-1])
    # One channel: interpolate refuses M = 0, and rounds otherwise for channels that come last.
    planes = logits.flatten(0, 1).unsqueeze(1).contiguous()
    return F.interpolate(planes, size=size, mode="bilinear", align_corners=False).view(*logits.shape[:2], *size)


def focal_elements(logits: Tensor, targets: Tensor, gamma: float, alpha: float) -> Tensor:
    """Focal loss of each element (arXiv 1708.02002, eq. 5); `targets` bool, `alpha` below 0 turns the balance off.

    With z the logit of the true class it is -log sigmoid(z) * sigmoid(-z)^gamma. The power is the exponential of a
    logarithm, whose gradient is finite where sigmoid(-z) has underflowed to 0, for every gamma.
    """
    true_class = torch.where(targets, logits, -logits)
    loss = -F.logsigmoid(true_class)
    if gamma > 0:
        loss = loss * torch.exp(gamma * F.logsigmoid(-true_class))
    return torch.where(targets, alpha * loss, (1 - alpha) * loss) if alpha >= 0 else loss


def mask_sums(logits: Tensor, targets: Tensor, packed: bool, gamma: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Sums over pixels, see `op.mask_loss` for the arguments.

    Returns:
        float [N, M, 3]: focal elements, probability p, p where the target is; int64 [N, M, 3]: pixels of the
        intersection of mask (logit above 0) and target, of the mask, of the target.
    """
    full, truth = _at_full_resolution(logits, targets, packed)
    p, mask = full.sigmoid(), full > 0
    terms = (focal_elements(full, truth, gamma, alpha), p, p * truth)
    counted = (mask & truth, mask, truth)
    sums = torch.stack([term.sum((-2, -1)) for term in terms], dim=-1)
    return sums, torch.stack([pixels.sum((-2, -1)) for pixels in counted], dim=-1)


def mask_sums_backward(
    grad_sums: Tensor, logits: Tensor, targets: Tensor, packed: bool, gamma: float, alpha: float
) -> Tensor:
    """Gradient of `logits`, in their dtype, from that of the float sums [N, M, 3].

    With z the logit of the true class and q = sigmoid(-z), the slope of a focal element in z is
    -q^gamma (q + gamma (1 - q) softplus(-z)), times the class weight; that of p in the logit is p (1 - p).
    """
    full, truth = _at_full_resolution(logits, targets, packed)
    focal, p, p_inside = grad_sums.to(full.dtype)[..., None, None].unbind(2)
    true_class = torch.where(truth, full, -full)
    q = torch.sigmoid(-true_class)
    slope = torch.exp(gamma * F.logsigmoid(-true_class)) if gamma > 0 else 1.0
    slope = slope * (q - gamma * torch.sigmoid(true_class) * F.logsigmoid(true_class))
    slope = torch.where(truth, -slope, slope)
    if alpha >= 0:
        slope = torch.where(truth, alpha * slope, (1 - alpha) * slope)
    gradient = focal * slope + (p + p_inside * truth) * q * torch.sigmoid(true_class)
    planes, (height, width) = gradient.flatten(0, 1).unsqueeze(1), logits.shape[-2:]
    transposed = torch.ops.aten.upsample_bilinear2d_backward(
        planes, planes.shape[-2:], [len(planes), 1, height, width], False
    )
    return transposed.view(logits.shape).to(logits.dtype)


def _at_full_resolution(logits: Tensor, targets: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    """Upsampled logits and targets as bool, [N, M, H, W]."""
    full = upsample(logits, targets.shape[1])
    truth = unpack_masks(targets, full.shape[-1]) if packed else targets != 0
    return full, truth.unsqueeze(1).expand(full.shape)
