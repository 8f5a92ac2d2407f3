"""What an optimizer needs to know of SAM 2: which parameters train, in which groups, and at which rate in each step."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from .config import ConfigError, OptimConfig
from .models.official import component_of, official_name, parameter_layers

PARTS = ("encoder", "prompt_encoder", "mask_decoder", "memory")
"""Parts of the model that can be frozen by name."""


def freeze(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Train every parameter of `model` except those that `patterns` select; returns the official names of the latter.

    Args:
        patterns: parts (encoder, prompt_encoder, mask_decoder, memory) or glob patterns of official parameter names.

    Raises:
        ConfigError: a pattern selects nothing, or nothing is left to train.
    """
    named = {official_name(name): parameter for name, parameter in model.named_parameters()}
    frozen: set[str] = set()
    for pattern in patterns:
        if pattern in PARTS:
            selected = {name for name in named if component_of(name) == pattern}
        else:
            selected = {name for name in named if fnmatchcase(name, pattern)}
        if not selected:
            closest = difflib.get_close_matches(pattern, _known_patterns(named), n=1, cutoff=0)[0]
            raise ConfigError(
                f"freeze: {pattern!r} is neither a part ({', '.join(PARTS)}) nor a pattern of any parameter name; "
                f"did you mean {closest!r}?"
            )
        frozen |= selected
    if len(frozen) == len(named):
        raise ConfigError(f"freeze: {list(patterns)} leaves no parameter to train; take a part or pattern out")
    for name, parameter in named.items():
        parameter.requires_grad_(name not in frozen)
    return [name for name in named if name in frozen]


def build_groups(model: nn.Module, optim: OptimConfig) -> list[dict]:
    """AdamW's parameter groups over the trained parameters of a SAM 2 model.

    As in the official fine-tuning configuration: no weight decay on biases and `nn.LayerNorm`; the image encoder has
    a rate of its own; in its trunk the rate shrinks by `layer_decay` per layer from the last to the first, except for
    the position embeddings.

    Returns:
        Groups with `params`, their official `names`, `label`, `lr`, `base_lr` (the rate that a schedule scales) and
        `weight_decay`.
    """
    norms, layers = _layer_norm_parameters(model), parameter_layers(model)
    top = max(layers.values())
    groups: dict[tuple[str, float], dict] = {}
    for own_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = official_name(own_name)
        label, rate = _label_and_rate(name, optim, layers[name], top)
        weight_decay = 0.0 if "bias" in name or name in norms else optim.weight_decay
        new = dict(params=[], names=[], label=label, lr=rate, base_lr=rate, weight_decay=weight_decay)
        group = groups.setdefault((label, weight_decay), new)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of a step as a share of every group's base rate; a function of its arguments alone.

    All schedules rise linearly from 0 over the first `warmup` steps. Then `cosine` falls to `final_scale` at
    `total_steps`; `inverse_sqrt` falls as 1 / sqrt(1 + s / timescale), s the steps since the warm-up, and linearly to 0
    over the last `cooldown` steps (arXiv 2106.04560; SAM 2 is pre-trained with it).

    Args:
        step: updates done before this one.
    """
    warmup = min(1.0, step / optim.warmup) if optim.warmup else 1.0
    since = max(0, step - optim.warmup)
    if optim.schedule == "cosine":
        progress = min(1.0, since / max(1, total_steps - optim.warmup))
        return warmup * (optim.final_scale + (1 - optim.final_scale) * (1 + math.cos(math.pi * progress)) / 2)
    if optim.schedule == "inverse_sqrt":
        cooldown = min(1.0, (total_steps - step) / optim.cooldown) if optim.cooldown else 1.0
        return warmup * cooldown / math.sqrt(1 + since / optim.timescale)
    return warmup


def _layer_norm_parameters(model: nn.Module) -> set[str]:
    """Official names of the parameters of `nn.LayerNorm` modules."""
    return {
        official_name(f"{prefix}.{name}")
        for prefix, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters(recurse=False)
    }


def _label_and_rate(name: str, optim: OptimConfig, layer: int, top: int) -> tuple[str, float]:
    """Label of a parameter's group and its base rate."""
    if not name.startswith("image_encoder."):
        return "base", optim.lr
    rate = optim.encoder_lr or optim.lr
    if optim.layer_decay == 1 or layer == top:
        return "encoder", rate
    if "pos_embed" in name:
        return "encoder.pos_embed", rate
    return f"encoder.layer_{layer:02}", rate * optim.layer_decay ** (top - layer)


def _known_patterns(names: Iterable[str]) -> list[str]:
    """What a user may have meant: parts, whole modules as `module.*`, and single parameters."""
    names = list(names)
    prefixes = {name.rsplit(".", i)[0] + ".*" for name in names for i in range(1, name.count(".") + 1)}
    return [*PARTS, *sorted(prefixes), *names]
