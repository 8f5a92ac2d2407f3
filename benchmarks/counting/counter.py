"""Counts the operations of a step on fake tensors: FLOPs, bytes, launches, and the memory that is alive."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

from sam2fast_kernels.library import register_flop_formulas

from .parts import PartTracker

Phase = Literal["forward", "backward"]
Place = tuple[str, str]
"""A part, and the name of an operation in it."""

LAUNCHES = {
    "sam2fast::click_uniform": 2,
    "sam2fast::click_center": 7,
    "sam2fast::memory_attention": 4,
    "sam2fast::memory_attention_backward": 7,
    "sam2fast::layer_norm_backward": 3,
}
"""Kernels of a call where it is not one."""
MULTI_TENSOR_CHUNK, MULTI_TENSOR_BLOCKS = 65536, 320
MULTI_TENSOR_LISTS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
"""Of PyTorch's kernels for lists of tensors (MultiTensorApply.cuh): elements of a block, blocks of a launch, tensors of
a launch by the number of lists. Newer versions take more tensors at once."""
ALLOCATIONS = ("aten::empty", "aten::new_empty")
OVERWRITE = ("aten::copy_", "aten::fill_", "aten::zero_", "aten::bernoulli_", "aten::uniform_")
"""In place, without reading what was there."""


@dataclass
class Tally:
    """Sums over operations."""

    flops: int = 0
    """2 for a multiply-add; only of operations that have a formula: products, convolutions, attention, own kernels."""
    bytes: int = 0
    """Inputs and outputs, each moved once."""
    launches: int = 0

    def add(self, other: Tally) -> None:
        self.flops += other.flops
        self.bytes += other.bytes
        self.launches += other.launches


class StepCounter(TorchDispatchMode):
    """Counts what runs inside: enter it inside FakeTensorMode.

    Every operation that makes or changes a tensor on CUDA is one launch (LAUNCHES lists exceptions): a lower bound, as
    some of PyTorch's operations start two or three kernels. Views and allocations are none. Bytes are those of inputs
    and outputs as if nothing stayed in a cache, a broadcast input counted once. Memory is that of the storages that
    operations made: no parameters or inputs of the step, no scratch inside an operation, no fragmentation.
    """

    def __init__(self, tracker: PartTracker) -> None:
        super().__init__()
        register_flop_formulas()
        self.tallies: dict[tuple[Phase, Place], Tally] = defaultdict(Tally)
        self.live: Counter[Place] = Counter()
        """Bytes that are alive, by the operation that made them."""
        self._tracker = tracker
        self._now = self._most = 0
        self._at_peak: Counter[Place] = Counter()
        self._paused = False

    @property
    def at_peak(self) -> Counter[Place]:
        """What was alive when most was."""
        self._note_peak()
        return self._at_peak

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what runs inside, and the memory that it makes."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(self, function: OpOverload, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, FakeTensor)]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
        # Operations on lists change tensors and return nothing. Not `.device`, which is an operation of its own here.
        touched = outputs or (inputs if function._schema.is_mutable else [])
        if not self._paused and any(tensor.fake_device.type == "cuda" for tensor in touched):
            self._count(function, args, kwargs, result, inputs, outputs)
        return result

    def _count(self, function: OpOverload, args, kwargs, result, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        place = self._tracker.current(), function.name()
        read = {tensor.untyped_storage()._cdata for tensor in inputs}
        made = {
            storage._cdata: storage for tensor in outputs if (storage := tensor.untyped_storage())._cdata not in read
        }
        if function._schema.is_mutable or (made and not function._schema.name.startswith(ALLOCATIONS)):
            phase = "forward" if torch._C._current_autograd_node() is None else "backward"
            launches = _launches(function, args)
            moved = _bytes(_read(function, args, kwargs)) + _bytes(outputs)
            self.tallies[phase, place].add(Tally(_flops(function, args, kwargs, result), moved, launches))
        for storage in made.values():
            size = storage.nbytes()
            self.live[place] += size
            self._now += size
            weakref.finalize(storage, self._free, size, place)

    def _free(self, size: int, place: Place) -> None:
        self._note_peak()
        self.live[place] -= size
        self._now -= size

    def _note_peak(self) -> None:
        """Called before memory falls, so that no peak is missed."""
        if self._now > self._most:
            self._most, self._at_peak = self._now, self.live.copy()


def _launches(function: OpOverload, args) -> int:
    name = function._schema.name
    if not name.startswith(("aten::_foreach_", "aten::_fused_adamw_")):
        return LAUNCHES.get(name, 1)
    lists = [value for value in args if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor)]
    lists = [value for value in lists if value[0].dim() or name.startswith("aten::_foreach_")]  # not AdamW's steps
    started = tensors = blocks = 0
    for tensor in lists[0]:
        tensors += 1
        for _ in range(-(-tensor.numel() // MULTI_TENSOR_CHUNK)):
            blocks += 1
            if blocks == MULTI_TENSOR_BLOCKS:
                started, tensors, blocks = started + 1, 1, 0
        if tensors == MULTI_TENSOR_LISTS[len(lists)]:
            started, tensors, blocks = started + 1, 0, 0
    started += blocks > 0
    return 2 * started if name == "aten::_foreach_norm" else started  # norms of blocks, then of tensors


def _read(function: OpOverload, args, kwargs) -> list[Tensor]:
    """Tensors whose values the operation reads."""
    if function._schema.name in OVERWRITE:
        args = args[1:]
    written = {argument.name for argument in function._schema.arguments if argument.is_out}
    values = (args, [value for name, value in kwargs.items() if name not in written])
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, FakeTensor)]


def _bytes(tensors: list[Tensor]) -> int:
    unique = {id(tensor): tensor for tensor in tensors}.values()
    return sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in unique)


def _flops(function: OpOverload, args, kwargs, result) -> int:
    packet = function._overloadpacket
    if packet is torch.ops.aten.convolution_backward:
        return _convolution_backward_flops(*args)
    if function._schema.name.endswith("_"):  # in place, as many as out of place
        packet = getattr(getattr(torch.ops, function.namespace), packet.__name__.removesuffix("_"), packet)
    formula = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


def _convolution_backward_flops(gradient: Tensor, x: Tensor, weight: Tensor, *options) -> int:
    """As many for each wanted gradient, that of the input and that of the weight, as for the forward pass.

    PyTorch's own formula takes groups for dense.
    """
    transposed, wanted = options[4], options[-1]
    forward = conv_flop_count(list(x.shape), list(weight.shape), list(gradient.shape), transposed=transposed)
    return forward * sum(wanted[:2])
