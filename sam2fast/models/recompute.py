"""Parts of the forward pass whose activations the backward pass computes again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_KEPT_NAMES = ("mm", "addmm", "bmm", "baddbmm", "convolution", "memory_attention", "linear")


def recomputed(function: Callable, selective: bool = False, random: bool = True) -> Callable:
    """`function` whose activations are computed again in the backward pass; itself where no gradient is wanted.

    Args:
        selective: results of matrix products, convolutions and attention are kept even so.
        random: it draws random numbers, which have to be the same again.
    """
    if not torch.is_grad_enabled():
        return function
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": random}
    if selective:
        function = partial(_without_cast_cache, function)
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    return partial(checkpoint, function, **options)


def _without_cast_cache(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """`function` with autocast that casts a weight at every use. Results are found by counting operators, which must be
    the same in both passes; a cast that the cache spares one of them alone would shift the count."""
    for device in ("cuda", "cpu"):
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False):
                return function(*args, **kwargs)
    return function(*args, **kwargs)


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.overloadpacket.__name__
    # What an operator writes into is not kept: others write there too.
    kept = (name in _KEPT_NAMES or "scaled_dot_product" in name) and not operator._schema.is_mutable
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
