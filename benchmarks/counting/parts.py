"""Which part of the model an operation belongs to, in the forward pass, the backward pass and recomputation."""

from __future__ import annotations

import bisect
import fnmatch
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

PARTS: tuple[str, ...] = (
    "trunk",
    "neck",
    "memory self-attention",
    "memory cross-attention",
    "memory feed-forward",
    "memory encoder",
    "prompt encoder",
    "mask decoder",
    "loss",
    "click sampling",
    "other",
)
MODULES: dict[str, str] = {
    "image_encoder.trunk*": "trunk",
    "image_encoder*": "neck",
    "sam_mask_decoder.conv_s*": "neck",
    "sam_mask_decoder*": "mask decoder",
    "sam_prompt_encoder*": "prompt encoder",
    "memory_attention*.self_attn*": "memory self-attention",
    "memory_attention*.cross_attn*": "memory cross-attention",
    "memory_attention*": "memory feed-forward",
    "memory_encoder*": "memory encoder",
}
"""Modules of SAM2 by name; the first pattern that fits counts. The norms of memory attention are feed-forward."""


def part_of(name: str) -> str:
    """Part of the module or parameter of SAM2 with this name."""
    return next((part for pattern, part in MODULES.items() if fnmatch.fnmatchcase(name, pattern)), "other")


class PartTracker:
    """Follows which part runs.

    In the forward pass that is the innermost module that belongs to one. A node of the backward pass belongs to the
    part that ran when the node was made: nodes are numbered in the order in which their thread makes them, and the
    tracker notes at which number a part begins. Therefore the backward pass must run in the thread of the forward pass
    (torch.autograd.set_multithreading_enabled(False)).
    """

    def __init__(self) -> None:
        self._running: list[str] = []
        self._starts: list[int] = [0]  # number of the first node of a period ...
        self._parts: list[str] = ["other"]  # ... and the part of all its nodes
        self._parameters: dict[int, str] = {}

    def watch_model(self, model: nn.Module) -> None:
        """Tell the parts of a SAM2 by the names of its modules."""
        for name, module in model.named_modules():
            if part_of(name) != part_of(name.rpartition(".")[0]):
                self.watch(module, part_of(name))
        for name, parameter in model.named_parameters():
            self._parameters[id(parameter)] = part_of(name)

    def watch(self, module: nn.Module, part: str) -> None:
        """Count what runs inside a module as `part`."""
        depths: list[int] = []

        def before(*_) -> None:
            depths.append(len(self._running))
            self._begin(part)

        def after(*_) -> None:
            self._return_to(depths.pop())

        module.register_forward_pre_hook(before)
        # Always: the recomputation of a checkpoint ends by an exception once it has what it needs.
        module.register_forward_hook(after, always_call=True)

    @contextmanager
    def scope(self, part: str) -> Iterator[None]:
        """Count what runs inside as `part`."""
        depth = len(self._running)
        self._begin(part)
        try:
            yield
        finally:
            self._return_to(depth)

    def tracked(self, function: Callable, part: str) -> Callable:
        """`function`, whose operations count as `part`."""

        def run(*args, **kwargs):
            with self.scope(part):
                return function(*args, **kwargs)

        return run

    def current(self) -> str:
        """Part of the operation that is running now."""
        node = torch._C._current_autograd_node()
        if node is None or self._running:  # forward pass or recomputation
            return self._running[-1] if self._running else "other"
        variable = getattr(node, "variable", None)
        if variable is not None:  # the gradient of a parameter is summed up
            return self._parameters.get(id(variable), "other")
        return self._parts[bisect.bisect_right(self._starts, node._sequence_nr()) - 1]

    def _begin(self, part: str) -> None:
        self._running.append(part)
        self._note()

    def _return_to(self, depth: int) -> None:
        del self._running[depth:]
        self._note()

    def _note(self) -> None:
        self._starts.append(torch.autograd._get_sequence_nr())
        self._parts.append(self._running[-1] if self._running else "other")
